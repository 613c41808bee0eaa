"""Packing over `tar`, and verifying over `sha256sum` and decoding: ratios of wall time, side by side in one run.

    python benchmarks/packing.py cifar10-jpg.tar.gz              an archive is unpacked first, once
    python benchmarks/packing.py photos --work /scratch --repeats 5

INPUT is what `oat-dist pack imagefolder` takes, or a tar of it. Every repeat runs in turn, with a warm cache:

    tar        `tar cf` on the image files
    pack       the whole command in a new process, its start and the sync to disk included
    checksum   `sha256sum` of the packed shards, then every image decoded once out of them, in one process
    verify     verify_output of the packed set

The medians are printed with the CPU seconds of all processes, for on a busy machine wall time says little.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from oat_dist.data.images.decode import decode_rgb
from oat_dist.data.index import open_split
from oat_dist.data.integrity.verify import verify_output
from oat_dist.data.storage import ShardReader

PACK = Path(__file__).parents[1] / "shards" / "pack.py"


class Cost(NamedTuple):
    """Seconds of one side, of the clock and of all its processes' CPU time."""

    wall: float
    cpu: float


def measure(side: Callable[[], object]) -> Cost:
    cpu, started = cpu_seconds(), time.perf_counter()
    side()
    return Cost(time.perf_counter() - started, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def image_folder(source: Path, work: Path) -> Path:
    """`source`, or what an archive of that name holds."""
    if source.is_dir():
        return source
    folder = work / "images"
    folder.mkdir()
    run("tar", "xf", source, "-C", folder)
    return folder


def checksum_and_decode(packed: Path) -> None:
    run("sha256sum", *sorted(packed.glob("*/*.tar")))
    for folder in sorted(path.parent for path in packed.glob("*/manifest.json")):
        shards = open_split(folder)
        reader = ShardReader(shards)
        for sample in range(len(shards)):
            decode_rgb(reader.read(sample))
        reader.close()


def compare(images: Path, work: Path, repeats: int, workers: list[str]) -> dict[str, list[Cost]]:
    packed = work / "packed"
    sides: dict[str, Callable[[], object]] = {
        "tar": lambda: run("tar", "cf", work / "images.tar", "-C", images, "."),
        "pack": lambda: run(sys.executable, PACK, "imagefolder", images, packed, *workers),
        "checksum": lambda: checksum_and_decode(packed),
        "verify": lambda: verify_output(packed),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        shutil.rmtree(packed, ignore_errors=True)
        (work / "images.tar").unlink(missing_ok=True)
        for name, side in sides.items():
            os.sync()  # what one side has written must not be written while the next one is timed
            cost = measure(side)
            if repeat:  # the first one warms the cache
                costs[name].append(cost)
    return costs


def report(costs: dict[str, list[Cost]], one: str, other: str) -> None:
    for name in (one, other):
        wall, cpu = (statistics.median(values) for values in zip(*costs[name], strict=True))
        print(f"  {name:<10} {wall:7.2f} s   {cpu:7.2f} s of CPU")
    for what, place in (("wall time", 0), ("CPU time", 1)):
        ratios = [a[place] / b[place] for a, b in zip(costs[one], costs[other], strict=True)]
        print(f"  {one} / {other}, {what}: {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="INPUT", help="folder of images, or a tar of it")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where to write (default: the temporary folder)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of pack (default: its own choice)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        images = image_folder(args.input, Path(folder))
        workers = ["--workers", str(args.workers)] if args.workers else []
        costs = compare(images, Path(folder), args.repeats, workers)
    print(f"{args.input.name}, {args.repeats} repeats, {len(os.sched_getaffinity(0))} cores")
    report(costs, "pack", "tar")
    report(costs, "verify", "checksum")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
