"""What is said about a table, as text: the same for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oat_dist.experiments.plan import Options, Plan
from oat_dist.experiments.statistics import Mean, verdict
from oat_dist.experiments.summary import Results, Row, Times

__all__ = ["Content", "Grid", "content_of", "interval", "number"]


@dataclass(frozen=True)
class Grid:
    """A table of texts. A head that ends in "#" heads a column of numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


@dataclass(frozen=True)
class Content:
    title: str
    about: list[str]
    grids: list[Grid]
    notes: list[str]
    command: str


def content_of(
    plan: Plan, options: Options, results: Results, rows: Sequence[Row], times: Sequence[Times], command: str
) -> Content:
    table = plan.table
    changed = [f"epochs x {options.scale:g}"] if options.scale != 1 else []
    changed += list(options.set)
    title = table.title + (f" ({', '.join(changed)})" if changed else "")
    about = [table.about] if table.about else []
    if options.scale != 1:
        about.append(f"Not the experiment itself: every run has its epochs multiplied by {options.scale:g}.")
    if plan.seeds.stop == 1:
        about.append("One seed: there are no intervals, and nothing is shown either way.")
    grids = [_main(plan, rows)]
    if any(row.scores for row in rows):
        grids.append(_protocols(plan, rows))
    if times:
        grids.append(_times(plan, results, times))
    return Content(title, about, grids, list(_notes(plan, options, results, rows)), command)


def _main(plan: Plan, rows: Sequence[Row]) -> Grid:
    table = plan.table
    base = table.arms[table.baseline].title
    what = "balanced accuracy" if table.measure == "balanced" else "accuracy"
    head = ["", "Epoch", "Protocol", "Seeds#", f"Ours, {what} %#", "95 % interval#"]
    head += [f"Minus {base}#", "95 % interval, paired#", "Shown?#"]
    of_paper = any(cell.paper is not None for cell in table.cells.values())
    head += ["Paper %#", "Ours - paper#"] if of_paper else []
    lines = []
    for row in rows:
        score, epoch = row.score, "last" if row.checkpoint == "final" else f"best on {table.select}"
        seeds = len(plan.seeds) - len(row.missing)
        line = [_name(plan, row.cell, row.arm), epoch, row.protocol]
        line.append(f"{seeds} of {len(plan.seeds)}" if row.missing else str(seeds))
        if score is None:
            line += [f"diverged: seed {_listed(row.diverged)}" if row.diverged else "not trained yet", *[""] * 4]
        else:
            line += [number(score.mean), interval(score.mean), number(score.difference, signed=True)]
            line += [interval(score.difference, signed=True), verdict(score.difference)]
        if of_paper:
            line.append("" if row.paper is None else f"{row.paper:.3f}")
            line.append("" if row.to_paper is None else f"{row.to_paper:+.2f}")
        lines.append(line)
    notes = [
        f"On {table.test}. Intervals are Student's t over seeds (95 %); those of a difference are paired: same seed, "
        "same initial weights, same order of samples. They cover the seeds, not the choice of test images. A "
        "difference is shown where its interval does not hold zero."
    ]
    compared = sum(row.score is not None and row.score.difference is not None for row in rows)
    if compared > 1:
        notes.append(
            f"Each of the {compared} differences is judged by itself: of twenty true zeros, one interval misses zero."
        )
    return Grid("Accuracy", head, lines, notes)


def _protocols(plan: Plan, rows: Sequence[Row]) -> Grid:
    base = plan.table.arms[plan.table.baseline].title
    head = ["", "Epoch", "Protocol", "Accuracy %#", "95 % interval#", "Balanced accuracy %#", "95 % interval#"]
    head += [f"Minus {base}#", "Its protocol", "95 % interval, paired#"]
    lines = []
    for row in rows:
        for name, score in row.scores.items():
            lines.append(
                [
                    *(_name(plan, row.cell, row.arm), "last" if row.checkpoint == "final" else "best", name),
                    *(number(score.accuracy), interval(score.accuracy)),
                    *(number(score.balanced), interval(score.balanced), number(score.difference, signed=True)),
                    *(score.against if score.difference else "", interval(score.difference, signed=True)),
                ]
            )
    return Grid("Every protocol", head, lines, [])


def _times(plan: Plan, results: Results, times: Sequence[Times]) -> Grid:
    base = {one.cell: one for one in times if one.arm == plan.table.baseline}
    short = plan.table.arms[plan.table.baseline].title
    head = ["", "Training epoch, s#", f"/ {short}#", "Paper#", "Evaluation, s#", f"/ {short}#", "Paper#"]
    lines = []
    for one in times:
        other = base.get(one.cell)
        mine = [one.epoch, one.evaluation, one.paper_epoch, one.paper_test]
        theirs = [None] * 4 if other is None else [other.epoch, other.evaluation, other.paper_epoch, other.paper_test]
        ratio = [f"{a / b:.3f}" if a and b and one is not other else "" for a, b in zip(mine, theirs, strict=True)]
        lines.append(
            [
                *(_name(plan, one.cell, one.arm), _seconds(one.epoch), ratio[0], ratio[2]),
                *(_seconds(one.evaluation), ratio[1], ratio[3]),
            ]
        )
    beside = {result.raw.get("side_by_side") for result in results.values() if result.diverged is None}
    jobs = [one for one in beside if one is not None]
    how = "how many ran side by side is not known"
    if jobs and len(jobs) == len(beside):
        how = (
            "one run at a time" if max(jobs) == 1 else f"up to {max(jobs)} runs side by side, which disturb each other"
        )
    notes = [
        f"Means over seeds of each run's median; {how}. An evaluation is timed with all protocols of its network: four "
        "or more with anchors, one without."
    ]
    return Grid("Time", head, lines, notes)


def _notes(plan: Plan, options: Options, results: Results, rows: Sequence[Row]) -> Iterator[str]:
    table = plan.table
    yield from (f"{text[:1].upper()}{text[1:].rstrip('.')}." for text in table.differs)
    if table.select is None:
        yield f"The last epoch is reported; none is chosen. Curves are of {table.test}."
    else:
        yield (
            f"The best epoch is chosen on {table.select}, which is held out of training, by the accuracy that "
            f"eval.protocol names; both epochs are then judged on {table.test}."
        )
    for where, problem in plan.problems.items():
        yield f"{'/'.join(where)} cannot be trained: {problem}."
    shown = {(row.cell, row.arm) for row in rows}
    yield from _unique(
        f"{_name(plan, cell, arm)}: {config.epochs} epochs, {config.pretrain_epochs} of them cross-entropy"
        for (cell, arm, seed), run in plan.runs.items()
        if (config := run.config) and seed == 0 and (cell, arm) in shown
    )
    for row in rows:
        if row.missing and row.checkpoint == "final" and row.score is not None:
            yield f"{_name(plan, row.cell, row.arm)}: no result for seed {_listed(row.missing)}."
    for (cell, arm, seed), result in results.items():
        if result.diverged is not None and (cell, arm) in shown:
            yield f"{_name(plan, cell, arm)}, seed {seed} has diverged: {result.diverged}."
    yield from _unique(_data(result.raw) for result in results.values() if result.diverged is None)
    yield from _unique(_machine(result.raw) for result in results.values() if result.diverged is None)


def _data(raw: dict[str, object]) -> str:
    data = raw["data"]
    assert isinstance(data, dict)
    splits = {name: one for name, one in data.items() if name != "select" or raw["select"] is not None}
    parts = [f"{name} {one.get('samples')} ({str(one.get('digest'))[:12]})" for name, one in splits.items()]
    return f"Images from {data['test'].get('source')}, samples and digests of the manifests: {', '.join(parts)}"


def _machine(raw: dict[str, object]) -> str:
    hardware, versions = raw["hardware"], raw["versions"]
    assert isinstance(hardware, dict) and isinstance(versions, dict)
    device = hardware.get("device")
    chip = f" ({hardware['cpu']})" if device == "cpu" and hardware.get("cpu") else ""
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Trained on {device}{chip}, {hardware.get('ranks')} process(es) a run; {names}"


def _unique(lines: Iterator[str]) -> Iterator[str]:
    yield from (f"{line}." for line in dict.fromkeys(lines))


def _name(plan: Plan, cell: str, arm: str) -> str:
    title = plan.table.arms[arm].title
    return title if len(plan.table.cells) == 1 else f"{plan.table.cells[cell].title}: {title}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def number(mean: Mean | None, *, signed: bool = False) -> str:
    """A mean with two digits."""
    return "" if mean is None else f"{mean.mean:{'+' if signed else ''}.2f}"


def interval(mean: Mean | None, *, signed: bool = False) -> str:
    """Its interval."""
    if mean is None or mean.interval is None:
        return ""
    low, high = mean.interval
    return f"{low:+.2f} to {high:+.2f}" if signed else f"{low:.2f} to {high:.2f}"
