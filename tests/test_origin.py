"""What a copy of another run takes over, and what it is refused for. (The training that follows: test_training.py.)"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oat_dist.checkpoint import CheckpointStore, find_checkpoint
from oat_dist.config import load_config, to_yaml
from oat_dist.config_keys import Config
from oat_dist.distributed import World
from oat_dist.errors import CheckpointError, ConfigError
from oat_dist.origin import Origin, find_origin
from oat_dist.training_state import TrainingState

STEPS = 10  # an epoch; 4 epochs of cross-entropy of 8
TOTAL = 80
DIGESTS = {"train_digest": "a", "eval_digest": "b", "precision": "no"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with checkpoints at steps 20, its best, 30 and 40."""
    folder = tmp_path / "run"
    store = CheckpointStore(folder / "checkpoints", World(), keep=9)
    (folder / "config.yaml").write_text(to_yaml(config(tmp_path, "run")))
    for step in (20, 30, 40):
        best = {"step": 20, "split": "test", "protocol": "argmax", "accuracy": 0.5}
        facts = {"step": step, "steps_per_epoch": STEPS, "best": best, "evaluation_due": True, **DIGESTS}
        files: dict[str, dict[str, Tensor] | str] = {
            "model.safetensors": {"weight": torch.full((2,), float(step))},
            "state.json": json.dumps(facts),
        }
        store.save(step, files, {}, step == 20)
    return folder


def config(tmp_path: Path, name: str, *overrides: str) -> Config:
    path = tmp_path / "base.yaml"
    path.write_text("{epochs: 8, pretrain_epochs: 4, data: {path: packed}}")
    return load_config(path, [f"output_dir={tmp_path / name}", *overrides])


def begin(tmp_path: Path, start_from: Path, *overrides: str, total: int = TOTAL, steps: int = STEPS) -> Origin | None:
    settings = config(tmp_path, "new", f"start_from={start_from}", *overrides)
    store = CheckpointStore(tmp_path / "new" / "checkpoints", World(), keep=2)
    return find_origin(settings, store, steps, total)


def test_a_copy_takes_over_what_still_holds(run: Path, tmp_path: Path) -> None:
    origin = begin(tmp_path, run)
    assert origin is not None and not origin.own and origin.notes == []
    assert origin.checkpoint.folder == run / "checkpoints" / "step-40"
    assert origin.facts["best"]["step"] == 20 and origin.facts["evaluation_due"]
    assert origin.facts["start_from"] == str(run / "checkpoints" / "step-40")
    earlier = begin(tmp_path, run / "checkpoints" / "step-20")
    assert earlier is not None and earlier.checkpoint.step == 20
    assert (earlier.facts["best"]["step"], earlier.best_checkpoint) == (20, None)
    # another measure: its best is none of ours
    for override in ("eval.group_size=8", "data.eval_split=val", "data.eval_split=null"):
        other = begin(tmp_path, run, override)
        assert other is not None and other.facts["best"] == {} and other.notes == []
    assert not other.facts["evaluation_due"]


def test_the_best_checkpoint_is_copied_too(run: Path, tmp_path: Path) -> None:
    origin = begin(tmp_path, run)
    assert origin is not None
    store = CheckpointStore(tmp_path / "new" / "checkpoints", World(), keep=1)
    store.save(40, {"state.json": "{}"}, {}, best=False)
    origin.settle(store, origin.facts["best"])
    assert (store.root / "latest").read_text() == "step-40\n" and store.best() == "step-20"
    copied = find_checkpoint(store.root / "step-20")
    assert torch.equal(copied.tensors("model.safetensors")["weight"], torch.full((2,), 20.0))
    store.save(50, {"state.json": "{}"}, {}, best=False)
    assert {path.name for path in store.root.glob("step-*")} == {"step-20", "step-50"}
    (run / "checkpoints" / "step-20" / "state.json").unlink()
    (tmp_path / "again").mkdir()
    again = begin(tmp_path / "again", run)
    assert again is not None and (again.facts["best"], again.best_checkpoint) == ({}, None)


def test_a_run_with_checkpoints_of_its_own_goes_on_from_those(run: Path, tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "new" / "checkpoints", World(), keep=1).save(3, {"state.json": "{}"}, {}, best=False)
    origin = begin(tmp_path, tmp_path / "gone", "seed=5")
    assert origin is not None and origin.own and origin.checkpoint.step == 3
    assert str(origin) == f"resumed from {tmp_path / 'new' / 'checkpoints' / 'step-3'}"


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["seed=1"], {}, "start_from=RUN: seed=0 there, 1 here; set it as there, or give another start_from"),
        (
            ["batch_size=64", "data.shuffle_shards=2"],
            {},
            "batch_size=32 there, 64 here; data.shuffle_shards=None there",
        ),
        (["model.name=wrn_28_10"], {}, "model.name=lightweight there"),
        (["optim.name=adamw"], {}, "optim.name=sgd there"),
        ([], {"steps": 11}, "steps an epoch=10 there, 11 here"),
        (["epochs=3", "pretrain_epochs=3"], {"total": 30}, "is at step 40, and this run ends at 30; name an earlier"),
        (
            ["pretrain_epochs=3"],
            {},
            "is at step 40, beyond the cross-entropy epochs, and pretrain_epochs=4 there, 3 here",
        ),
    ],
)
def test_what_would_not_go_on_is_refused(
    run: Path, tmp_path: Path, overrides: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message.replace("RUN", str(run)))):
        begin(tmp_path, run, *overrides, **options)


def test_what_may_be_meant_is_noted(run: Path, tmp_path: Path) -> None:
    allowed = begin(tmp_path, run, "anchor.scope=global", "pretrain_epochs=6", "model.weights=none.safetensors")
    assert allowed is not None and allowed.notes == []  # nothing of it has acted before step 40
    noted = begin(tmp_path, run, "optim.lr=0.5", "optim.schedule=cosine", "epochs=9")
    assert noted is not None and len(noted.notes) == 1
    assert noted.notes[0].startswith(f"note: {run / 'checkpoints' / 'step-40'} was trained otherwise: ")
    assert "optim.lr=0.001 there, 0.5 here" in noted.notes[0] and "epochs=8 there, 9 here" in noted.notes[0]


def test_a_start_from_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "no valid checkpoint in this run folder"),
        (run / "checkpoints" / "step-7", "no such folder"),
    ):
        with pytest.raises(ConfigError, match=f"start_from: .*{reason}.*; train that run first"):
            begin(tmp_path, path)
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"not a run folder, config\.yaml is missing"):
        begin(tmp_path, run)
    with pytest.raises(ConfigError, match="start_from is output_dir itself"):
        config(tmp_path, "run", f"start_from={run}")


@pytest.mark.parametrize(("fact", "reason"), [("precision", "in precision no"), ("train_digest", "on other data")])
def test_other_data_and_precision_are_refused_with_this_remedy(
    run: Path, tmp_path: Path, fact: str, reason: str
) -> None:
    origin = begin(tmp_path, run)
    assert origin is not None
    nothing: Any = None  # it is refused before anything is loaded into them
    state = TrainingState(*[nothing] * 5, World())
    with pytest.raises(CheckpointError, match=f"was trained {reason}.* or give another start_from"):
        origin.restore(state, {**DIGESTS, fact: "x"})
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):  # another evaluation split is not refused
        origin.restore(state, {**DIGESTS, "eval_digest": "x"})
