"""A checkpoint under evaluation: its network, and on what and how it is to be judged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from oat_dist.checkpoint import Checkpoint, chosen_checkpoint
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise
from oat_dist.data.index import ShardSet
from oat_dist.data_parts import open_location
from oat_dist.distributed import World
from oat_dist.errors import DataError, OatError
from oat_dist.evaluate import PRIOR_PROTOCOLS, PROTOCOLS, Outputs, judge
from oat_dist.model_card import judging
from oat_dist.predict import load_network, pipeline_of
from oat_dist.results import Evaluation
from oat_dist.run_folder import read_config

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """
    Attributes:
        center: of the OAT anchors; None for a network trained with cross-entropy alone.
        data, split: what it is evaluated on.
        cache: how remote shards are kept.
        grouping: seed and group_size of protocol "batch".
    """

    checkpoint: Checkpoint
    network: nn.Module
    card: dict[str, Any]
    stored_anchor_C: Tensor | None
    normalise: Normalise
    data: str
    split: str
    cache: dict[str, Any]
    grouping: dict[str, int]

    @classmethod
    def load(
        cls, run: Path, name: str | None, arguments: argparse.Namespace, world: World, *, data_of: Subject | None = None
    ) -> Subject:
        """The checkpoint `name` of `run` on the device; where `arguments` are silent, the run's configuration speaks.

        Args:
            data_of: on whose data it is evaluated; None: on its own.

        Raises:
            OatError: on every rank.
        """
        checkpoint = world.together(chosen_checkpoint, run, name)
        run_folder = checkpoint.folder.parent.parent
        data, split = arguments.data, arguments.split
        if data_of is not None:
            data, split = data_of.data, data_of.split
        grouping: dict[str, int] = {"seed": 0, "group_size": 32}
        cache: dict[str, Any] = {}
        try:
            config = world.together(read_config, run_folder)
            own, own_split = config["data"]["path"], config["data"]["eval_split"]
            if not isinstance(own, str) or not isinstance(own_split, str | None):
                raise OatError(f"{run_folder / 'config.yaml'}: damaged, data.path or data.eval_split is no text")
            data, split = data or own, split or own_split
            cache = {key: config["data"].get(key) for key in ("cache_dir", "cache_gb")}
            given = config.get("eval")
            given = given if isinstance(given, Mapping) else {}
            grouping |= {key: given[key] for key in grouping if type(given.get(key)) is int}
        except OatError as error:  # a checkpoint on its own will do where the command line says what it lacks
            if data is None or split is None:
                raise
            if world.is_main and (arguments.seed is None or arguments.group_size is None):
                print(f"note: {error}; protocol batch uses seed 0 and groups of 32", file=sys.stderr)
        if split is None:
            raise OatError(f"{run_folder}: the run has no data.eval_split; name one with --split")
        asked = {"seed": arguments.seed, "group_size": arguments.group_size}
        grouping |= {key: value for key, value in asked.items() if value is not None}
        network, card, stored_anchor_C = world.together(load_network, checkpoint)
        return cls(
            checkpoint,
            network.to(world.device),
            card,
            stored_anchor_C,
            Normalise(card["mean"], card["std"], world.device),
            data,
            split,
            cache,
            grouping,
        )

    @property
    def train_digest(self) -> str | None:
        """Of the data it was trained on, wherever that lies now; None where the checkpoint does not say."""
        return self.checkpoint.json("state.json").get("train_digest")

    @property
    def run_folder(self) -> Path:
        return self.checkpoint.folder.parent.parent

    @property
    def classes(self) -> list[str]:
        return self.card["classes"]

    @property
    def center(self) -> str | None:
        return self.card["center"] if self.card["objective"] == "oat" else None

    @property
    def pipeline(self) -> ImagePipeline:
        return pipeline_of(self.card)

    def protocols(self, given: bool) -> list[str]:
        """Those that apply; `given`: a class prior is named."""
        settings = judging(self.card)
        uneven = settings["shares_C"] is not None
        if self.center is None:
            ordinary = uneven and settings["adjusted"] != 0
            return ["argmax", *(["ordinary"] if ordinary else []), *(["balanced"] if uneven else [])]
        if self.center == "prior":
            return [*PROTOCOLS, *PRIOR_PROTOCOLS[: 1 + given]]
        return [*PROTOCOLS, *(["balanced"] if uneven else [])]

    def open_split(self, world: World) -> ShardSet:
        shards = world.together(partial(open_location, **self.cache), self.data, self.split)
        if shards.classes != self.classes:
            raise DataError(f"{shards.where}: its classes are not the {len(self.classes)} classes of the checkpoint")
        return shards

    def check_pair(self, first: Subject) -> None:
        """Raises:
        DataError: the two do not answer the same question.
        """
        if self.classes != first.classes:
            raise DataError(f"--against {self.run_folder}: its classes are not those of {first.run_folder}")

    def judge(
        self, outputs: Outputs, num_seeds: int, prior_C: Tensor | None, temperatures: Mapping[str, float]
    ) -> Evaluation:
        return judge(
            outputs,
            stored_anchor_C=self.stored_anchor_C,
            num_seeds=num_seeds,
            prior_C=prior_C if self.center == "prior" else None,
            temperatures=temperatures,
            **{**judging(self.card), **self.grouping},
        )

    def facts(self) -> dict[str, Any]:
        return {"checkpoint": str(self.checkpoint.folder), "split": self.split, **self.grouping}
