"""What ranks do for test_photos.py: fine-tune real networks with real weights on real photos, through the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from oat_dist.config import load_config
from oat_dist.engine import start_engine
from oat_dist.trainer import Trainer

CONFIG = """\
epochs: 3
pretrain_epochs: 2
model: {freeze: body}
data: {image_size: 96, eval_split: val}
optim: {lr: 0.01, head_lr_scale: 2.0, clip_norm: 1.0}
anchor: {scope: global}
engine: {threads: 1}
checkpoint: {every_epochs: 0}
eval: {every_epochs: 0}
"""
NETWORKS = {
    "squeezenet1_1": ("squeezenet1_1.safetensors", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tf_efficientnet_lite0": ("tf_efficientnet_lite0.safetensors", (127 / 255,) * 3, (128 / 255,) * 3),
}


def fine_tune(root: str, photos: str, weights: str) -> dict[str, Any]:
    """Train the heads of both networks, and the whole of SqueezeNet for a few steps, and say what moved."""
    path = Path(root) / "photos.yaml"
    engine = start_engine(threads=1)
    if engine.world.is_main:
        path.write_text(CONFIG)
    engine.world.all_agree(True)
    found: dict[str, Any] = {}
    for name, (file, mean, std) in NETWORKS.items():
        run = Path(root) / name
        overrides = [
            f"output_dir={run}",
            f"data.path={photos}",
            f"model.name={name}",
            f"model.weights={weights}/{file}",
        ]
        overrides += [f"data.mean={list(mean)}", f"data.std={list(std)}"]
        trainer = Trainer(load_config(path, overrides), engine)
        trainer.fit()
        given = load_file(Path(weights) / file)
        if engine.world.is_main:
            end = load_file(
                run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "model.safetensors"
            )
            same = [key for key, value in end.items() if key in given and given[key].shape == value.shape]
            moved = [key for key in same if not torch.equal(end[key], given[key])]
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            found[name] = {
                "kept": len(same) - len(moved),
                "moved": moved,
                "new": sorted(end.keys() - set(same)),
                "losses": [(line["phase"], line["loss"]) for line in lines if "loss" in line],
                "judged": json.loads((run / "evaluation.json").read_text())["total"],
                "notes": trainer.notes,
            }
    engine.close()
    return found
