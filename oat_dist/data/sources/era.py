"""ERA, aerial videos of 25 kinds of events (Mou et al., 2020): the middle frame of each, as its authors split them."""

from __future__ import annotations

from oat_dist.data.images.video import require_video_decoder
from oat_dist.data.sources.folders import VIDEOS, plan_folders
from oat_dist.data.sources.splits import PackPlan, SplitRequest, other_counts

__all__ = ["HELP", "plan_era"]

_CLASSES = 25
_PUBLISHED = {"train": 1_473, "test": 1_391}

HELP = """\
INPUT holds Train/<class>/*.mp4 and Test/<class>/*.mp4 as published (25 classes, 1,473 and 1,391 videos);
the middle frame of each video is packed, as PNG (needs: pip install 'oat_dist[video]')"""


def plan_era(input: str, *, splits: SplitRequest, seed: int) -> PackPlan:
    """Videos by class and split; their middle frames (`oat_dist.data.images.video`) are read only when packed.

    Raises:
        DataError: PyAV is missing, or the folder is not of this form (see `plan_folders`).
    """
    require_video_decoder()
    plan = plan_folders(input, VIDEOS, source="era", splits=splits, seed=seed, need_splits=True)
    if len(plan.classes) != _CLASSES:
        plan.notes.append(f"{len(plan.classes)} classes; ERA as published has {_CLASSES}")
    plan.notes.extend(other_counts("ERA", plan.splits, _PUBLISHED))
    return plan
