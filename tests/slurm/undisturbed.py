"""What each rank does for test_jobs.py: the same trainings without a cluster, and without anything in their way."""

from __future__ import annotations

from pathlib import Path

from oat_dist.config import load_config
from oat_dist.engine import start_engine
from oat_dist.trainer import Trainer


def run(config: str, folder: str, trainings: dict[str, list[str]]) -> None:
    """Train with `config` and each of the overrides, in ``folder/<name>``."""
    engine = start_engine(threads=1)
    for name, overrides in trainings.items():
        Trainer(load_config(config, [*overrides, f"output_dir={Path(folder, name)}"]), engine).fit()
    engine.close()
