"""One tiny real run, trained once a session: digits, one epoch of cross-entropy and one of OAT."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from oat_dist import train
from oat_dist.commands import pack
from oat_dist.data.index import ShardSet, open_split
from oat_dist.data.storage import ShardReader

CONFIG = """\
# Two epochs of the lightweight network on digits.
output_dir: {run}
epochs: 2
pretrain_epochs: 1
data:
  path: {data}
  mean: [0.5, 0.5, 0.5]
  std: [0.5, 0.5, 0.5]
optim:
  lr: 0.02
engine:
  threads: 1
"""


@dataclass(frozen=True)
class TinyRun:
    """The run folder, its packed data and its config; `pretrained` is the checkpoint from before OAT."""

    folder: Path
    data: Path
    config: Path

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step-*"))

    @property
    def pretrained(self) -> Path:
        return self.folder / "checkpoints" / f"step-{self.steps[0]}"

    @property
    def test_split(self) -> ShardSet:
        return open_split(self.data / "test")


@functools.cache
def _train(root: Path) -> TinyRun:
    run = TinyRun(root / "run", root / "packed", root / "config.yaml")
    assert pack.main(["digits", "-", str(run.data), "--workers", "1"]) == 0
    run.config.write_text(CONFIG.format(run=run.folder, data=run.data))
    assert train.main([str(run.config)]) == 0
    assert len(run.steps) == 2
    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    # Imported by several test files, each with a fixture of its own to pytest: the cache keeps it one training.
    root = tmp_path_factory.getbasetemp() / "tiny-run"
    root.mkdir(exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        return _train(root)


def image_files(shards: ShardSet, ids: range) -> list[bytes]:
    """The packed image files of some samples."""
    reader = ShardReader(shards)
    try:
        return [reader.read(number) for number in ids]
    finally:
        reader.close()
