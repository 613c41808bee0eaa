"""Real ImageNet weights, real photos, the normal way through the configuration, on two ranks.

A small sample of what docs/transfer.md reports: here only the heads are trained, on small images, to see that they
learn while nothing else moves.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from ranks import run_ranks

from oat_dist.commands import pack


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ants and bees, packed."""
    folder = os.environ.get("OAT_TEST_DATA")
    if not folder:
        pytest.skip("set OAT_TEST_DATA to the folder that holds hymenoptera.tar and the weights")
    root = tmp_path_factory.mktemp("photos")
    with tarfile.open(Path(folder) / "hymenoptera.tar") as archive:
        archive.extractall(root / "images", filter="data")
    [source] = [path.parent for path in (root / "images").rglob("train") if path.is_dir()]
    assert pack.main(["imagefolder", str(source), str(root / "packed"), "--workers", "1", "--on-bad", "skip"]) == 0
    return root / "packed"


def test_pretrained_heads_learn_on_two_ranks(photos: Path, tmp_path: Path) -> None:
    results = run_ranks(2, "photos_checks:fine_tune", str(tmp_path), str(photos), os.environ["OAT_TEST_DATA"])
    found = results[0]
    assert found.keys() == {"squeezenet1_1", "tf_efficientnet_lite0"}
    for name, one in found.items():
        assert one["moved"] == [], name  # the body is frozen, and so are its BatchNorm statistics
        assert one["kept"] > 40
        assert one["new"] and all(key.startswith(("classifier.",)) for key in one["new"])
        phases, losses = zip(*one["losses"], strict=True)
        assert phases == ("cross_entropy", "cross_entropy", "oat")
        assert losses[1] < losses[0], one  # it learns
        assert one["judged"] == 153
        notes = " ".join(one["notes"])
        assert "with a new head of 2 classes" in notes and "frozen: " in notes
        assert "was pretrained with" not in notes  # mean and std are the right ones
