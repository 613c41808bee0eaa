"""Every kind of network through every export, compared with the original on photos one at a time.

The weights are random (BatchNorm has seen some of the photos): this is about graphs and arithmetic, not accuracy.

    python benchmarks/exports.py packed/photos/val
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from oat_dist import OATClassifier
from oat_dist.data.index import ShardSet, open_split
from oat_dist.errors import OatError, run_command
from oat_dist.export.check import split_images
from oat_dist.export.formats import FORMATS
from oat_dist.export.write import export_model
from oat_dist.models import build_model, head_parameters

NETWORKS = (
    ("lightweight", 32),
    ("wrn_28_10", 32),
    ("squeezenet1_1", 224),
    ("resnet18", 224),
    ("mobilenet_v3_small", 224),
    ("vit_b_16", 224),
    ("timm/tf_efficientnet_lite0", 224),
)


def random_model(name: str, size: int, shards: ShardSet, objective: str) -> OATClassifier:
    """A network that nobody has trained, with outputs of the size that OAT's have."""
    torch.manual_seed(0)
    network = build_model(name, 10, image_size=size)
    card = {"name": name, "classes": [f"class {k}" for k in range(10)], "image_size": size}
    card |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop": "center_crop"}
    card |= {"objective": objective, "center": "probabilities", "floor": 0.0}
    anchor_C = torch.linspace(0.05, 0.15, 10) if objective == "oat" else None
    model = OATClassifier(network, card, anchor_C)
    images = torch.from_numpy(np.stack(list(split_images(model, shards, 16))))
    with torch.no_grad():
        for key, value in network.named_parameters():
            if key in head_parameters(network):
                value.normal_(0, 0.05)  # a vision transformer's begins at zero
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = None  # its statistics become those of the one batch that it sees
        network.train()
        network(model.normalise(images))
        network.eval()
    return model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path, help="a packed split of photos")
    parser.add_argument("--network", action="append", help="NAME or NAME:SIZE instead of these seven; repeatable")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--objective", choices=["oat", "cross_entropy"], default="oat")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    shards, failed = open_split(arguments.split), 0
    asked = [entry.partition(":") for entry in arguments.network or ()]
    networks = [(name, int(size or 224)) for name, _, size in asked] or NETWORKS
    print(f"{'network':<28} {'size':>4} {'seconds':>8}  format    difference of scores, probabilities, labels")
    for name, size in networks:
        started = time.monotonic()
        try:
            model = random_model(name, size, shards, arguments.objective)
            images = split_images(model, shards, arguments.images)
            with tempfile.TemporaryDirectory() as folder:
                found = export_model(model, Path(folder) / "out", FORMATS, images, images_are="photos")
        except OatError as error:
            failed += 1
            print(f"{name:<28} {size:>4} failed: {error}")
            continue
        seconds = time.monotonic() - started
        for form, one in found.items():
            numbers = f"{one.score:.1e}, {one.probability:.1e}, {one.different}"
            print(f"{name:<28} {size:>4} {seconds:>8.1f}  {form:<9} {numbers}")
        sys.stdout.flush()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
