"""Where images come from: each source examines its input and gives a `PackPlan`, writing nothing.

A source is a function `(input, *, splits, seed) -> PackPlan`; adding one here makes it known to `pack`.
"""

from __future__ import annotations

from typing import Protocol

from oat_dist.data.sources.digits import plan_digits
from oat_dist.data.sources.imagefolder import plan_imagefolder
from oat_dist.data.sources.splits import PackPlan, SplitRequest, parse_splits

__all__ = ["SOURCES", "PackPlan", "Source", "SplitRequest", "parse_splits"]


class Source(Protocol):
    """Examine `input` (a path, or "-") and plan its packing; raises `DataError` for anything unusable."""

    def __call__(self, input: str, *, splits: SplitRequest, seed: int) -> PackPlan: ...


SOURCES: dict[str, Source] = {"imagefolder": plan_imagefolder, "digits": plan_digits}
