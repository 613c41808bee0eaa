"""The doctor's verdicts on what cannot be had here: several nodes, GPUs. Its looks are real in test_doctor.py."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oat_dist.config import Config
from oat_dist.doctor import devices, network, practice, rows, signals, slurm, storage, versions
from oat_dist.doctor.devices import Facts
from oat_dist.doctor.launch import Launch
from oat_dist.doctor.looks import Place, Trouble, differing, ranks_text
from oat_dist.doctor.network import Speed
from oat_dist.doctor.rows import Row
from oat_dist.errors import LaunchError, OatError

FOUR = [Place(rank, rank % 2, f"node{rank // 2}", f"node{rank // 2}") for rank in range(4)]
HERE = [Place(rank, rank, "here", "here") for rank in range(2)]


def test_ranks_and_nodes_in_words() -> None:
    assert ranks_text(FOUR) == "node0 (ranks 0-1), node1 (ranks 2-3)"
    assert ranks_text([FOUR[0], FOUR[2], FOUR[3]]) == "node0 (rank 0), node1 (ranks 2-3)"
    assert differing([1, 1, 1, 2], FOUR) == "1 on node0 (ranks 0-1), node1 (rank 2), 2 on node1 (rank 3)"
    assert differing([1, 1, 1, 1], FOUR) == ""
    assert Trouble.of(OSError(28, "No space left on device", "/x")) == Trouble("/x: No space left on device")
    assert Trouble.of(OatError("it is so; do that; and that")) == Trouble("it is so", "do that; and that")
    assert Trouble.of(RuntimeError("first\nsecond")) == Trouble("RuntimeError: first")


def test_versions_that_differ() -> None:
    mine = versions.look()
    assert [row.status for row in versions.judge([mine] * 4, FOUR, False)] == ["pass"]
    other = mine | {"torch": "9.9", "numpy": "1.0"}
    failure, warning = versions.judge([mine, mine, other, other], FOUR, False)
    assert failure.status == "fail" and "9.9 on node1 (ranks 2-3)" in failure.found and "every node" in failure.remedy
    assert warning.status == "warn" and warning.found.startswith("numpy: ")
    [code] = versions.judge([mine, mine | {"our code": "else"}], HERE, False)
    assert code.status == "fail" and "our code" in code.found
    without = mine | {"deepspeed": "not installed"}
    assert [row.status for row in versions.judge([without], HERE[:1], True)] == ["fail"]
    assert [row.status for row in versions.judge([without], HERE[:1], False)] == ["pass"]


GPU = Facts("cuda", "H100", tuple(range(16)), 8, identity="a", total_gib=80.0, others_gib=0.5, shm_gib=32.0)


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ([{}, {"identity": "b"}], "pass", "2 GPU(s), H100"),
        ([{}, {}], "fail", "one GPU (a) for here (ranks 0-1)"),
        ([{}, {"identity": "b", "others_gib": 30.0}], "warn", "30.0 of 80.0 GiB are taken on here (rank 1)"),
        ([{"cores": (3,)}, {"identity": "b", "cores": (3,)}], "warn", "on 1 core(s) of here"),
        ([{"shm_gib": 0.0625}, {"identity": "b"}], "warn", "64 MiB on here"),
        ([{}, {"identity": "b", "bf16": False}], "fail", "H100 on here (rank 1) cannot compute in it"),
        ([{}, {"kind": "cpu", "threads": 1}], "fail", "not the same kind on all ranks"),
    ],
)
def test_gpus(changes: list[dict[str, Any]], status: str, text: str) -> None:
    found = [replace(GPU, **change) for change in changes]
    judged = devices.judge(found, HERE, "bf16", workers=4)
    assert any(row.status == status and text in row.found for row in judged), judged
    if status != "fail":
        assert all(row.status != "fail" for row in judged)
    else:
        assert all(row.remedy for row in judged if row.status == "fail")


def test_cores() -> None:
    facts = Facts("cpu", "CPU", (0, 1), 1)
    assert [row.status for row in devices.judge([facts, facts], HERE, None, 2)] == ["pass"]
    [row] = devices.judge([replace(facts, threads=2)] * 2, HERE, None, 2)
    assert row.status == "warn" and "4 computing threads in all on 2 core(s)" in row.found
    assert "engine.threads=1" in row.remedy and "start at most" not in row.remedy
    [row] = devices.judge([replace(facts, quota=1.0)] * 2, HERE, None, 2)
    assert row.status == "warn" and "start at most 1 processes" in row.remedy
    trouble = devices.judge([facts, Trouble("broken", "mend it")], HERE, None, 2)
    assert trouble[0] == Row("devices", "fail", "broken [on here (rank 1)]", "mend it")


LAUNCH = Launch(HERE[0], 2, 2, 1, 1, "127.0.0.1", 1, False, True)


def test_processes() -> None:
    def judged(launch: Launch = LAUNCH, places: list[Place] = HERE, loopback: tuple[bool, ...] = (False, False)) -> Row:
        [row] = network.judge_processes(launch, places, loopback)
        return row

    assert judged() == Row("processes", "pass", "2 process(es) on 1 node(s): here (ranks 0-1)")
    assert "has 4 tasks" in judged(replace(LAUNCH, tasks=4)).found
    assert "has 2 nodes" in judged(replace(LAUNCH, nodes=2)).found
    assert judged(replace(LAUNCH, tasks=1)).status == "pass"  # a launcher
    both_zero = [HERE[0], replace(HERE[1], local_rank=0)]
    assert judged(places=both_zero).status == "fail" and "SLURM_LOCALID" in judged(places=both_zero).remedy
    assert judged(replace(LAUNCH, local_world=None)).status == "warn"
    assert "LOCAL_WORLD_SIZE=2" in judged(replace(LAUNCH, local_world=1)).remedy
    apart = [HERE[0], Place(1, 0, "there", "there")]
    alone = replace(LAUNCH, local_world=1)
    assert judged(alone, apart).status == "pass"
    assert "GLOO_SOCKET_IFNAME" in judged(alone, apart, (False, True)).remedy
    assert judged(loopback=(True, True)).status == "pass"  # on one machine it is right


def test_speed() -> None:
    quick = Speed(0.0001, 32 << 20, 0.01)
    assert network.judge_speed(quick, HERE, "cpu").status == "pass"
    assert network.judge_speed(quick, HERE[:1], "cpu").status == "skip"
    assert network.judge_speed(replace(quick, latency=0.02), HERE, "cpu").status == "warn"
    slow = replace(quick, seconds=2.0)
    assert network.judge_speed(slow, HERE, "cpu").status == "pass"  # within a machine, busy
    row = network.judge_speed(slow, FOUR, "cuda")
    assert row.status == "warn" and "(17 MB/s)" in row.found and "NCCL_SOCKET_IFNAME" in row.remedy


def test_grace_period_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OAT_GRACE_SECONDS", raising=False)
    assert slurm.grace_period(None, None)[0] == slurm.DEFAULT_GRACE
    monkeypatch.setenv("OAT_GRACE_SECONDS", "90")
    assert slurm.grace_period(None, None) == (90.0, "OAT_GRACE_SECONDS")
    assert slurm.grace_period(5.0, None) == (5.0, "--grace")
    monkeypatch.setenv("OAT_GRACE_SECONDS", "soon")
    with pytest.raises(OatError, match="'soon' is no number of seconds"):
        slurm.grace_period(None, None)


def test_the_lead_of_a_batch_script() -> None:
    for line in (
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --requeue --signal B:USR1@120 # so long",
        "#SBATCH --signal=10@120",
    ):
        found = slurm._SIGNAL.search(f"#!/bin/bash\n{line}\necho --signal=B:USR1@7\n")
        assert found is not None and found[1] == "120"
    assert slurm._SIGNAL.search("#SBATCH --signal=USR1\n##SBATCH --signal=B:USR1@120") is None


def test_variables_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="RANK=2 of WORLD_SIZE=2 makes no sense"):
        Launch.read()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(LaunchError, match="RANK='first' is no number"):
        Launch.read()


def test_room(tmp_path: Path) -> None:
    config = Config()
    plenty = storage.Room(1000, None)
    assert [row.status for row in storage.judge_room([plenty], HERE[:1], 100, config, 0)] == ["pass"]
    assert [row.status for row in storage.judge_room([replace(plenty, output=500)], HERE[:1], 100, config, 0)] == [
        "warn"
    ]
    assert [row.status for row in storage.judge_room([replace(plenty, output=300)], HERE[:1], 100, config, 0)] == [
        "fail"
    ]
    # a run that goes on has three of them already
    assert [row.status for row in storage.judge_room([replace(plenty, output=300)], HERE[:1], 100, config, 300)] == [
        "pass"
    ]
    few = storage.judge_room([replace(plenty, inodes=50)], HERE[:1], 100, config, 0)
    assert [row.status for row in few] == ["pass", "fail"] and "50 more files" in few[1].found
    cache = storage.Room(1000, None, "/cache", cache=10, cache_needed=20)
    [_, row] = storage.judge_room([replace(cache, cache=30), cache], HERE, 100, config, 0)
    assert row.status == "fail" and "data.cache_dir" in row.remedy
    # what a killed doctor left goes with the next one; that of a living one stays
    first = storage.Workspace.make(tmp_path / "run")
    (tmp_path / "run" / ".doctor-dead").mkdir()
    second = storage.Workspace.make(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([first.folder.name, second.folder.name])
    second.remove()
    first.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_checkpoint_is_known_before() -> None:
    config = Config()
    small = practice.checkpoint_bytes(config, 10)
    assert small == pytest.approx(2 * 4 * 62_006, rel=0.1)  # weights and momentum
    adamw = replace(config, optim=replace(config.optim, name="adamw"))
    assert practice.checkpoint_bytes(adamw, 10) == pytest.approx(1.5 * small, rel=0.01)
    frozen = replace(config, model=replace(config.model, freeze="body"))
    assert practice.checkpoint_bytes(frozen, 10) < 0.6 * small
    large = replace(config, model=replace(config.model, name="vit_l_16"), data=replace(config.data, image_size=224))
    assert practice.checkpoint_bytes(large, 1000) == pytest.approx(2 * 4 * 304.3e6, rel=0.01)


def test_signals_judged_by_rank() -> None:
    good = signals.Heard((), (), ())
    [row] = signals.judge([good, good], HERE, Config())
    assert row.status == "pass" and "SIGUSR1, SIGTERM, SIGINT" in row.found
    bad = signals.Heard(("SIGINT",), (), ())
    [row] = signals.judge([bad, bad], HERE, Config())
    assert row.found == "SIGINT ignored at the start" and "setsid" in row.remedy


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    found = [Row("data", "pass", "well [rank 1] " * 9), Row("slurm", "warn", "not so well", "do this")]
    rows.print_rows("title", found, 3.0)
    said = re.sub("\x1b\\[[0-9]*m", "", capsys.readouterr().out)
    assert said.splitlines()[0] == "title" and "1 warned, 1 passed (3 s)" in said
    assert "warn  slurm  not so well" in said and "-> do this" in said and "[rank 1]" in said
    assert max(map(len, said.splitlines())) <= 60


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    from oat_dist import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: oat-dist doctor ") and "sbatch --nodes=2" in text and "accelerate launch" in text
