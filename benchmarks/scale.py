"""What a split of 100 million samples costs to open and to plan: time, memory, Python objects, in a fresh process.

    python benchmarks/scale.py [FOLDER] [--samples 100000000] [--shards 10000]

Writes a synthetic split into FOLDER (default: a temporary one; 5 GB, removed at the end): a real index, streamed,
never in memory, and sparse tars of which only the sizes are real. Then a fresh process opens it, computes the
samples of rank 517 of 1,024 in steps all over the run, reads their rows, and orders windows of shards.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from oat_dist.data.hashing import keyed_hash
from oat_dist.data.index import INDEX_NAME, MANIFEST_NAME, Manifest, ShardInfo, open_split
from oat_dist.data.plan import EpochOrder, Layout, ShardWindows
from oat_dist.files import sha256_file

SHARD_BYTES = 256 << 20
CLASSES = 1000
NAME = "{:09d}.jpg"
CHUNK = 1 << 20
WORLD, RANK, BATCH = 1024, 517, 32768
TYPES = {"name_ends": "U64", "offset": "U64", "height": "U32", "label": "I32", "length": "U32", "shard": "U32"}
TYPES |= {"width": "U32", "name_bytes": "U8"}
KINDS = {"U64": np.uint64, "U32": np.uint32, "I32": np.int32, "U8": np.uint8}


def write_split(folder: Path, samples: int, shards: int, *, sparse: bool = False) -> None:
    """Write the synthetic split. `sparse`: rows are left out as holes, which read as zeros."""
    name_size = len(NAME.format(0))
    lengths = {name: samples * name_size if name == "name_bytes" else samples for name in TYPES}
    header, places, cursor = {}, {}, 0
    for name, kind in TYPES.items():
        end = cursor + lengths[name] * np.dtype(KINDS[kind]).itemsize
        header[name] = {"dtype": kind, "shape": [lengths[name]], "data_offsets": [cursor, end]}
        places[name], cursor = cursor, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    counts = np.zeros(shards, dtype=np.int64)
    with (folder / INDEX_NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + cursor)
        if sparse:
            counts[0] = samples
            file.seek(start + places["name_ends"] + 8 * (samples - 1))
            file.write((samples * name_size).to_bytes(8, "little"))
        for first in range(0, 0 if sparse else samples, CHUNK):
            ids = np.arange(first, min(first + CHUNK, samples))
            rows = _rows(ids, shards)
            counts += np.bincount(rows["shard"], minlength=shards)
            rows["name_ends"] = (ids + 1) * name_size
            rows["name_bytes"] = np.frombuffer("".join(map(NAME.format, ids.tolist())).encode(), dtype=np.uint8)
            for name, values in rows.items():
                column = values.astype(KINDS[TYPES[name]])
                file.seek(start + places[name] + first * (name_size if name == "name_bytes" else column.itemsize))
                file.write(column.tobytes())
    infos = []
    for number in range(shards):
        name = f"train-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            file.truncate(SHARD_BYTES)
        infos.append(ShardInfo(name, int(counts[number]), SHARD_BYTES, "0" * 64))
    index = folder / INDEX_NAME
    manifest = Manifest(
        split="train",
        source="synthetic",
        seed=0,
        classes=[f"class {k}" for k in range(CLASSES)],
        class_counts=[samples // CLASSES] * CLASSES,
        num_samples=samples,
        num_bytes=0,
        image_sizes={},
        shards=infos,
        index={
            "file": INDEX_NAME,
            "size": index.stat().st_size,
            "sha256": "0" * 64 if sparse else sha256_file(index),
        },
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())


def _rows(ids: np.ndarray, shards: int) -> dict[str, np.ndarray]:
    """As packers do, neighbours by name lie in shards all over the split."""
    draw = keyed_hash(ids, 0)
    return {
        "shard": draw % np.uint64(shards),
        "offset": (draw >> np.uint64(20)) % np.uint64(SHARD_BYTES // 2),
        "length": 20_000 + (draw >> np.uint64(40)) % np.uint64(10_000),
        "label": (draw >> np.uint64(30)) % np.uint64(CLASSES),
        "width": np.full(len(ids), 500),
        "height": np.full(len(ids), 375),
    }


def memory() -> dict[str, int]:
    """Of this process now, in bytes: what is resident, and which part of it is no mapped file."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {"resident": int(fields["Rss"].split()[0]) << 10, "own": int(fields["Anonymous"].split()[0]) << 10}


def grown(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds, bytes and Python objects that `work` took, and its result."""
    gc.collect()
    before, blocks, objects = memory(), sys.getallocatedblocks(), len(gc.get_objects())
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    gc.collect()
    after = {name: value - before[name] for name, value in memory().items()}
    taken = {"seconds": seconds, "blocks": sys.getallocatedblocks() - blocks}
    return {**taken, "objects": len(gc.get_objects()) - objects, **after}, result


def measure(folder: Path, windows: int) -> dict[str, Any]:
    """Open and plan the split in `folder`, in this process."""
    opened, shards = grown(lambda: open_split(folder))
    layout = Layout(BATCH, WORLD, micro_batch_size=32)
    steps = layout.steps(shards.num_samples)

    def ids_of(step: int, epoch: int) -> np.ndarray:
        start, stop = layout.batch_range(step, shards.num_samples)
        [parts] = layout.deal(stop - start)
        return EpochOrder(shards.num_samples, 7, epoch).ids(start + parts[RANK].start, start + parts[RANK].stop)

    wanted = [(step, epoch) for epoch in (0, 1, 89) for step in (0, 1, steps // 2, steps - 2)]
    times = []

    def plan() -> list[np.ndarray]:
        found = []
        for step, epoch in wanted:
            started = time.perf_counter()
            found.append(ids_of(step, epoch))
            times.append(time.perf_counter() - started)
        return found

    planned, found = grown(plan)
    planned["seconds a step"] = statistics.median(times)
    index = shards.index
    rows, _ = grown(lambda: [(index.label[ids], index.offset[ids], index.name(int(ids[0]))) for ids in found])
    result = {"samples": len(index), "open": opened, "plan": planned, "rows": rows}
    if windows:
        order = EpochOrder(shards.num_samples, 7, 3, ShardWindows(shards, windows))
        middle = shards.num_samples // 2
        result["a window of shards"], _ = grown(lambda: order.ids(middle, middle + 32))
        result["its next step"], _ = grown(lambda: order.ids(middle + 1024, middle + 1056))
    return result


def fresh(folder: Path, windows: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--measure", "--windows", str(windows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def forget(path: Path) -> None:
    """Drop the file from the page cache, as after a reboot."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(title: str, result: dict[str, Any]) -> None:
    print(f"\n{title}: {result.pop('samples'):,} samples")
    print(f"  {'':<20} {'seconds':>10} {'resident MiB':>13} {'own MiB':>9} {'Python objects':>15} {'blocks':>9}")
    for name, taken in result.items():
        print(
            f"  {name:<20} {taken['seconds']:>10.4f} {taken['resident'] / 2**20:>13.1f} {taken['own'] / 2**20:>9.1f} "
            f"{taken['objects']:>15,} {taken['blocks']:>9,}"
        )
    print(f"  ids of one step of rank {RANK} of {WORLD:,}: {result['plan']['seconds a step'] * 1e6:.0f} us (median)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write the split (default: a temporary folder)")
    parser.add_argument("--samples", type=int, default=100_000_000, help="default 100,000,000")
    parser.add_argument("--shards", type=int, default=10_000, help="default 10,000")
    parser.add_argument("--windows", type=int, default=64, help="shards that are shuffled together (default 64)")
    parser.add_argument("--measure", action="store_true", help="only measure the split in FOLDER, here, as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder, arguments.windows)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary) / "train"
        started = time.perf_counter()
        write_split(folder, arguments.samples, arguments.shards)
        size = (folder / INDEX_NAME).stat().st_size
        print(f"written in {time.perf_counter() - started:.0f} s: an index of {size / 1e9:.2f} GB")
        forget(folder / INDEX_NAME)
        show("index not in the page cache", fresh(folder, arguments.windows))
        show("again", fresh(folder, arguments.windows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
