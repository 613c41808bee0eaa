"""A process that stands still says where, and ends; real processes, since what is tested is their end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

from oat_dist.data.index import ShardSet
from oat_dist.watchdog import HUNG

_SCRIPT = """
import ctypes, sys, time
from oat_dist.watchdog import Watchdog

watchdog = Watchdog(seconds=0.6, rank=3, grace=0.1)

def stand_still():
    {hang}

with watchdog.watching():
    for step in range(4):
        watchdog.beat(f"taking step {{step}}")
        time.sleep(0.3)  # together longer than the limit
    stand_still()
print("went on")
"""


def run(hang: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(hang=hang)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_that_moves_is_left_alone() -> None:
    done = run("pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_a_hang_ends_with_the_stack_of_every_thread() -> None:
    done = run("time.sleep(60)")
    assert done.returncode == HUNG == 75
    lines = done.stderr.splitlines()
    assert all(line.startswith("[rank 3] ") for line in lines)
    assert "error: no sign of life for 0.6 s (engine.timeout_minutes) while taking step 3" in lines[0]
    assert any("in stand_still" in line for line in lines)


def test_a_hang_that_keeps_the_interpreter_locked_ends_too() -> None:
    """Foreign code that never lets another thread run: Python's own watcher cannot come to its turn."""
    done = run("ctypes.PyDLL(None).sleep(60)")
    assert done.returncode == 1
    assert "most recent call first" in done.stderr and "in stand_still" in done.stderr


def test_every_rank_of_a_training_that_hangs_says_where(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """Rank 1 stands still; rank 0 waits for it in a collective."""
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, "stopping_checks:hang", str(tmp_path), str(digits["train"].folder.parent), timeout=120)
    said = str(caught.value)
    assert f"ended with [{HUNG}, {HUNG}]" in said
    for rank in (0, 1):
        assert f"[rank {rank}] error: no sign of life for 3 s" in said
        assert f"[rank {rank}] Thread" in said or f"[rank {rank}] Current thread" in said
    culprit = [line for line in said.splitlines() if "in never_ends" in line]
    assert culprit and all(line.startswith("[rank 1]") for line in culprit)
    assert "while training after step 4" in said
