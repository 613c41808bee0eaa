"""oat_dist: exact distributed Online Anchor-based Training (OAT) of image classifiers.

The public names load on first use, so that `import oat_dist` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oat_dist.anchor import anchor_targets, batch_anchor, invert
    from oat_dist.data.packing import write_shards
    from oat_dist.data.packing.samples import Sample
    from oat_dist.oat_loss import OATLoss
    from oat_dist.predict import OATClassifier

__all__ = ["OATClassifier", "OATLoss", "Sample", "anchor_targets", "batch_anchor", "invert", "write_shards"]

_HOMES = {
    "OATClassifier": "oat_dist.predict",
    "OATLoss": "oat_dist.oat_loss",
    "Sample": "oat_dist.data.packing.samples",
    "anchor_targets": "oat_dist.anchor",
    "batch_anchor": "oat_dist.anchor",
    "invert": "oat_dist.anchor",
    "write_shards": "oat_dist.data.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'oat_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
