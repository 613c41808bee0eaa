"""What a checkpoint holds of a training run, and how it comes back: the same for every engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oat_dist.checkpoint import Checkpoint
from oat_dist.distributed import World
from oat_dist.ema import WeightAverage
from oat_dist.engine import Replica
from oat_dist.errors import CheckpointError, not_finite
from oat_dist.metrics import AnchorMean, Meter
from oat_dist.randomness import random_state, set_random_state

__all__ = ["TrainingState"]


@dataclass(frozen=True)
class TrainingState:
    """The parts of a run that change while it trains."""

    replica: Replica
    average: WeightAverage
    anchor_mean: AnchorMean
    meter: Meter
    world: World

    def check_finite(self, step: int, folder: Path) -> None:
        """Refuse to save a network that has diverged.

        Raises:
            TrainingError: on every rank.
        """
        if not self.replica.is_finite():
            raise not_finite(
                f"the weights are not finite after step {step:,}, which is therefore not saved; lower optim.lr or set "
                f"optim.clip_norm; {folder} keeps its checkpoints from before"
            )

    def shared(self, facts: dict[str, Any], model_card: dict[str, Any]) -> dict[str, dict[str, Tensor] | str]:
        """Files that rank 0 writes. Every rank must call it: each may hold a part of everything."""
        stored_C, weights = self.anchor_mean.value(self.world), self.replica.weights()
        averaged = self.average.decay is not None
        facts = facts | ({"ema_updates": self.average.updates} if averaged else {})
        files: dict[str, dict[str, Tensor] | str] = {
            "model.safetensors": self.average.of(weights),
            **({"raw.safetensors": weights} if averaged else {}),
            "model.json": json.dumps(model_card, indent=1) + "\n",
            "optimizer.safetensors": self.replica.optimizer_state(),
            "state.json": json.dumps(facts, indent=1) + "\n",
        }
        if stored_C is not None:
            files["anchor.safetensors"] = {"anchor": stored_C}
        return files

    def own(self) -> dict[str, Tensor]:
        """What each rank writes for itself."""
        fingerprint = self.meter.fingerprint
        return {
            **random_state(self.world.device),
            "anchor_running": self.anchor_mean.running_X,
            "anchor_finished": self.anchor_mean.finished_X,
            # Two halves: a 64-bit unsigned number does not fit an int64 tensor.
            "fingerprint": torch.tensor([fingerprint >> 32, fingerprint & 0xFFFFFFFF]),
        }

    def restore(
        self, checkpoint: Checkpoint, identity: dict[str, Any], other: str = "choose another output_dir"
    ) -> dict[str, Any]:
        """Load everything and return the facts it was saved with. Every rank must call it.

        Args:
            identity: facts that must be equal: digests of the data, precision.
            other: what to do where they are to differ.

        Raises:
            CheckpointError: the checkpoint was trained on other data or in another precision.
        """
        facts, model, optimizer_state = self.world.together(self._read, checkpoint, identity, other)
        updates = facts.get("ema_updates")  # None: what was saved as the model are the weights themselves
        weights = model if updates is None else self.world.together(checkpoint.tensors, "raw.safetensors")
        self.replica.load(weights, optimizer_state)
        self.average.load(model, updates or 0)
        self.world.together(self._restore_own, checkpoint)
        return facts

    def _read(
        self, checkpoint: Checkpoint, identity: dict[str, Any], other: str
    ) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        facts = checkpoint.json("state.json")
        if facts["precision"] != identity["precision"]:
            raise CheckpointError(
                f"{checkpoint.folder}: was trained in precision {facts['precision']}, and now it is "
                f"{identity['precision']}; launch it as before, or {other}"
            )
        for name in identity.keys() & {"train_digest", "eval_digest"}:
            if facts[name] != identity[name]:
                done = "trained" if name == "train_digest" else "evaluated"
                raise CheckpointError(
                    f"{checkpoint.folder}: was {done} on other data; set data.path to the same packed data set, "
                    f"or {other}"
                )
        return facts, checkpoint.tensors("model.safetensors"), checkpoint.tensors("optimizer.safetensors")

    def _restore_own(self, checkpoint: Checkpoint) -> None:
        """Sums that ranks keep for themselves: exactly at the same world size, else their total on rank 0."""
        files = sorted(path.name for path in checkpoint.folder.glob("rank-*.safetensors"))
        same = len(files) == self.world.size
        mine = [files[self.world.rank]] if same else files if self.world.is_main else []
        parts = [checkpoint.tensors(name) for name in mine]
        device = self.world.device
        for part in parts:
            high, low = part["fingerprint"].tolist()
            self.meter.fingerprint = (self.meter.fingerprint + (high << 32) + low) % 2**64
            self.anchor_mean.running_X += part["anchor_running"].to(device)
        self.anchor_mean.finished_X.copy_(checkpoint.tensors(files[0])["anchor_finished"])
        if same:
            set_random_state(parts[0], device)
