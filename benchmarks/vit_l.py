"""Part of `make vit-l`: print a run's steps, and load its weights with safetensors into torchvision's own vit_l_16."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file


def main() -> int:
    run = Path(sys.argv[1])
    batch = json.loads((run / "environment.json").read_text())
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            print(f"step {line['step']}: loss {line['loss']:.4f}, {batch / line['samples_per_s']:.1f} s")
    file = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "model.safetensors"
    weights = load_file(file)
    model = torchvision.models.vit_l_16(num_classes=len(weights["heads.head.bias"]))
    model.load_state_dict(weights)
    finite = all(bool(value.isfinite().all()) for value in weights.values())
    whole = {value.dtype for value in weights.values()} == {torch.float32}
    elements = sum(value.numel() for value in weights.values())
    print(f"{file.name}: {elements:,} weights load into torchvision's vit_l_16, finite: {finite}, fp32: {whole}")
    return 0 if finite and whole else 1


if __name__ == "__main__":
    sys.exit(main())
