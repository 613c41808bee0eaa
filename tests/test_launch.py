"""Starting for real: accelerate launch, several ranks, and everything that must be refused with one clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import HERE, free_port, heard_ranks, rank_environment, run_ranks, single_environment, start, stop
from training_checks import BASE

from oat_dist.data.index import ShardSet
from oat_dist.files import folder_lock, sha256_file

TOP = HERE.parent
TRAIN = str(TOP / "launch" / "train.py")


def test_accelerate_launch_trains_on_two_ranks_and_evaluates(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """The main job as a user starts it, with a default of accelerate's own in the way that must not be read."""
    (tmp_path / "config.yaml").write_text(BASE)
    default = tmp_path / "huggingface" / "accelerate" / "default_config.yaml"
    default.parent.mkdir(parents=True)
    default.write_text("{distributed_type: 'NO', num_processes: 1, use_cpu: true}\n")
    environment = {
        **single_environment(),
        "HF_HOME": str(tmp_path / "huggingface"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    del environment["ACCELERATE_USE_CPU"]  # as on a user's machine
    launch = ["accelerate", "launch", "--config_file", str(TOP / "configs/accelerate/cpu-2.yaml")]
    data, run = digits["train"].folder.parent, tmp_path / "run"
    training = subprocess.run(
        [*launch, TRAIN, str(tmp_path / "config.yaml"), f"data.path={data}", f"output_dir={run}", "epochs=2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert training.returncode == 0, training.stderr
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert "on 2 process(es)" in training.stdout and "report" in training.stdout
    assert (run / "report.html").stat().st_size > 10_000
    assert training.stderr.count("OAT begins") == 1  # rank 0 alone speaks
    answer = subprocess.run(
        [sys.executable, str(TOP / "launch/evaluate.py"), str(run), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    found = {name: one["correct"] for name, one in json.loads(answer.stdout)["protocols"].items()}
    logged = json.loads((run / "evaluation.json").read_text())["protocols"]
    assert found == {name: one["correct"] for name, one in logged.items()}


def test_accelerate_launch_with_deepspeed_is_deepspeed(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """The ready files, as a user starts them; Accelerate's ways of silently becoming DDP would show in the log."""
    (tmp_path / "config.yaml").write_text(BASE)
    environment = {
        **single_environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    launch = ["accelerate", "launch", "--config_file", "configs/accelerate/zero2.yaml", "launch/train.py"]
    data, run = digits["train"].folder.parent, tmp_path / "run"
    command = [*launch, str(tmp_path / "config.yaml"), f"data.path={data}", f"output_dir={run}", "max_steps=40"]
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    facts = json.loads((run / "environment.json").read_text())
    assert (facts["world_size"], facts["engine"], facts["precision"]) == (2, "zero2", "no")
    assert "engine" in (run / "metrics.jsonl").read_text().splitlines()[0]
    noise = [line for line in done.stderr.splitlines() if "eep" in line and "peed" in line]
    assert noise == []  # what DeepSpeed says of itself would bury our own lines


def failing(tmp_path: Path, world: int, *arguments: str) -> list[str]:
    """What each rank of a training that must fail says on stderr; none of it a traceback."""
    (tmp_path / "config.yaml").write_text(BASE)
    found = heard_ranks(world, "oat_dist.train:main", [str(tmp_path / "config.yaml"), *arguments])
    for status, stderr in found:
        assert status == 2, stderr
        assert "Traceback" not in stderr, stderr
        assert stderr.count("error: ") == 1, stderr
    return [stderr for _, stderr in found]


@pytest.fixture
def damaged(tmp_path: Path, digits: dict[str, ShardSet]) -> Path:
    """The digits with one training image overwritten, and a manifest that agrees."""
    folder = tmp_path / "damaged"
    shutil.copytree(digits["train"].folder.parent, folder)
    split = digits["train"]
    shard = folder / "train" / split.manifest.shards[int(split.index.shard[700])].name
    with shard.open("r+b") as file:
        file.seek(int(split.index.offset[700]))
        file.write(b"x" * 40)
    manifest = folder / "train" / "manifest.json"
    before = digits["train"].folder / shard.name
    manifest.write_text(manifest.read_text().replace(sha256_file(before), sha256_file(shard)))
    return folder


def test_an_undecodable_image_stops_every_rank_with_its_name(tmp_path: Path, damaged: Path) -> None:
    said = failing(tmp_path, 2, f"data.path={damaged}", f"output_dir={tmp_path / 'run'}")
    name = [text for text in said if "sample 700" in text]
    assert len(name) == 1 and "data.on_bad=skip" in name[0]
    other = next(text for text in said if "sample 700" not in text)
    assert "another rank has stopped" in other


def test_an_undecodable_image_can_be_skipped(tmp_path: Path, damaged: Path) -> None:
    (tmp_path / "config.yaml").write_text(BASE)
    results = run_ranks(2, "launch_checks:skip", str(tmp_path), str(damaged))
    assert sorted(map(tuple, results)) == [(0, True), (1, True)]


def test_a_shard_cut_short_during_the_run_is_an_error_not_a_crash(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    folder = tmp_path / "data"
    shutil.copytree(digits["train"].folder.parent, folder)
    (tmp_path / "config.yaml").write_text(BASE)
    run = tmp_path / "run"
    command = [sys.executable, TRAIN, str(tmp_path / "config.yaml"), f"data.path={folder}", f"output_dir={run}"]
    (process,) = start(
        [*command, "epochs=500", "checkpoint.every_steps=5"], 1, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 90
        while not list((run / "checkpoints").glob("step-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for shard in (folder / "train").glob("*.tar"):
            os.truncate(shard, 1024)
        _, stderr = process.communicate(timeout=60)
    finally:
        stop([process])
    assert process.returncode == 2, stderr  # a memory map would have died of SIGBUS, -7
    assert "Traceback" not in stderr
    assert "cut short" in stderr and ".tar" in stderr and "restore" in stderr


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """Also what ranks that do not see each other run into."""
    run = tmp_path / "run"
    with folder_lock(run, "held by the test"):
        (said,) = failing(tmp_path, 1, f"data.path={digits['train'].folder.parent}", f"output_dir={run}")
    assert "another process is training in this folder" in said and "do not see each other" in said
    assert not (run / "config.yaml").exists()


def test_a_typo_under_a_launcher_is_said_once(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """Rank 0 says it; the other waits to be ended by the launcher, and speaks only if nobody does."""
    (tmp_path / "config.yaml").write_text(BASE)
    command = [sys.executable, TRAIN, str(tmp_path / "config.yaml"), "batch_siz=3"]
    processes = start(command, 2, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, stderr = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 2
        assert "unknown key 'batch_siz'; did you mean batch_size?" in stderr
        assert processes[1].poll() is None or processes[1].returncode == 2
    finally:
        stop(processes)
        for process in processes:
            if process.stderr is not None:
                process.stderr.close()


def test_launches_that_would_lie_are_refused() -> None:
    (messages,) = run_ranks(1, "launch_checks:refusals")
    assert "2 processes were started but this one sees 1" in messages["srun"]
    assert "accelerate launch or torchrun" in messages["srun"]
    assert "engine.processes=2, but 1 process" in messages["processes"]
    assert messages["deepspeed"] == (
        "engine.name=ddp is asked for, but the launcher (zero_stage) says zero2; make them agree"
    )
    # what `accelerate launch` sets for the file, as the test above shows
    assert messages["deepspeed file"] == (
        f"engine.name=zero3 is asked for, but the launcher ({TOP}/configs/deepspeed/zero2.json) says zero2; "
        "make them agree"
    )
    assert "asks for FSDP" in messages["fsdp"] and "configs/accelerate/" in messages["fsdp"]
    assert "use bf16" in messages["fp16"]
    assert "engine.precision=no" in messages["precision"] and "--mixed_precision bf16" in messages["precision"]
    assert messages["none"] is None


def test_a_meeting_that_fails_is_one_line(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """Rank 0 dies while it starts, when the other has just come."""
    (tmp_path / "config.yaml").write_text(BASE)
    dies = (
        "import datetime, os, sys, torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', int(sys.argv[1]), 2, True, datetime.timedelta(seconds=90))\n"
        "os._exit(9)\n"  # made once both are there
    )
    port = free_port()
    arguments = [f"data.path={digits['train'].folder.parent}", f"output_dir={tmp_path / 'run'}"]
    with (
        subprocess.Popen([sys.executable, "-c", dies, str(port)]) as first,
        subprocess.Popen(
            [sys.executable, TRAIN, str(tmp_path / "config.yaml"), *arguments],
            env=rank_environment(1, 2, port),
            stderr=subprocess.PIPE,
            text=True,
        ) as second,
    ):
        try:
            _, stderr = second.communicate(timeout=90)
        finally:
            first.kill()
            second.kill()
    assert second.returncode == 2, stderr
    assert "Traceback" not in stderr
    assert f"error: the processes could not meet at 127.0.0.1:{port} (" in stderr and "oat-dist doctor" in stderr
