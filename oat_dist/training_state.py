"""What a checkpoint holds of a training run, and how it comes back: the same for every engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oat_dist.checkpoint import Checkpoint, load_optimizer, optimizer_tensors, rng_tensors, set_rng
from oat_dist.distributed import World
from oat_dist.errors import CheckpointError, not_finite
from oat_dist.metrics import AnchorMean, Meter

__all__ = ["TrainingState"]


@dataclass(frozen=True)
class TrainingState:
    """The parts of a run that change while it trains."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    anchor_mean: AnchorMean
    meter: Meter
    world: World

    def check_finite(self, step: int, folder: Path) -> None:
        """Refuse to save a network that has diverged.

        Raises:
            TrainingError: on every rank, since all hold the same weights.
        """
        if not bool(torch.stack([parameter.isfinite().all() for parameter in self.network.parameters()]).all()):
            raise not_finite(
                f"the weights are not finite after step {step:,}, which is therefore not saved; lower optim.lr or set "
                f"optim.clip_norm; {folder} keeps its checkpoints from before"
            )

    def shared(self, facts: dict[str, Any], model_card: dict[str, Any]) -> dict[str, dict[str, Tensor] | str]:
        """Files that rank 0 writes. Every rank must call it: the stored anchor is reduced over all."""
        stored_C = self.anchor_mean.value(self.world)
        files: dict[str, dict[str, Tensor] | str] = {
            "model.safetensors": self.network.state_dict(),
            "model.json": json.dumps(model_card, indent=1) + "\n",
            "optimizer.safetensors": optimizer_tensors(self.optimizer, self.network),
            "state.json": json.dumps(facts, indent=1) + "\n",
        }
        if stored_C is not None:
            files["anchor.safetensors"] = {"anchor": stored_C}
        return files

    def own(self) -> dict[str, Tensor]:
        """What each rank writes for itself."""
        fingerprint = self.meter.fingerprint
        return {
            **rng_tensors(self.world.device),
            "anchor_running": self.anchor_mean.running_X,
            "anchor_finished": self.anchor_mean.finished_X,
            # Two halves: a 64-bit unsigned number does not fit an int64 tensor.
            "fingerprint": torch.tensor([fingerprint >> 32, fingerprint & 0xFFFFFFFF]),
        }

    def restore(self, checkpoint: Checkpoint, identity: dict[str, Any]) -> dict[str, Any]:
        """Load everything and return the facts it was saved with.

        Args:
            identity: facts that must be equal: digests of the data, precision.

        Raises:
            CheckpointError: the checkpoint was trained on other data or in another precision.
        """
        facts = checkpoint.json("state.json")
        if facts["precision"] != identity["precision"]:
            raise CheckpointError(
                f"{checkpoint.folder}: was trained in precision {facts['precision']}, and now it is "
                f"{identity['precision']}; launch it as before, or choose another output_dir"
            )
        for name in ("train_digest", "eval_digest"):
            if facts[name] != identity[name]:
                done = "trained" if name == "train_digest" else "evaluated"
                raise CheckpointError(
                    f"{checkpoint.folder}: was {done} on other data; set data.path to the same packed data set, "
                    "or choose another output_dir"
                )
        self.network.load_state_dict(checkpoint.tensors("model.safetensors"))
        load_optimizer(self.optimizer, self.network, checkpoint.tensors("optimizer.safetensors"))
        self._restore_own(checkpoint)
        return facts

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
            set_rng(parts[0], device)
