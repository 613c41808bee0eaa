"""A cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import MiniCluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[MiniCluster]:
    """A running Slurm of four nodes."""
    why_not = missing()
    if why_not is not None:
        pytest.skip(why_not)
    with MiniCluster(4) as cluster:
        print(f"Slurm on nodes {', '.join(cluster.nodes)}, processes tracked by {cluster.tracking}")
        yield cluster
