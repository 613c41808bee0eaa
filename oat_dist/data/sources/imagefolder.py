"""A folder of class folders of images: the layout that most people have."""

from __future__ import annotations

from oat_dist.data.sources.folders import IMAGES, plan_folders
from oat_dist.data.sources.splits import PackPlan, SplitRequest

__all__ = ["HELP", "plan_imagefolder"]

HELP = """\
INPUT holds train/ and val/ or test/, with one folder of images per class in each,
or the class folders themselves (then one split, or several with --split)"""


def plan_imagefolder(input: str, *, splits: SplitRequest, seed: int) -> PackPlan:
    """See `plan_folders`, also for the errors."""
    return plan_folders(input, IMAGES, source="imagefolder", splits=splits, seed=seed)
