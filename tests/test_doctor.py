"""The doctor: a healthy set-up passes, and each thing that can be wrong with one turns its row, on real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import free_port, rank_environment, rank_server, run_ranks
from shard_server import ShardServer
from torch.distributed import TCPStore
from training_checks import BASE

from oat_dist.data.index import ShardSet
from oat_dist.doctor import signals

Found = list[dict[str, str]]


def statuses(found: Found) -> dict[str, str]:
    """The worst status of each check."""
    order = ("skip", "pass", "warn", "fail")
    worst: dict[str, str] = {}
    for row in found:
        worst[row["check"]] = max(worst.get(row["check"], "skip"), row["status"], key=order.index)
    return worst


def failed(found: Found) -> set[str]:
    return {row["check"] for row in found if row["status"] == "fail"}


def row_of(found: Found, check: str, status: str) -> dict[str, str]:
    matching = [row for row in found if (row["check"], row["status"]) == (check, status)]
    assert len(matching) == 1, found
    return matching[0]


# Whole walks on real processes.


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "config.yaml"
    path.write_text(BASE)
    return path


@pytest.fixture(scope="module")
def data(digits: dict[str, ShardSet]) -> Path:
    return digits["train"].folder.parent


@pytest.fixture(scope="module")
def damaged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One byte differs."""
    copy = tmp_path_factory.mktemp("damaged") / "digits"
    shutil.copytree(data, copy)
    with (copy / "train" / "train-000001.tar").open("r+b") as file:
        file.seek(20_000)
        byte = file.read(1)
        file.seek(20_000)
        file.write(bytes([byte[0] ^ 1]))
    return copy


@pytest.fixture(scope="module")
def campaign(
    config: Path, data: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Found]]:
    root = tmp_path_factory.mktemp("campaign")
    missing, other = root / "missing", root / "other"
    shutil.copytree(data, missing)
    (missing / "train" / "train-000002.tar").unlink()
    shutil.copytree(data, other)
    manifest = other / "train" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")  # the same images, and yet another set
    arguments = map(str, (root, config, data, damaged, missing, other))
    return root, run_ranks(2, "doctor_checks:campaign", *arguments)[0]


def test_a_healthy_set_up_has_no_failure(campaign: tuple[Path, dict[str, Found]]) -> None:
    root, found = campaign
    healthy = statuses(found["healthy"])
    assert failed(found["healthy"]) == set()
    # (on a busy machine the all-reduce may be slow, which is a warning)
    assert healthy.pop("all-reduce") in ("pass", "warn") and healthy.pop("slurm") == "skip"
    names = "processes versions devices output_dir data shards signals practice"
    assert healthy == dict.fromkeys([*names.split(), "grace period", "free space"], "pass")
    assert not (root / "healthy").exists()  # nothing is left
    for name in ("damaged", "no weights", "output_dir of each"):
        assert not (root / name).exists()


def test_one_wrong_byte_is_found_by_its_checksum_alone(campaign: tuple[Path, dict[str, Found]]) -> None:
    row = row_of(campaign[1]["damaged"], "shards", "fail")
    assert "train-000001.tar: its bytes have changed" in row["found"] and "restore it" in row["remedy"]
    assert failed(campaign[1]["damaged"]) == {"shards"}
    assert failed(campaign[1]["damaged, quick"]) == set()  # the control: size and place are right


def test_shards_that_are_not_everywhere(campaign: tuple[Path, dict[str, Found]]) -> None:
    found = campaign[1]
    assert "train-000002.tar: the shard is missing" in row_of(found["missing"], "data", "fail")["found"]
    row = row_of(found["not there on rank 1"], "data", "fail")
    assert "no such packed split" in row["found"] and "(rank 1)" in row["found"]
    assert "not the same data everywhere" in row_of(found["another set on rank 1"], "data", "fail")["found"]
    for name in ("missing", "not there on rank 1", "another set on rank 1"):
        assert statuses(found[name])["shards"] == "skip" and failed(found[name]) == {"data"}


def test_output_dir_that_is_not_one_for_all(campaign: tuple[Path, dict[str, Found]]) -> None:
    found = campaign[1]["output_dir of each"]
    row = row_of(found, "output_dir", "fail")
    assert "is not the folder that rank 0 sees" in row["found"] and "share" in row["remedy"]
    assert "no output_dir" in row_of(found, "practice", "skip")["found"]
    row = row_of(campaign[1]["output_dir is none"], "output_dir", "fail")
    assert "cannot be made" in row["found"] and "choose another" in row["remedy"]


def test_a_folder_in_which_somebody_trains(campaign: tuple[Path, dict[str, Found]]) -> None:
    row = row_of(campaign[1]["held"], "output_dir", "fail")
    assert "another process trains in this folder (" in row["found"] and f"process {os.getpid()}" not in row["found"]
    assert row_of(campaign[1]["taken over"], "output_dir", "warn")["remedy"]


def test_a_disk_and_a_grace_period_that_are_too_small(campaign: tuple[Path, dict[str, Found]]) -> None:
    found = campaign[1]["small"]
    assert failed(found) - {"inodes"} == {"free space", "grace period"}
    assert "checkpoint.keep" in row_of(found, "free space", "fail")["remedy"]
    row = row_of(found, "grace period", "fail")
    assert "allowed are 0.001 s (--grace)" in row["found"] and "--signal=B:USR1@" in row["remedy"]
    # 60 s until the ranks agree fit into 100, but not twice
    assert statuses(campaign[1]["tight"])["grace period"] == "warn"


def test_a_training_that_cannot_start(campaign: tuple[Path, dict[str, Found]]) -> None:
    found = campaign[1]["no weights"]
    assert failed(found) == {"practice"}
    assert "none.safetensors" in row_of(found, "practice", "fail")["found"]
    assert statuses(found)["free space"] == "pass"  # the size of a checkpoint is known all the same


def test_a_stream_trains(campaign: tuple[Path, dict[str, Found]]) -> None:
    assert failed(campaign[1]["stream"]) == set() and statuses(campaign[1]["stream"])["practice"] == "pass"


def test_a_full_disk_fails_the_save(config: Path, data: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        found = run_ranks(1, "doctor_checks:tmpfs", str(config), str(data), str(disk / "run"))[0]
        left = list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "No space left" in row_of(found, "practice", "fail")["found"]
    assert failed(found) == {"practice", "free space"} and left == []


def test_remote_shards_one_of_which_is_fetched(config: Path, data: Path, tmp_path: Path) -> None:
    output = f"output_dir={tmp_path / 'run'}"
    with ShardServer(data) as server:
        overrides = [output, f"data.cache_dir={tmp_path / 'cache'}"]
        found = run_ranks(2, "doctor_checks:remote", str(config), server.url, overrides)[0]
        assert sum(count for name, count in server.requests.items() if name.endswith(".tar")) == 1
    assert failed(found) == set() and "one was fetched" in row_of(found, "shards", "pass")["found"]
    assert "of data" in row_of(found, "cache", "pass")["found"]


# The command.


def run_main(
    world: int,
    *arguments: object,
    environment: dict[str, str | None] | None = None,
    ignored: tuple[int, ...] = (),
    blocked: tuple[int, ...] = (),
) -> list[list[Any]]:
    return run_ranks(world, "doctor_checks:main", list(map(str, arguments)), environment or {}, ignored, blocked)


@pytest.fixture
def given(config: Path, data: Path, tmp_path: Path) -> list[object]:
    return [config, f"data.path={data}", f"output_dir={tmp_path / 'runs' / 'one'}"]


def test_the_command_on_one_process(given: list[object], tmp_path: Path) -> None:
    [[status, said, errors]] = run_main(1, *given)
    assert status == 0, said
    lines = said.splitlines()
    assert lines[0].endswith("1 process(es)") and lines[-1].startswith("11 passed, 2 skipped")
    assert all(line[:4] in ("pass", "skip") for line in lines[2:-2]), said
    assert errors.startswith("practice: 3 steps") and list(tmp_path.iterdir()) == []


def test_json_and_signals_that_do_not_reach_a_rank(given: list[object]) -> None:
    (status, said, _), (other, nothing, _) = run_main(
        *(2, *given, "--json", "--quick", "--no-training"),
        ignored=(signal.SIGINT,),
        blocked=(signal.SIGUSR1,),
    )
    assert (status, other, nothing) == (1, 1, "")
    answer = json.loads(said)
    assert answer["ok"] is False and answer["processes"] == 2 and answer["seconds"] > 0
    texts = {row["found"]: row["status"] for row in answer["rows"] if row["check"] == "signals"}
    where = f" [on {socket.gethostname()} (rank 1)]"
    assert texts == {
        f"SIGUSR1 not heard when sent{where}": "fail",
        f"SIGUSR1 blocked{where}": "warn",
        f"SIGINT ignored at the start{where}": "warn",
    }
    [[status, said, _]] = run_main(1, *given, "--json", "--quick", "--no-training", ignored=(signal.SIGINT,))
    assert status == 0 and statuses(json.loads(said)["rows"])["signals"] == "warn"


def test_an_address_that_does_not_resolve_ends_in_seconds(given: list[object]) -> None:
    started = time.monotonic()
    (status, said, _), (other, nothing, errors) = run_main(
        2, *given, "--json", environment={"MASTER_ADDR": "no-such-host.invalid"}
    )
    assert time.monotonic() - started < 60  # torch would wait for minutes
    assert (status, other, nothing) == (1, 1, "") and "no-such-host.invalid does not resolve" in errors
    found = json.loads(said)["rows"]
    assert failed(found) == {"processes"} and "MASTER_ADDR" in row_of(found, "processes", "fail")["found"]
    assert "scontrol show hostnames" in row_of(found, "processes", "fail")["remedy"]
    ran = {check for check, status in statuses(found).items() if status == "pass"}
    assert {"versions", "devices", "output_dir", "data", "signals", "free space"} <= ran  # what one can do alone


def test_a_rank_that_does_not_come(given: list[object]) -> None:
    port = str(free_port())
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    [[status, said, _]] = run_main(1, *given, "--json", "--wait", 1, environment=alone)
    row = row_of(json.loads(said)["rows"], "processes", "fail")
    assert status == 1 and "1 of 2 processes have met" in row["found"] and "missing: rank 1" in row["found"]
    [[status, said, errors]] = run_main(1, *given, "--json", "--wait", 1, environment=alone | {"RANK": "1"})
    assert (status, said) == (1, "") and "(rank 1)] fail: rank 0 at MASTER_ADDR=127.0.0.1" in errors
    with socket.create_server(("127.0.0.1", int(port))):
        [[status, said, _]] = run_main(1, *given, "--json", "--wait", 1, environment=alone)
    row = row_of(json.loads(said)["rows"], "processes", "fail")
    assert status == 1 and f"port {port} (MASTER_PORT) cannot be opened" in row["found"]
    everywhere = alone | {"MASTER_ADDR": "localhost", "SLURM_STEP_NUM_NODES": "2"}
    [[status, said, _]] = run_main(1, *given, "--json", environment=everywhere)
    row = row_of(json.loads(said)["rows"], "processes", "fail")
    assert status == 1 and "MASTER_ADDR=localhost is every machine's own" in row["found"]


def test_where_an_elastic_agent_has_the_port(given: list[object]) -> None:
    """As under torchrun and accelerate launch: the port of rank 0 is told through the agent's store."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment: dict[str, str | None] = {
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    (status, said, _), (other, nothing, _) = run_main(
        2, *given, "--json", "--quick", "--no-training", environment=environment
    )
    assert (status, other, nothing) == (0, 0, "")
    assert "2 process(es) on 1 node(s)" in row_of(json.loads(said)["rows"], "processes", "pass")["found"]


def test_processes_that_do_not_see_each_other(given: list[object]) -> None:
    """As srun starts them when nobody sets RANK: each takes itself for the only one."""
    for task, speaks in (("0", True), ("1", False)):
        environment = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": task}
        [[status, said, errors]] = run_main(1, *given, "--json", environment=environment)
        assert status == 1
        if speaks:
            row = row_of(json.loads(said)["rows"], "processes", "fail")
            assert "2 processes were started but this one sees 1" in row["found"] and "accelerate" in row["remedy"]
        else:
            assert said == "" and "2 processes were started" in errors


def test_a_rank_of_another_number_of_processes(given: list[object]) -> None:
    (status, said, _), (other, nothing, _) = run_main(2, *given, "engine.processes=3", "--json")
    found = json.loads(said)["rows"]
    row = row_of(found, "processes", "fail")
    assert (status, other, nothing) == (1, 1, "") and failed(found) == {"processes"}
    assert "engine.processes=3, but 2 process(es) are running" in row["found"]


def test_a_wrong_configuration_ends_at_once(given: list[object]) -> None:
    [[status, said, errors]] = run_main(1, *given, "batch_size=0")
    assert (status, said) == (2, "") and errors.startswith("error: batch_size must be at least 1")
    [[status, said, errors]] = run_main(1, *given, "--grace", "nan")
    assert (status, said) == (2, "") and errors.startswith("error: --grace must be")


@pytest.mark.parametrize("how", ["fails", "dies"])
def test_a_rank_that_breaks_off_in_a_collective(given: list[object], tmp_path: Path, how: str) -> None:
    """The others would wait for it for half an hour; here they end, and rank 0 says who and why."""
    found = break_off(given, tmp_path, how)
    row = row_of(found, "practice", "fail")
    assert "(rank 1), in the practice training]" in row["found"]
    assert ("the disk of this node is gone" if how == "fails" else "has ended without a word") in row["found"]
    if how == "fails":
        assert (tmp_path / "status-1").read_text() == "1"


def test_a_sigterm_leaves_nothing_behind(given: list[object], tmp_path: Path) -> None:
    assert run_ranks(1, "doctor_checks:terminated", [*map(str, given), "--quick"]) == [128 + signal.SIGTERM]
    assert list(tmp_path.iterdir()) == []


def test_practice_under_zero(given: list[object], tmp_path: Path) -> None:
    overrides = ("engine.name=zero2", "engine.precision=bf16", "--json", "--quick")
    (status, said, _), _ = run_main(2, *given, *overrides)
    found = json.loads(said)["rows"]
    assert status == 0 and "3 steps under zero2" in row_of(found, "practice", "pass")["found"]
    assert "deepspeed " in row_of(found, "versions", "pass")["found"] and row_of(found, "bf16", "pass")
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_too_small_names_a_micro_batch(given: list[object], tmp_path: Path) -> None:
    found = break_off(given, tmp_path, "memory")
    row = row_of(found, "practice", "fail")
    assert row["found"] == "out of GPU memory" and "try micro_batch_size=12" in row["remedy"]  # 24 of 48 each
    assert row_of(found, "free space", "pass") and (tmp_path / "status-1").read_text() == "1"


def break_off(given: list[object], tmp_path: Path, how: str) -> Found:
    """What rank 0 prints; every rank must end, and nothing be left."""
    server, port, folder = rank_server(), free_port(), str(tmp_path)
    arguments = json.dumps([[*map(str, given), "--json", "--quick"], how, folder])
    pids = [
        server.start(rank_environment(rank, 2, port), "doctor_checks:break_off", arguments, folder) for rank in (0, 1)
    ]
    deadline = time.monotonic() + 60
    while any(server.status(pid) is None for pid in pids):
        assert time.monotonic() < deadline, "a rank hangs"
        time.sleep(0.05)
    assert (tmp_path / "status-0").read_text() == "1" and not (tmp_path / "runs").exists()
    rows_of_rank_0: Found = json.loads((tmp_path / "said-0").read_text())["rows"]
    return rows_of_rank_0


# In a Slurm job. (A real cluster: tests/slurm. These commands stand for one that does as a test wants.)


@pytest.mark.parametrize(
    ("scancel", "status", "text"),
    [
        ('touch "$STOP"', "pass", "made job.stop_file appear in"),
        ("true", "fail", "did not appear 2 s after USR1 was sent"),
        ("kill -TERM $PPID", "fail", "the batch script died of USR1"),
        ("echo scancel: error: Invalid job id >&2; exit 1", "fail", "Invalid job id"),
    ],
)
def test_delivery_of_a_signal(given: list[object], tmp_path: Path, scancel: str, status: str, text: str) -> None:
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 7200))
    show = f"JobId=7 Requeue=0 Restarts=3 BatchFlag=1 TimeLimit=02:00:00 EndTime={end} Command=/jobs/mine.sbatch"
    script = f'case "$*" in "show job -o 7") echo "{show}" ;; *) echo "#SBATCH --signal=B:USR1@77" ;; esac'
    (tmp_path / "bin").mkdir()
    for name, body in (("scontrol", script), ("scancel", f'echo "$*" >"$ASKED"; {scancel}')):
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    environment: dict[str, str | None] = {
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS_ON_NODE": "2",
        "STOP": str(tmp_path / "stop"),
        "ASKED": str(tmp_path / "asked"),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    training = [] if status == "pass" else ["--no-training"]
    arguments = [*given, f"job.stop_file={tmp_path / 'stop'}", "--json", "--quick", *training]
    [[code, said, _]] = run_main(1, *arguments, environment=environment)
    found = json.loads(said)["rows"]
    assert text in row_of(found, "delivery", status)["found"] and code == (status == "fail")
    assert (tmp_path / "asked").read_text() == "--batch --signal=USR1 7\n" and not (tmp_path / "stop").exists()
    warned = [row["found"] for row in found if row["check"] == "slurm"]
    assert "not requeued" in warned[0] and "restarts 3" in warned[0] and " left" in warned[0]
    assert "2 GPU(s) are allocated" in warned[1] and "on the CPU" in warned[1]
    if training == []:
        assert "allowed are 77 s (--signal in the batch script)" in row_of(found, "grace period", "pass")["found"]


def test_a_batch_script_without_a_trap_is_spared(tmp_path: Path) -> None:
    """It would die of the signal, and the job before anybody has read the table."""
    script = tmp_path / "job4000000123" / "slurm_script"
    script.parent.mkdir()
    assert signals._traps_usr1("4000000123") is None
    for trap, expected in (("trap 'true' USR1", True), ("", False)):
        script.write_text(f"{trap}\necho ready\nwhile read -r line; do :; done\n")
        with subprocess.Popen(["bash", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
            assert shell.stdout is not None
            shell.stdout.readline()
            assert signals._traps_usr1("4000000123") is expected


def test_slurm_that_does_not_answer(given: list[object], tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    environment = {"SLURM_JOB_ID": "7", "PATH": str(tmp_path)}
    arguments = [*given, "--json", "--quick", "--no-training", f"job.stop_file={tmp_path / 'stop'}"]
    [[status, said, _]] = run_main(1, *arguments, environment=environment)
    found = json.loads(said)["rows"]
    assert status == 0 and "scontrol is not there" in row_of(found, "slurm", "warn")["found"]
    assert "is there already" in row_of(found, "delivery", "warn")["found"]  # it would stop the training at once
