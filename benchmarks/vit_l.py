"""Part of `make vit-l`: print a run's steps, and load its weights with safetensors into torchvision's own vit_l_16."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file

from oat_dist.config import load_config


def main() -> int:
    run = Path(sys.argv[1])
    batch = load_config(run / "config.yaml").batch_size
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            print(f"step {line['step']}: loss {line['loss']:.4f}, {batch / line['samples_per_s']:.1f} s")
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    card = json.loads((checkpoint / "model.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    model = torchvision.models.vit_l_16(num_classes=len(card["classes"]), image_size=card["image_size"])
    model.load_state_dict(weights)
    whole = all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in weights.values())
    elements = sum(value.numel() for value in weights.values())
    print(f"{elements:,} weights load into torchvision's vit_l_16; {'all' if whole else 'NOT all'} are finite fp32")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
