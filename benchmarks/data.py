"""Our data path beside its peers, on one core: microseconds of CPU an image, all sides in one run.

    make bench-data          (or: python benchmarks/data.py [--data FOLDER] [--samples 1024] [--repeats 3])

FOLDER holds cifar10-jpg.tar.gz (train/<class>/*.jpg) and hymenoptera.tar (train|val/<class>/*.jpg); default:
$OAT_TEST_DATA. Every set is written to a temporary folder as files and as one tar of ours, so that all sides read the
same JPEGs, from the page cache. One thread on one core; the sides run in turn (A B C A B C ...), and a ratio is taken
within each repeat: median (smallest-largest). CPU time is that of the whole process, all threads together.

mosaicml-streaming and DALI are measured where they are installed, and listed as missing where not. They are no
dependency of ours; in a folder of their own:

    pip install --target FOLDER mosaicml-streaming nvidia-dali-cuda120 nvidia-nvimgcodec-cu12
    PYTHONPATH=FOLDER python benchmarks/data.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.data_goals import READING, STEPS, goals, show_goals
from benchmarks.data_measure import Side, Timing, measure, one_core, ratios, spread
from benchmarks.data_ours import CEILING, OURS, READ, read_side
from benchmarks.data_peers import AT_RANDOM, IN_ORDER, RECIPE, reading_sides
from benchmarks.data_sets import ImageSet, cifar10, photos
from benchmarks.data_shares import shares
from benchmarks.data_sides import all_sides
from benchmarks.data_steps import IN_MEMORY, STEP_BATCH, step_sides
from oat_dist.errors import DataError

LEAST_SAMPLES = 64


@dataclass
class Report:
    """What was measured, by section."""

    repeats: int
    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self, section: str, sides: list[Side], *, times: int = 1) -> dict[str, Timing]:
        """`times`: so many times the repeats, for a ratio near one."""
        try:
            found = measure(sides, times * self.repeats, lambda text: say(f"{section}: {text}"))
        finally:
            for side in sides:
                side.close()
        self.timings[section] = found
        return found


def report_set(report: Report, images: ImageSet, folder: Path) -> None:
    """All sides of one set, their table, and where our time goes."""
    say(f"{images.name}: preparing the sides")
    sides, missing = all_sides(images, folder)
    report.missing |= missing
    timings = report.run(images.name, sides)
    assert len({timing.samples for timing in timings.values()}) == 1, "sides of one set give equally many images"
    print(f"\n{images.describe()}")
    print(f"  {'':<32}{'us CPU':>9}{'us wall':>9}{'images/s':>10}   {'x recipe':<22}of decode only")
    for name, timing in timings.items():
        cpu, wall = statistics.median(timing.cpu), statistics.median(timing.wall)
        recipe, of_ceiling = (spread(ratios(other.cpu, timing.cpu)) for other in (timings[RECIPE], timings[CEILING]))
        print(f"  {name:<32}{cpu:>9.1f}{wall:>9.1f}{1e6 / cpu:>10,.0f}   {recipe:<22}{of_ceiling}")
    for name, why in missing.items():
        print(f"  {name:<32}missing: {why}")
    parts = report.parts[images.name] = shares(images, report.repeats)
    print(f"  where the time of {OURS!r} goes: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items()))


def report_reading(report: Report, images: ImageSet) -> None:
    """The bytes of one sample."""
    timings = report.run(READING, [*reading_sides(images), read_side(images)])
    size = int(images.shards.index.length.mean())
    print(f"\nOne sample of {images.name}, {size:,} bytes, not decoded, out of a tar of {len(images.shards):,}")
    print(f"  {'':<32}{'us CPU':>12}   times as fast as the next one of webdataset, as one at random")
    for name in (IN_ORDER, AT_RANDOM, READ):
        timing = timings[name]
        ratio, random = (spread(ratios(timings[other].cpu, timing.cpu)) for other in (IN_ORDER, AT_RANDOM))
        print(f"  {name:<32}{statistics.median(timing.cpu):>12.2f}   {ratio:<24}{random}")


def report_steps(report: Report, images: ImageSet) -> None:
    """Training with a full cache, fed by us and from memory."""
    timings = report.run(STEPS, step_sides(images), times=3)
    print(
        f"\nOAT steps of the lightweight net on {images.name}, flip and pad_crop, batches of {STEP_BATCH}, epoch 3 on"
    )
    print(f"  {'':<32}{'us CPU':>9}{'us wall':>9}   {'as fast, CPU':<24}as fast, wall")
    for name, timing in timings.items():
        cpu, wall = statistics.median(timing.cpu), statistics.median(timing.wall)
        base = timings[IN_MEMORY]
        fast, fast_wall = spread(ratios(base.cpu, timing.cpu)), spread(ratios(base.wall, timing.wall))
        print(f"  {name:<32}{cpu:>9.1f}{wall:>9.1f}   {fast:<24}{fast_wall}")


def versions() -> str:
    """Of what is compared, as far as it is installed."""
    found = []
    for name in ("webdataset", "torchvision", "pillow", "simplejpeg", "mosaicml-streaming", "nvidia-dali-cuda120"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("OAT_TEST_DATA"),
        help="folder of the two archives (default: $OAT_TEST_DATA)",
    )
    parser.add_argument("--samples", type=int, default=4096, help="most images of a set (default 4096)")
    parser.add_argument("--repeats", type=int, default=7, help="counted repeats of each side (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all timings there too")
    asked = parser.parse_args()
    if asked.data is None:
        parser.error("say where the archives are: --data FOLDER, or set OAT_TEST_DATA")
    if asked.samples < LEAST_SAMPLES or asked.repeats < 1:
        parser.error(f"--samples must be at least {LEAST_SAMPLES}, --repeats at least 1")
    core = one_core()
    report = Report(asked.repeats)
    load = os.getloadavg()[0]
    print(
        f"{platform.processor() or platform.machine()}, core {core}, {asked.repeats} repeats, load average {load:.1f}"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="oat-bench-") as temporary:
            folder = Path(temporary)
            say("making the sets")
            small = cifar10(asked.data, folder / "cifar10", asked.samples)
            report_set(report, small, folder)
            report_reading(report, small)
            report_steps(report, small)
            for images in photos(asked.data, folder, asked.samples):
                report_set(report, images, folder)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    reached = goals(report.timings)
    show_goals(reached)
    if asked.json:
        asked.json.write_text(json.dumps({**asdict(report), "goals": [asdict(goal) for goal in reached]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
