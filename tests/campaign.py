"""The fault campaign: ``make campaign``. Real runs are harmed at random moments, from a seed, until there were enough
faults; then each is left alone, must finish, and must be the run that nobody harmed, bit by bit.

A **lost run** is one that does not finish when left alone. A **wrong resume** is anything else that must not be: a
start that goes on from another checkpoint than the newest whole one, a step with another loss or other samples than in
the undisturbed run, other final weights, damage that is not named, a request to stop that ends without a save.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from campaign_faults import FAULTS, small_disk
from campaign_run import Case, Run

from oat_dist.commands import pack
from oat_dist.stopping import sigterm_unwinds

CASES = (
    Case("ddp", "device", 2),
    Case("ddp", "global", 3),
    Case("zero1", "global", 2),
    Case("zero2", "device", 2),
    Case("zero3", "global", 2),
)


def harm(case: Case, root: Path, data: Path, faults: list[str], steps: int, seed: int) -> dict[str, Any]:
    """One run through `faults`, in this order; what came of it."""
    chance = random.Random(f"{seed} {case}")
    calm, run = (Run(root / name, data, case, steps) for name in ("calm", "harmed"))
    calm.finish()
    done: list[str] = []
    with small_disk(run.folder.parent):
        for name in faults:
            if run.newest() >= steps:
                break
            FAULTS[name](run, chance)
            done.append(name)
            print(f"  {case}: {name}, then at step {run.newest()}", file=sys.stderr, flush=True)
        run.finish()
        finished = run.newest() == steps
        if finished:
            run.compare(calm)
    return {
        "case": str(case),
        "faults": done,
        "starts": run.starts,
        "finished": finished,
        "problems": calm.problems + run.problems,
    }


def table(results: list[dict[str, Any]]) -> str:
    """As Markdown."""
    kinds = [name for name in FAULTS if any(name in result["faults"] for result in results)]
    lines = [f"| | {' | '.join(result['case'] for result in results)} |", "| --- |" + " --- |" * len(results)]
    for kind in kinds:
        lines.append(f"| {kind} | {' | '.join(str(Counter(r['faults'])[kind]) for r in results)} |")
    lines.append(f"| **faults** | {' | '.join(str(len(r['faults'])) for r in results)} |")
    lines.append(f"| starts | {' | '.join(str(r['starts']) for r in results)} |")
    lines.append(f"| lost runs | {' | '.join(str(int(not r['finished'])) for r in results)} |")
    lines.append(f"| wrong resumes | {' | '.join(str(len(r['problems'])) for r in results)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the order of faults (default 0)")
    parser.add_argument("--faults", type=int, default=12, help="of each run (default 12, 60 in all)")
    parser.add_argument("--minutes", type=float, default=30, help="begin no further run after these (default 30)")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    arguments = parser.parse_args()
    if os.geteuid():
        parser.error("must be run as root: it mounts a small disk, and fills it")
    started, results = time.monotonic(), []
    with sigterm_unwinds(), tempfile.TemporaryDirectory(prefix="oat-campaign-") as folder:
        data = Path(folder) / "digits"
        if pack.main(["digits", "-", str(data), "--workers", "1"]):
            return 1
        for number, case in enumerate(CASES):
            if time.monotonic() - started > 60 * arguments.minutes:
                print(f"time is up: {case} and what follows were left out", file=sys.stderr)
                break
            chance = random.Random(arguments.seed * 1000 + number)
            kinds = list(FAULTS)
            faults = [*chance.sample(kinds, len(kinds)), *chance.choices(kinds, k=arguments.faults)]
            results.append(
                harm(case, Path(folder) / str(number), data, faults[: arguments.faults], 400, arguments.seed)
            )
    print(table(results))
    problems = [f"{result['case']}: {problem}" for result in results for problem in result["problems"]]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    total = sum(len(result["faults"]) for result in results)
    lost = sum(not result["finished"] for result in results)
    minutes = (time.monotonic() - started) / 60
    print(f"\n{total} faults in {minutes:.0f} minutes, seed {arguments.seed}: {lost} lost runs, {len(problems)} wrong")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(bool(lost or problems))


if __name__ == "__main__":
    sys.exit(main())
