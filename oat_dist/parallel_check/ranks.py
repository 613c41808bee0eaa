"""What each of the N ranks does: the same steps through the engine, as in training."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oat_dist.batch import Window
from oat_dist.config import Config
from oat_dist.data.loader import TrainLoader
from oat_dist.data_parts import DataParts, build_data
from oat_dist.distributed import counts
from oat_dist.engine import Engine
from oat_dist.engine.zero_config import BatchShape
from oat_dist.objectives import OAT, Objective
from oat_dist.parallel_check.distance import distance, start_file
from oat_dist.parallel_check.job import Case, Job, case_config
from oat_dist.parallel_check.network import digest, quieten
from oat_dist.parallel_check.reference import NO_CLIP
from oat_dist.parts import build_criterion, build_network, build_objectives, optimizer_for
from oat_dist.window_step import WindowStep

__all__ = ["run_rank"]


def run_rank(engine: Engine, job: Job, config: Config, folder: Path, name: str, with_controls: bool) -> None:
    """Measure every case on this rank, and the controls; leave <name>-<rank>.json.

    Raises:
        TrainingError: gradients that are not finite.
    """
    data = build_data(config, engine.world)
    network, _ = build_network(config, len(data.train_set.classes), engine)
    record: dict[str, Any] = {"digest": digest(network)}
    quieten(network)
    network.load_state_dict(load_file(start_file(folder)))
    rank = _Rank(engine, job, config, folder, network)
    record["cases"] = [rank.measure(case) for case in job.cases]
    record["controls"] = rank.controls() if with_controls else {}
    (folder / f"{name}-{engine.world.rank}.json").write_text(json.dumps(record))


class _Rank:
    def __init__(self, engine: Engine, job: Job, config: Config, folder: Path, network: nn.Module) -> None:
        self.engine, self.world = engine, engine.world
        self.job, self.config, self.folder, self.network = job, config, folder, network

    def controls(self) -> dict[str, Any]:
        """What wrong ways give with the configured layout."""
        first, found = self.job.cases[0], {}
        if self.job.wrong_scope is not None:
            what = "anchor of each rank" if self.job.wrong_scope == "device" else "one anchor over all ranks"
            found[what] = self.measure(first, scope=self.job.wrong_scope)
        found["one sample swapped"] = self.measure(first, swap=True)
        return found

    def measure(self, case: Case, scope: str | None = None, swap: bool = False) -> dict[str, Any]:
        """Take the steps; with `scope` under another anchor scope, with `swap` on one wrong sample."""
        config = case_config(self.config, case)
        data = build_data(config, self.world)
        objective = self._objective(config, data, scope)
        layout = data.loader.layout
        network = copy.deepcopy(self.network)
        replica = self.engine.prepare(
            network,
            optimizer_for(config, network),
            BatchShape(layout.largest_part, len(layout.deal(config.batch_size))),
            config.optim.clip_norm or NO_CLIP,
        )
        size = config.data.image_size
        replica.warm_up(torch.zeros(2, 3, size, size, device=self.world.device))

        losses: list[Tensor] = []
        anchors: list[list[list[float]]] = []

        def note(loss: Tensor) -> None:
            losses.append(loss.detach())
            anchors_GC = objective.anchors()
            anchors.append([] if anchors_GC is None else anchors_GC.tolist())

        step = WindowStep(replica, data.images, case.span, note)
        found: dict[str, Any] = {
            "ids": [],
            "fingerprints": [],
            "anchors": [],
            "loss": [],
            "norm": [],
            "collectives": [],
        }
        for window in data.loader.windows(0, len(self.job.batches)):
            if swap:
                window = self._swapped(window, data)
            before = counts.total()
            num_samples: int | Tensor = window.num_samples
            if config.data.on_bad == "skip":
                valid = torch.tensor(window.num_valid, device=self.world.device, dtype=torch.float64)
                num_samples = self.world.all_reduce(valid).clamp_(min=1)
            step.run(objective, window.batches, num_samples)
            found["collectives"].append(counts.total() - before)
            norm = replica.step(config.optim.lr)
            assert norm is not None
            found["norm"].append(norm.item())
            found["loss"].append(torch.stack(losses).sum().item())
            found["anchors"].append(list(anchors))
            found["ids"].append([[] if batch.empty else batch.ids_B.tolist() for batch in window.batches])
            found["fingerprints"].append(window.fingerprint)
            losses.clear()
            anchors.clear()
        weights = replica.weights()
        found["parameters"] = distance(weights, self.folder, case.reference) if self.world.is_main else None
        replica.close()
        data.close()
        return found

    def _objective(self, config: Config, data: DataParts, scope: str | None) -> Objective:
        num_classes = len(data.train_set.classes)
        if self.job.objective == "cross_entropy":
            return build_objectives(config, data.train_set, build_criterion(config, num_classes))[0]
        if scope is not None:
            config = dataclasses.replace(config, anchor=dataclasses.replace(config.anchor, scope=scope))
        return OAT(build_criterion(config, num_classes))

    def _swapped(self, window: Window, data: DataParts) -> Window:
        """The first sample of the global batch gives way to its last one, which is then seen twice."""
        if not self.world.is_main:
            return window
        loader = data.loader
        assert isinstance(loader, TrainLoader)
        _, stop = loader.layout.batch_range(window.step_in_epoch, data.train_set.num_samples)
        last = loader.builder.build(loader.order(window.epoch).ids(stop - 1, stop), window.epoch)
        first = window.batches[0]
        images_BHWC, labels_B = first.images_BHWC.clone(), first.labels_B.clone()
        images_BHWC[0], labels_B[0] = last.images_BHWC[0], last.labels_B[0]
        swapped = dataclasses.replace(first, images_BHWC=images_BHWC, labels_B=labels_B)
        return dataclasses.replace(window, batches=(swapped, *window.batches[1:]))
