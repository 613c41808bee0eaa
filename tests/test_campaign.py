"""A small, seeded sample of the fault campaign (`make campaign` is the whole of it)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from campaign import harm, table
from campaign_faults import FAULTS
from campaign_run import Case, Run

from oat_dist.data.index import ShardSet

# The rest differ in nothing that these and test_kill.py do not have.
SAMPLES = {
    Case("ddp", "global", 2): [name for name in FAULTS if name not in ("all ranks die", "stop, grace too short")],
    Case("zero2", "device", 2): ["a rank dies", "asked to stop"],
}


@pytest.mark.parametrize("case", list(SAMPLES), ids=str)
def test_a_harmed_run_ends_as_the_undisturbed_one(tmp_path: Path, digits: dict[str, ShardSet], case: Case) -> None:
    if os.geteuid():
        pytest.skip("needs root: a small disk is mounted and filled")
    result = harm(case, tmp_path, digits["train"].folder.parent, SAMPLES[case], 100, seed=5)
    assert result["problems"] == []
    assert result["finished"] and result["faults"] == SAMPLES[case]
    assert "| lost runs | 0 |" in table([result]) and "| wrong resumes | 0 |" in table([result])


def test_the_campaign_finds_what_is_wrong(tmp_path: Path, digits: dict[str, ShardSet]) -> None:
    """The control: another run passed off as the harmed one, and a start that skips a whole checkpoint."""
    data = digits["train"].folder.parent
    calm, other = (
        Run(tmp_path / name, data, Case("ddp", "device", 2), 12, seed) for seed, name in enumerate(("calm", "other"))
    )
    calm.finish()
    other.finish()
    assert calm.problems == other.problems == []
    other.compare(calm)
    assert [problem.split(":")[0] for problem in other.problems] == [
        "the run did not end as the undisturbed one",
        "other losses or fingerprints",
    ]
    third = Run(tmp_path / "third", data, Case("ddp", "device", 2), 12)
    start = third.start()
    start.wait(lambda: False, "the run ends")
    third.check_resume(7, start)
    assert third.problems == ["start 1 went on from step 0, not from 7"]
