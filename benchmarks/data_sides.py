"""All sides of one set of images, in the order of the table: peers, ours, the ceiling."""

from __future__ import annotations

from pathlib import Path

from benchmarks.data_measure import Side
from benchmarks.data_ours import ceiling, our_sides
from benchmarks.data_peers import peer_sides
from benchmarks.data_sets import ImageSet

__all__ = ["all_sides", "count_images"]


def all_sides(images: ImageSet, folder: Path) -> tuple[list[Side], dict[str, str]]:
    """The sides, and why some that there should be are missing; `folder` is for what they write."""
    peers, missing = peer_sides(images, folder)
    return [*peers, *our_sides(images), ceiling(images)], missing


def count_images(images: ImageSet, folder: Path) -> dict[str, int]:
    """What each side gives in one pass; all the same, or they could not be compared."""
    sides, _ = all_sides(images, folder)
    found = {}
    for side in sides:
        found[side.name] = side.run()
        side.close()
    return found
