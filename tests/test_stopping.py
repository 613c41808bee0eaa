"""Asking a run to stop: signals, the stop file, Ctrl-C once and twice, also in the midst of an evaluation."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import HERE, run_ranks, start, stop
from test_training import records
from training_checks import BASE

from oat_dist.data.index import ShardSet
from oat_dist.errors import ConfigError
from oat_dist.stopping import StopRequests, signal_numbers

TRAIN = str(HERE.parent / "launch" / "train.py")


def test_names_of_signals() -> None:
    assert signal_numbers(["USR1", "SIGTERM", "int"]) == [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
    for name in ("KILL", "SIGSTOP", "SEGV", "USR3", ""):
        with pytest.raises(ConfigError, match=r"job\.stop_signals: .* is not one of HUP, INT, QUIT, TERM, USR1"):
            signal_numbers([name])


def test_signals_are_heard_and_given_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    requests = StopRequests([signal.SIGUSR1])
    with requests.listening():
        assert requests.heard is None
        signal.raise_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while requests.heard is None:
            assert time.monotonic() < deadline
        assert requests.heard == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR2) == before[signal.SIGUSR2]
    assert {number: signal.getsignal(number) for number in before} == before


def test_ranks_agree_now_and_then_however_short_the_steps() -> None:
    (agreed, took), (same, _) = run_ranks(2, "stopping_checks:beats", 20_000, 0.05)
    assert agreed == same
    assert 5 <= agreed <= 2 * (16 + took / 0.05)  # doubling up to the pace, then about once in 0.05 s


_DEAF = """
import ctypes, signal, sys
from oat_dist.stopping import StopRequests

with StopRequests([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], speaks=True).listening():
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    for _ in range(600):
        libc.usleep(100_000)  # as in a collective: Python's own handlers wait until it returns
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])  # the latter through torchrun
def test_a_second_interrupt_ends_a_process_that_is_deep_in_foreign_code(second: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):  # one Ctrl-C, heard twice
            process.send_signal(signal.SIGINT)
        lines = [process.stderr.readline() for _ in range(2)]
        assert "stopping after this step, and saving (Ctrl-C again: stop at once" in lines[1]
        process.send_signal(signal.SIGUSR1)  # no Ctrl-C
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=30) == 130
        assert "stopped at once, nothing saved" in process.stderr.read()


def test_ctrl_c_on_a_plain_machine(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """As a user does it: one process, Ctrl-C, status 0, and the same command goes on."""
    (tmp_path / "config.yaml").write_text(BASE)
    run, outcome = tmp_path / "run", tmp_path / "outcome"
    command = [
        *(sys.executable, "-c", "import signal, sys; signal.signal(2, signal.default_int_handler); "),
    ]
    command[-1] += f"sys.argv[:] = sys.argv[1:]; sys.path.insert(0, {str(HERE.parent)!r}); "
    command[-1] += "from oat_dist.train import main; sys.exit(main())"
    arguments = [
        *("train", str(tmp_path / "config.yaml"), f"data.path={digits['train'].folder.parent}", f"output_dir={run}"),
        *("epochs=400", "eval.every_epochs=0", f"job.outcome_file={outcome}", "job.check_seconds=0.1"),
    ]
    (process,) = start([*command, *arguments], 1, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 90
        while not outcome.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        stop([process])
    assert process.returncode == 0, stderr
    state, step, total = outcome.read_text().split()
    assert (state, total) == ("stopped", str(400 * 30))
    assert f"stopped   at step {int(step):,} of 12,000 (SIGINT), saved as {run}/checkpoints/step-{step}" in stdout
    assert "next      the same command goes on from there" in stdout
    assert f"stopping at step {int(step):,} (SIGINT): saving" in stderr
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["reason"], last["step"]) == ("stopped", "SIGINT", int(step))
    assert (run / "checkpoints" / "latest").read_text() == f"step-{step}\n"


@pytest.mark.parametrize(
    ("arguments", "state"),
    [
        (["batch_siz=3"], "refused 0 0"),
        (["optim.lr=1e30", "pretrain_epochs=0", "anchor.center=logits"], "refused 0 0"),  # a retry would diverge too
        (["data.path=nowhere"], "failed 0 0"),  # a file system may come back
        (["max_steps=2"], "finished 2 2"),
    ],
)
def test_how_a_run_ended_is_left_in_one_line(
    tmp_path: Path, digits: dict[str, ShardSet], arguments: list[str], state: str
) -> None:
    (tmp_path / "config.yaml").write_text(BASE)
    outcome = tmp_path / "outcome"
    given = [
        *(str(tmp_path / "config.yaml"), f"data.path={digits['train'].folder.parent}", "data.eval_split=null"),
        *(f"output_dir={tmp_path / 'run'}", *arguments, f"job.outcome_file={outcome}"),
    ]
    run_ranks(1, "stopping_checks:command", *given)
    assert outcome.read_text() == state + "\n"


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_is_cut_short_and_made_up_for(tmp_path: Path, digits: dict[str, ShardSet], world: int) -> None:
    """An evaluation may take longer than the grace period. What it would have said, the next start finds out."""
    data = str(digits["train"].folder.parent)
    for found in run_ranks(world, "stopping_checks:cut_short", str(tmp_path), data):
        assert found["stopped"] == {"step": 30, "finished": False, "why": "the stop file appeared"}
        assert found["owed"] and found["finished"]
        assert found["best"][0] == found["best"][1]
    whole, cut = (records(tmp_path / name) for name in ("whole", "cut"))
    assert [line for line in cut if "protocol" in line] == [line for line in whole if "protocol" in line]
    assert len({line["step"] for line in whole if "protocol" in line}) == 2
    for name in ("best", "latest"):
        assert len({(tmp_path / run / "checkpoints" / name).read_text() for run in ("whole", "cut")}) == 1
