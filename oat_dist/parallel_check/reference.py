"""One process on the joined batches: the textbook formulas and plain autograd, none of `OATLoss`, no engine."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from oat_dist.anchor import anchor_targets, batch_anchor
from oat_dist.batch import Batch
from oat_dist.config import Config
from oat_dist.data.loader import TrainLoader
from oat_dist.data.plan import fingerprint
from oat_dist.data_parts import DataParts, build_data
from oat_dist.engine import Engine
from oat_dist.errors import not_finite
from oat_dist.parallel_check.distance import distance, start_file, weights_file
from oat_dist.parallel_check.job import Job, Rows
from oat_dist.parallel_check.network import calibrate, digest, quieten, wake_head
from oat_dist.parts import build_criterion, build_network, build_objectives, optimizer_for

__all__ = ["NO_CLIP", "run_reference"]

NO_CLIP = 1e30  # the norm is reported, the gradient left as it is


def run_reference(engine: Engine, job: Job, config: Config, folder: Path) -> None:
    """Leave the weights to start from, those after the steps of every reference, and reference.json.

    Raises:
        TrainingError: losses that are not finite, or weights that do not move.
    """
    data = build_data(config, engine.world)
    built, lines = build_network(config, len(data.train_set.classes), engine)
    built_digest = digest(built)
    notes = [*(line.removeprefix("note: ") for line in lines), *quieten(built)]
    network = built.to(engine.world.device)
    batches = [_joined(data, *batch) for batch in job.batches]
    if config.model.weights is None:
        calibrate(network, data.images(batches[0]))
    notes += wake_head(network)
    save_file(_plain(network.state_dict()), start_file(folder))

    reference = _Reference(job, config, data, network, batches)
    runs = []
    for number, sets in enumerate(job.references):
        trained, record = reference.train(sets)
        save_file(_plain(dict(trained.named_parameters())), weights_file(folder, number))
        runs.append(record)
    # How far rounding alone goes: the same sums in another order.
    cut = [reference.train(job.references[0], pieces)[0] for pieces in (2, 3)]
    record = {
        "digest": built_digest,
        "device": engine.world.device.type,
        "notes": notes,
        "ids": [batch.ids_B.tolist() for batch in batches],
        "fingerprints": [
            fingerprint(epoch, start, batch.ids_B.numpy(), data.train_set.digest)
            for (epoch, start, _), batch in zip(job.batches, batches, strict=True)
        ],
        "runs": runs,
        "rounding": max(distance(dict(trained.named_parameters()), folder, 0) for trained in cut),
    }
    (folder / "reference.json").write_text(json.dumps(record))


class _Reference:
    def __init__(self, job: Job, config: Config, data: DataParts, network: nn.Module, batches: list[Batch]) -> None:
        self.job, self.config, self.data, self.network, self.batches = job, config, data, network, batches
        classes = len(data.train_set.classes)
        self.attached = build_criterion(config, classes).anchor_grad
        self.cross_entropy = build_objectives(config, data.train_set, build_criterion(config, classes))[0]

    def train(self, sets: list[list[Rows]], pieces: int = 1) -> tuple[nn.Module, dict[str, Any]]:
        """Every step from the initial weights; the network and what happened in each step."""
        network = copy.deepcopy(self.network)
        self.past: list[Tensor] = []  # anchors so far, for a running mean
        optimizer = optimizer_for(self.config, network)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        record: dict[str, Any] = {"loss": [], "norm": [], "anchors": []}
        for step, batch in enumerate(self.batches):
            images_BCHW = self.data.images(batch)
            logits_BC = torch.cat([network(piece) for piece in images_BCHW.chunk(pieces)])
            loss, anchors = self._loss(logits_BC, batch, sets[step])
            if not math.isfinite(loss.item()):
                raise not_finite(
                    f"the loss of the one-process reference is not finite at step {step + 1} of {len(self.batches)}, "
                    "so there is nothing to compare with; lower optim.lr or --steps, or bound the targets with "
                    "anchor.floor or anchor.center=probabilities"
                )
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), self.config.optim.clip_norm or NO_CLIP)
            optimizer.step()
            optimizer.zero_grad()
            record["loss"].append(loss.item())
            record["norm"].append(norm.item())
            record["anchors"].append({f"{rows[0]}-{rows[1]}": a.tolist() for rows, a in anchors})
        return network, record

    def _loss(self, logits_BC: Tensor, batch: Batch, sets: list[Rows]) -> tuple[Tensor, list[tuple[Rows, Tensor]]]:
        valid_B = batch.every_valid().to(logits_BC.device)
        labels_B = batch.labels_B.to(logits_BC.device)
        samples = max(batch.num_valid, 1)
        if self.job.objective == "cross_entropy":
            how = self.cross_entropy
            if how.offset_C is not None:
                logits_BC = logits_BC + how.offset_C.to(logits_BC)
            weight_C = None if how.weight_C is None else how.weight_C.to(logits_BC)
            smoothing = how.label_smoothing
            each_B = cross_entropy(logits_BC, labels_B, weight_C, reduction="none", label_smoothing=smoothing)
            return each_B[valid_B].sum() / samples, []
        settings = self.config.anchor
        total, anchors = logits_BC.new_zeros(()), []
        for rows in sets:
            here = slice(*rows)
            z_BC, y_B = logits_BC[here][valid_B[here]], labels_B[here][valid_B[here]]
            if len(z_BC) == 0:
                continue
            anchor_C = batch_anchor(z_BC, settings.center, settings.floor)
            if settings.momentum:  # by its definition, from all anchors so far
                self.past.append(anchor_C.detach())
                ages = torch.arange(len(self.past), dtype=anchor_C.dtype, device=anchor_C.device).flip(0)
                weights = settings.momentum**ages
                anchor_C = weights @ torch.stack(self.past) / weights.sum()
            anchors.append((rows, anchor_C.detach()))
            target_BC = anchor_targets(y_B, anchor_C if self.attached else anchor_C.detach())
            total = total + (z_BC - target_BC).square().sum()
        return total / (samples * logits_BC.shape[1]), anchors


def _joined(data: DataParts, epoch: int, start: int, stop: int) -> Batch:
    """A whole global batch."""
    assert isinstance(data.loader, TrainLoader)
    return data.loader.builder.build(data.loader.order(epoch).ids(start, stop), epoch)


def _plain(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
