"""What is said about a table, as text: the same for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from oat_dist.experiments.plan import Options, Plan
from oat_dist.experiments.statistics import Mean, paired, verdict
from oat_dist.experiments.summary import Results, Row, Times

__all__ = ["Content", "Grid", "content_of", "interval"]


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
    cells = {row.cell for row in rows}
    if len(cells) == 1 and len(table.cells) > 1:
        about.append(f"Of its {len(table.cells)} cells: {table.cells[next(iter(cells))].title}.")
    grids = [_main(plan, rows)]
    # The center prior has that protocol on any set, its baseline only where classes are uneven.
    if any("balanced" in row.scores for row in rows if row.arm == plan.table.baseline):
        grids.append(_priors(plan, rows))
    if (compared := _compared(plan, rows)).rows:
        grids.append(compared)
    if any(row.scores for row in rows):
        grids.append(_protocols(plan, rows))
    if times:
        grids.append(_times(plan, results, times))
    return Content(title, about, grids, list(_notes(plan, options, results, rows)), command)


def _main(plan: Plan, rows: Sequence[Row]) -> Grid:
    table, name = plan.table, _namer(plan, rows)
    base = table.arms[table.baseline].title
    what = _measure(plan)
    head = [
        "",
        "Epoch",
        "Protocol",
        "Seeds#",
        f"{_capital(what)} %, 95 % interval#",
        f"Minus {base}, paired#",
        "Shown?",
    ]
    of_paper = any(cell.paper is not None for cell in table.cells.values())
    head += ["Paper %#", "Ours - paper#"] if of_paper else []
    lines = []
    for row in rows:
        score = row.score
        seeds = len(plan.seeds) - len(row.missing)
        line = [name(row.cell, row.arm), _epoch(plan, row), row.protocol]
        line.append(f"{seeds} of {len(plan.seeds)}" if row.missing else str(seeds))
        if score is None:
            line += [f"diverged: seed {_listed(row.diverged)}" if row.diverged else "not trained yet", "", ""]
        else:
            line += [interval(score.mean), interval(score.difference, signed=True), verdict(score.difference)]
        if of_paper:
            line.append("" if row.paper is None else f"{row.paper:.3f}")
            line.append("" if row.to_paper is None else f"{row.to_paper:+.2f}")
        lines.append(line)
    notes = [
        f"On {table.test}. Intervals (in brackets) are Student's t over seeds, 95 %; those of a difference are paired: "
        "same seed, same initial weights, same order of samples. They cover the seeds, not the choice of test images. "
        "A difference is shown where its interval does not hold zero."
    ]
    compared = sum(row.score is not None and row.score.difference is not None for row in rows)
    if compared > 1:
        notes.append(
            f"Each of the {compared} differences is judged by itself: of twenty true zeros, one interval misses zero."
        )
    return Grid("Accuracy", head, lines, notes)


def _priors(plan: Plan, rows: Sequence[Row]) -> Grid:
    """Where classes were not equally frequent in training: every arm under both class priors of the test."""
    base, name = plan.table.arms[plan.table.baseline].title, _namer(plan, rows)
    head = ["", "Epoch", "Protocol"]
    for prior in ("Prior of training", "Balanced prior"):
        head += [f"{prior}, %#", f"minus {base}#"]
    lines = []
    for row in rows:
        if not row.scores:
            continue
        # An arm trained for the balanced prior (logit adjustment, class weights) answers for that one by itself; the
        # anchor of test images (batch) knows of their classes, the stored one only of those of training.
        ordinary = next(one for one in ("ordinary", "stored", row.protocol) if one in row.scores)
        line = [name(row.cell, row.arm), _epoch(plan, row), ordinary]
        for protocol in (ordinary, "balanced"):
            score = row.scores.get(protocol)
            difference = None if score is None else score.difference
            line += [interval(None if score is None else score.mean), interval(difference, signed=True)]
        lines.append(line)
    notes = [
        f"{_capital(_measure(plan))}, differences paired. Each network is asked under the class prior of training, and "
        f"for equally frequent classes (`balanced`); it is compared with {base} asked the same. The prior of training "
        "is that of the stored anchor: an anchor of test images (batch, dataset) tells of the classes in the test."
    ]
    return Grid("Under each class prior", head, lines, notes)


def _compared(plan: Plan, rows: Sequence[Row]) -> Grid:
    """The differences that the file asks for besides those to the baseline.

    Each arm under its own protocol, and under `stored` and `balanced` where both have it.
    """
    found, name = {(row.cell, row.arm, row.checkpoint): row for row in rows}, _namer(plan, rows)
    lines = []
    asked = [(row, arm) for row in rows for arm in plan.table.compare.get(row.arm, ())]
    for row, against in asked:
        other = found.get((row.cell, against, row.checkpoint))
        if other is None:
            continue
        arm = plan.table.arms[against].title
        alike = [("stored", "stored"), ("balanced", "balanced")]
        for mine, theirs in dict.fromkeys([(row.protocol, other.protocol), *alike]):
            if mine not in row.scores or theirs not in other.scores:
                continue
            difference = paired(row.scores[mine].values, other.scores[theirs].values)
            lines.append(
                [
                    *(f"{name(row.cell, row.arm)} minus {arm}", _epoch(plan, row), f"{mine} - {theirs}"),
                    *(interval(difference, signed=True), verdict(difference)),
                ]
            )
    return Grid("Other differences", ["", "Epoch", "Protocols", "Difference, paired#", "Shown?"], lines, [])


def _protocols(plan: Plan, rows: Sequence[Row]) -> Grid:
    base, name = plan.table.arms[plan.table.baseline].title, _namer(plan, rows)
    head = ["", "Epoch", "Protocol", "Accuracy %#", "Balanced accuracy %#", "Minus its own protocol, paired#"]
    head += [f"Minus {base}, paired#", f"Protocol of {base}"]
    lines = []
    for row in rows:
        for protocol, score in row.scores.items():
            first = row.score if protocol != row.protocol else None
            within = None if first is None else paired(score.values, first.values)
            lines.append(
                [
                    *(name(row.cell, row.arm), _epoch(plan, row), protocol),
                    *(interval(score.accuracy), interval(score.balanced), interval(within, signed=True)),
                    *(interval(score.difference, signed=True), score.against if score.difference else ""),
                ]
            )
    return Grid("Every protocol", head, lines, [])


def _times(plan: Plan, results: Results, times: Sequence[Times]) -> Grid:
    base = {one.cell: one for one in times if one.arm == plan.table.baseline}
    short, name = plan.table.arms[plan.table.baseline].title, _namer(plan, times)
    head = ["", "Training epoch, s#", f"/ {short}#", "Paper#", "Evaluation, s#", f"/ {short}#", "Paper#"]
    lines = []
    for one in times:
        other = base.get(one.cell)
        mine = [one.epoch, one.evaluation, one.paper_epoch, one.paper_test]
        theirs = [None] * 4 if other is None else [other.epoch, other.evaluation, other.paper_epoch, other.paper_test]
        ratio = [f"{a / b:.3f}" if a and b and one is not other else "" for a, b in zip(mine, theirs, strict=True)]
        lines.append(
            [
                *(name(one.cell, one.arm), _seconds(one.epoch), ratio[0], ratio[2]),
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
    table, name = plan.table, _namer(plan, rows)
    yield from (f"{_capital(text).rstrip('.')}." for text in table.differs)
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
        f"{name(cell, arm)}: {config.epochs} epochs, {config.pretrain_epochs} of them cross-entropy"
        for (cell, arm, seed), run in plan.runs.items()
        if (config := run.config) and seed == 0 and (cell, arm) in shown
    )
    for row in rows:
        if row.missing and row.checkpoint == "final" and row.score is not None:
            yield f"{name(row.cell, row.arm)}: no result for seed {_listed(row.missing)}."
    for (cell, arm, seed), result in results.items():
        if result.diverged is not None and (cell, arm) in shown:
            yield f"{name(cell, arm)}, seed {seed} has diverged: {result.diverged}."
    yield from _unique(_data(result.raw) for result in results.values() if result.diverged is None)
    yield from _unique(_machine(result.raw) for result in results.values() if result.diverged is None)


def _data(raw: dict[str, object]) -> str:
    data = raw["data"]
    assert isinstance(data, dict)
    splits = {name: one for name, one in data.items() if name != "select" or raw["select"] is not None}
    parts = [f"{name} {one.get('samples')} ({str(one.get('digest'))[:12]})" for name, one in splits.items()]
    bad = data["test"].get("undecodable")
    left_out = f"; {bad} test image(s) cannot be decoded and are left out" if bad else ""
    return (
        f"Images from {data['test'].get('source')}, samples and digests of the manifests: {', '.join(parts)}{left_out}"
    )


def _machine(raw: dict[str, object]) -> str:
    hardware, versions = raw["hardware"], raw["versions"]
    assert isinstance(hardware, dict) and isinstance(versions, dict)
    device = hardware.get("device")
    chip = f" ({hardware['cpu']})" if device == "cpu" and hardware.get("cpu") else ""
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Trained on {device}{chip}, {hardware.get('ranks')} process(es) a run; {names}"


def _unique(lines: Iterator[str]) -> Iterator[str]:
    yield from (f"{line}." for line in dict.fromkeys(lines))


def _namer(plan: Plan, rows: Sequence[Row | Times]) -> Callable[[str, str], str]:
    """What a cell and an arm are called: by the arm alone where only one cell is shown."""
    if len({row.cell for row in rows}) == 1:
        return lambda _, arm: plan.table.arms[arm].title
    return lambda cell, arm: f"{plan.table.cells[cell].title}: {plan.table.arms[arm].title}"


def _measure(plan: Plan) -> str:
    return "balanced accuracy" if plan.table.measure == "balanced" else "accuracy"


def _epoch(plan: Plan, row: Row) -> str:
    return "last" if row.checkpoint == "final" else f"best on {plan.table.select}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def interval(mean: Mean | None, *, signed: bool = False) -> str:
    """A mean with its interval in brackets, if it has one."""
    if mean is None:
        return ""
    sign = "+" if signed else ""
    text = f"{mean.mean:{sign}.2f}"
    if mean.interval is None:
        return text
    low, high = mean.interval
    return f"{text} ({low:{sign}.2f} to {high:{sign}.2f})"
