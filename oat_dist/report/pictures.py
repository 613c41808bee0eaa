"""Images of a data set as they stand in the page: small ones as they are, photos as thumbnails, all in the page itself.

What reads shards is imported only here, when images are wanted; none of it needs torch.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from oat_dist.data.manifest import Manifest
from oat_dist.data.remote.fetch import is_url, join_location, local_path, shown
from oat_dist.errors import DataError
from oat_dist.files import sha256_bytes
from oat_dist.report.data import Run, lookup

if TYPE_CHECKING:
    from oat_dist.data.index import ShardSet

__all__ = ["Picture", "open_images", "pictures", "read_manifest"]

_TINY = 64  # longest side up to which an image is kept as it is, as PNG; the page enlarges its pixels
_THUMB = 160  # longest side of a photo's thumbnail


@dataclass(frozen=True)
class Picture:
    """An image as a data: URI; `tiny` ones are to be enlarged pixel by pixel."""

    uri: str
    width: int
    height: int
    tiny: bool


def read_manifest(run: Run, split: str, digest: Any, data: str | None) -> Manifest | str:
    """What a split of the run's data set holds, out of its manifest alone; or why that is not known.

    Args:
        digest: names the data exactly, as environment.json has it.
        data: another place where the data set lies; None: where the configuration says.
    """
    place = _place(run, data)
    if is_url(place):
        return _not_fetched(place)
    path = Path(local_path(place)) / split / "manifest.json"
    try:
        text = path.read_bytes()
        manifest = Manifest.from_json(text.decode(errors="replace"), path)
    except (OSError, ValueError, DataError) as error:  # ValueError: a path with a zero byte
        return _not_there(place, error)
    if isinstance(digest, str) and digest and sha256_bytes(text) != digest:
        return _another(place, split)
    return manifest


def open_images(run: Run, data: str | None) -> ShardSet | str:
    """The split that was evaluated, to read images of; or why there are none to show.

    Args:
        data: another place where the data set lies, maybe a URL; None: where the configuration says.
    """
    from oat_dist.data.index import open_split

    if run.predictions is None:
        return "there is no evaluation.safetensors, which says what the answer to each sample was"
    place = _place(run, data)
    if is_url(place) and data is None:
        return _not_fetched(place)
    split = run.predictions.split or str(lookup(run.config, "data.eval_split") or "test")
    try:
        shards = open_split(join_location(place, split) if is_url(place) else Path(local_path(place)) / split)
    except (OSError, ValueError, DataError) as error:  # ValueError: a path with a zero byte
        return _not_there(place, error)
    digest = run.predictions.digest or run.environment.get("eval_digest")
    if digest and shards.digest != digest:
        return _another(place, split)
    ids_N = run.predictions.ids_N
    if len(ids_N) and int(ids_N[-1]) >= shards.num_samples:
        return f"{_said(place)} has fewer samples than were evaluated"
    return shards


def pictures(shards: ShardSet, ids: Sequence[int]) -> list[Picture | None]:
    """Some images, in this order; None for one that cannot be read or decoded."""
    from oat_dist.data.images.decode import ImageError, decode_rgb
    from oat_dist.data.storage import ShardReader

    found: list[Picture | None] = []
    reader = ShardReader(shards)
    try:
        for sample_id in ids:
            try:
                found.append(_encode(Image.fromarray(decode_rgb(reader.read(sample_id)))))
            except (ImageError, DataError):
                found.append(None)
    finally:
        reader.close()
    return found


def _encode(image: Image.Image) -> Picture:
    tiny = max(image.size) <= _TINY
    buffer = io.BytesIO()
    if tiny:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((_THUMB, _THUMB), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=82, optimize=True)
    kind = "png" if tiny else "jpeg"
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{encoded}", *image.size, tiny)


def _place(run: Run, data: str | None) -> str:
    return data if data is not None else str(lookup(run.config, "data.path") or "")


def _said(place: str) -> str:
    """A place as the page may name it: a URL without its secrets, of a path its last part only."""
    if is_url(place):
        return shown(place)
    return f"the data set “{Path(place).name}”" if place else "the data set"


def _not_fetched(place: str) -> str:
    return (
        f"the data set lies at {shown(place)}, and nothing is fetched unless asked for: oat-dist report RUN --data URL"
    )


def _not_there(place: str, error: Exception) -> str:
    if not place:
        return "the configuration names no data set; name its place: oat-dist report RUN --data FOLDER"
    if isinstance(error, DataError) and not is_url(place) and Path(local_path(place)).is_dir():
        return f"{_said(place)} is damaged or lacks the split"
    return f"{_said(place)} is not where the configuration says; name its place: oat-dist report RUN --data FOLDER"


def _another(place: str, split: str) -> str:
    return f"split “{split}” of {_said(place)} is not the one this run used: its digest differs"
