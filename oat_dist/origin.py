"""Where a run begins: at its own newest checkpoint, or as a copy of another run (`start_from`), or anew.

A copy shares what comes before with other arms of a comparison. With equal settings it is bit for bit the run that
never stopped; so what would break that is refused or, where it may be meant, noted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oat_dist.checkpoint import Checkpoint, CheckpointStore, find_checkpoint, verify
from oat_dist.config import Config
from oat_dist.errors import ConfigError, OatError
from oat_dist.run_folder import differing, read_config
from oat_dist.training_state import TrainingState

__all__ = ["Origin", "find_origin"]

# The order of the samples, and what the checkpoint is of.
_MUST_BE_EQUAL = ("seed", "batch_size", "data.mode", "data.shuffle_shards", "model.name", "optim.name")
# What does nothing in a cross-entropy epoch, or in training; a checkpoint takes the place of model.weights.
_OF_OAT = ("anchor.", "optim.oat_lr_scale", "pretrain_epochs")
_NO_MATTER = (*_OF_OAT, "eval.", "data.eval_", "data.crop_fraction", "model.weights")
# An accuracy that differs in one of these is no measure for this run's.
_JUDGED_BY = ("eval.", "data.eval_", "data.crop_fraction", "optim.ema")


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
        own: whether the checkpoint is the run's own.
        notes: what the user should know of it, line by line.
        facts: of a copy: what becomes of the other run's state.json.
        best_checkpoint: of a copy: the best one so far, where that is an older one.
    """

    checkpoint: Checkpoint
    own: bool
    notes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    best_checkpoint: Checkpoint | None = None

    def __str__(self) -> str:
        return f"{'resumed from' if self.own else 'began as a copy of'} {self.checkpoint.folder}"

    def restore(self, state: TrainingState, identity: dict[str, Any]) -> dict[str, Any]:
        """Load everything, and return the facts of the run that begins. Every rank must call it.

        Args:
            identity: of the run that begins; a copy may be evaluated on another split.

        Raises:
            CheckpointError: on every rank: trained on other data or in another precision, or of another network.
        """
        if self.own:
            return state.restore(self.checkpoint, identity)
        same = {name: identity[name] for name in ("train_digest", "precision")}
        return state.restore(self.checkpoint, same, "give another start_from") | self.facts

    def settle(self, store: CheckpointStore, best: dict[str, Any]) -> None:
        """Let the run's ``latest`` and ``best`` name what it has; a copy has saved itself before.

        Raises:
            CheckpointError: on every rank, when that cannot be written.
        """
        if self.best_checkpoint is not None:
            store.take(self.best_checkpoint)
        store.world.together(store.point, self.checkpoint, best.get("step"))


def find_origin(config: Config, store: CheckpointStore, steps_per_epoch: int, total_steps: int) -> Origin | None:
    """The same on all ranks; None: the run begins anew.

    Args:
        steps_per_epoch, total_steps: of the run that begins.

    Raises:
        CheckpointError: on every rank: the run has checkpoints, but all are damaged.
        ConfigError: on every rank: `start_from` holds nothing valid, or another seed, order or network; or it is beyond
            the cross-entropy epochs, and the settings of what follows them differ.
    """
    newest, damaged = store.newest()
    if newest is not None:
        return Origin(newest, True, [f"warning: passed over a checkpoint: {why}" for why in damaged])
    if config.start_from is None:
        return None
    world = store.world
    found = world.together(lambda: _copied(config, steps_per_epoch, total_steps) if world.is_main else None)
    return world.gather_objects(found)[0]


def _copied(config: Config, steps_per_epoch: int, total_steps: int) -> Origin:
    path = Path(config.start_from or "")
    where = f"start_from={path}"
    try:
        checkpoint = find_checkpoint(path)
        run = checkpoint.folder.absolute().parent.parent
        before = read_config(run)
        facts = checkpoint.json("state.json")
    except OatError as error:
        raise ConfigError(f"start_from: {error}; train that run first, or name another one") from error
    different = differing(before, config)
    order = {key: values for key, values in different.items() if key in _MUST_BE_EQUAL}
    if facts["steps_per_epoch"] != steps_per_epoch:
        order["steps an epoch"] = (facts["steps_per_epoch"], steps_per_epoch)
    if order:
        raise ConfigError(f"{where}: {_shown(order)}; set it as there, or give another start_from")
    step, earlier = checkpoint.step, "name an earlier checkpoint of it (RUN/checkpoints/step-<n>)"
    if step > total_steps:
        raise ConfigError(f"{where}: is at step {step:,}, and this run ends at {total_steps:,}; {earlier}")
    later = {key: values for key, values in different.items() if key.startswith((*_OF_OAT, "loss."))}
    shared_epochs = min(config.pretrain_epochs, *different.get("pretrain_epochs", (config.pretrain_epochs,)))
    if later and step > shared_epochs * steps_per_epoch:
        raise ConfigError(
            f"{where}: is at step {step:,}, beyond the cross-entropy epochs, and {_shown(later)}; set it as there, or "
            f"{earlier}"
        )
    if config.optim.schedule == "cosine" and before.get("epochs") != config.epochs:
        different["epochs"] = (before.get("epochs"), config.epochs)  # its length
    changed = {key: values for key, values in different.items() if not key.startswith(_NO_MATTER)}
    notes = [f"note: {checkpoint.folder} was trained otherwise: {_shown(changed)}"] if changed else []
    comparable = not any(key.startswith(_JUDGED_BY) for key in different)
    best, older = _best(checkpoint, run, facts["best"]) if comparable else ({}, None)
    due = bool(facts.get("evaluation_due")) and config.data.eval_split is not None
    mine = {"start_from": str(checkpoint.folder), "best": best, "evaluation_due": due}
    return Origin(checkpoint, False, notes, mine, older)


def _best(checkpoint: Checkpoint, run: Path, best: dict[str, Any]) -> tuple[dict[str, Any], Checkpoint | None]:
    """The best evaluation and its checkpoint, where that is another one; nothing once that is gone."""
    if not best or best["step"] == checkpoint.step:
        return best, None
    older = run / "checkpoints" / f"step-{best['step']}"
    return (best, Checkpoint(older)) if verify(older) is None else ({}, None)


def _shown(different: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}={there} there, {here} here" for key, (there, here) in different.items())
