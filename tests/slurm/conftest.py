"""A cluster for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import MiniCluster, missing, tracking


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniCluster]:
    """A running Slurm of four nodes."""
    why_not = missing()
    if why_not is not None:
        pytest.skip(why_not)
    with MiniCluster(4) as cluster:
        yield cluster


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing() is None and tracking() != "cgroup":
        terminalreporter.write_line(
            "slurm: no freezer control group here, so signals also reached children of processes"
        )
