"""Tars as others write them: webdataset's ShardWriter, img2dataset, tarfile."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (12, 9)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """Members in the order given, which may be any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_writer(folder: Path, count: int = 30, each: int = 12) -> list[bytes]:
    """Shards as the real webdataset.ShardWriter writes them: jpg, cls, json, txt. The images in their order."""
    folder.mkdir(parents=True)
    images = [picture(i, size=(12 + i % 5, 9)) for i in range(count)]
    with webdataset.ShardWriter(str(folder / "s-%06d.tar"), maxcount=each, verbose=0) as writer:
        for i, image in enumerate(images):
            facts = {"label": f"kind {i % 4}", "deep": {"list": [None, i % 2]}, "a.b": 5 - i % 3}
            writer.write({"__key__": f"part/{i:05d}", "jpg": image, "cls": i % 3, "json": facts, "txt": f"caption {i}"})
    return images


def img2dataset(folder: Path, failed: Sequence[int] = (2, 9), count: int = 12, each: int = 6) -> dict[int, bytes]:
    """Shards laid out as img2dataset does: jpg, json and txt of every download, json and txt of one that failed."""
    images = {i: picture(100 + i) for i in range(count) if i not in failed}
    for shard in range(0, count, each):
        members = []
        for i in range(shard, shard + each):
            key = f"{i // each:05d}{i % each:04d}"
            facts = {
                "caption": f"a photo {i}",
                "url": f"https://example.org/{i}.jpg",
                "key": key,
                "status": "success" if i in images else "failed_to_download",
                "error_message": None if i in images else "HTTP Error 404: Not Found",
                "width": 12 if i in images else None,
                "meta": {"species": ["ant", "bee"][i % 2] if i not in failed else "never seen"},
            }
            if i in images:
                members.append((f"{key}.jpg", images[i]))
            members += [(f"{key}.json", json.dumps(facts).encode()), (f"{key}.txt", facts["caption"].encode())]
        write_tar(folder / f"{shard // each:05d}.tar", members)
        (folder / f"{shard // each:05d}_stats.json").write_text("{}")
    return images
