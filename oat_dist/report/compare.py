"""The page that compares runs: what differs, what came out, and whether the difference is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oat_dist.report.card import shown_value
from oat_dist.report.data import Run, lookup
from oat_dist.report.evaluation import in_order
from oat_dist.report.gallery import paired_gallery
from oat_dist.report.groups import Group, common_seeds, differing, find_groups, spread
from oat_dist.report.headline import interval_of, interval_text
from oat_dist.report.html import (
    Html,
    contents,
    document,
    join,
    number,
    percent,
    section,
    stats,
    table,
    tag,
    warning_list,
)
from oat_dist.report.overlay import accuracy_figure, loss_figure
from oat_dist.report.pairs import PAIRED_NOTE, Pair, compare_pair, p_text, paired_table, points, signed
from oat_dist.report.timing import cut_off_text, duration, read_timing

__all__ = ["render_comparison"]


def render_comparison(runs: Sequence[Run], base: int = 0, data: str | None = None) -> str:
    """The comparison of runs, each with a name of its own, as one HTML document.

    Args:
        base: the position of the run that the others are tested against.
        data: another place where the data set lies; None: where the configurations say.
    """
    groups = find_groups(runs)
    others = [run for position, run in enumerate(runs) if position != base]
    pairs = [compare_pair(run, runs[base]) for run in others]
    chosen = _most_telling(pairs, groups)
    figures = [drawn for drawn in (accuracy_figure(groups), loss_figure(groups)) if drawn]
    sections = [
        _results(runs),
        section(
            "Curves",
            tag("div", join(figures), class_="figures")
            if figures
            else tag("p", "Nothing to draw yet: no run has logged anything."),
        ),
        *([_seeds(groups, runs[base])] if any(len(group.runs) > 1 for group in groups) else []),
        *([_paired(pairs, others, runs[base])] if others else []),
        *([paired_gallery(chosen, data)] if chosen is not None else []),
        _times(runs),
        _differences(runs),
        _data(runs, base),
    ]
    title = f"Comparison of {len(runs)} runs" if len(runs) != 1 else f"{runs[0].name} alone"
    warnings = [f"{run.name}: {warning}" for run in runs for warning in run.warnings]
    head = tag("header", join([tag("h1", title), tag("p", _summary(runs), class_="status"), _stats(runs, chosen)]))
    return document(f"{title}: OAT run report", head, contents(sections), warning_list(warnings), *sections)


def _most_telling(pairs: Sequence[Pair | str], groups: Sequence[Group]) -> Pair | None:
    """The pair whose samples are shown: the first one that differs in more than its seed, else the first."""
    found = [pair for pair in pairs if isinstance(pair, Pair)]
    home = {id(run): number for number, group in enumerate(groups) for run in group.runs}
    found.sort(key=lambda pair: home[id(pair.run)] == home[id(pair.base)])
    return found[0].oat_first() if found else None


def _summary(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs) + "."


def _stats(runs: Sequence[Run], pair: Pair | None) -> Html:
    """The two runs of the gallery and their difference, in large numbers."""
    if pair is None:
        return Html("")
    tiles: list[tuple[str, Any, Any]] = []
    for run in (pair.run, pair.base):
        if (score := run.score) is not None:
            tiles.append(
                (
                    run.name,
                    f"{percent(score.accuracy)}",
                    f"% under “{score.protocol}”" + (f" on {run.split}" if run.split else ""),
                )
            )
    low, high = pair.test.interval
    note = f"points, {points(low)} to {points(high)}; p {p_text(pair.test.p_value)}"
    if not (pair.run.evaluated_last and pair.base.evaluated_last):
        note += "; saved answers, not those of the headline"
    tiles.append(("Difference, same samples", points(pair.test.difference), note))
    return stats(tiles)


def _results(runs: Sequence[Run]) -> Html:
    protocols = in_order({score.protocol: None for run in runs for score in run.scores})
    rows = []
    for run in runs:
        found = {score.protocol: score for score in run.scores}
        cells: list[Any] = []
        for protocol in protocols:
            score = found.get(protocol)
            if score is None:
                cells.append("-")
                continue
            shown = tag("span", percent(score.accuracy), class_="main" if protocol == run.protocol else "")
            cells.append(join([shown, tag("small", interval_text(interval_of(score)))], " "))
        last = run.metrics.validation[-1].epoch if run.metrics.validation else None
        state = "" if run.metrics.finished else " (not finished)"
        rows.append([run.name, *cells, run.split or "-", f"{number(last)}{state}", _best(run)])
    caption = (
        "The last evaluation of each run with its 95 % interval over samples; large: the protocol of its headline. "
        "The best epoch is selected by the split it is measured on, so it is optimistic."
    )
    if len({run.evaluated_on for run in runs if run.score is not None}) > 1:
        caption += " Not all runs are evaluated on the same data."
    head = ["Run", *(f"{protocol} %#" for protocol in protocols), "Split", "Epochs#", "Best epoch"]
    return section("Results", table(head, rows, caption=caption, class_="headline"))


def _best(run: Run) -> str:
    rows = [row for row in run.metrics.validation if row.protocol == run.protocol]
    if not rows:
        return "-"
    best = max(rows, key=lambda row: row.accuracy)
    return f"{percent(best.accuracy)} %, epoch {best.epoch}, selected on {best.split}"


def _seeds(groups: Sequence[Group], base: Run) -> Html:
    """Means over seeds, and differences seed by seed to the group of `base`."""
    home = next(group for group in groups if any(run is base for run in group.runs))
    rows = []
    for group in groups:
        scores = {seed: run.score for seed, run in group.by_seed.items()}
        shares = [100 * score.accuracy for score in scores.values() if score is not None]
        if not shares:
            continue
        found = spread(shares)
        seeds = ", ".join(str(seed) for seed in scores)
        interval = "-" if found.interval is None else "{:.2f} to {:.2f}".format(*found.interval)
        std = "-" if found.std is None else f"{found.std:.2f}"
        protocol = group.first.protocol
        mean = tag("span", f"{found.mean:.2f}", class_="main")
        rows.append([group.name, protocol, seeds, mean, std, interval, *_by_seed(group, home)])
    head = ["Runs", "Protocol", "Seeds", "Mean %#", "Std#", "95 % of the mean#"]
    head += ["Difference by seed, points#", "95 % of its mean#"]
    note = (
        "Finished runs that differ in nothing but their seed. Intervals are Student's t over seeds. "
        f"Differences are to {home.name}, between runs of the same seed."
    )
    left_out = {name: why for group in groups for name, why in group.left_out.items()}
    repeated = [group.name for group in groups if len(group.by_seed) < len(group.counted)]
    again = [tag("p", f"Seeds more than once, counted once: {', '.join(repeated)}.")] if repeated else []
    if left_out:
        again.append(tag("p", f"Left out: {', '.join(f'{name} ({why})' for name, why in left_out.items())}."))
    return section("Over seeds", table(head, rows, class_="headline") if rows else "", *again, note=note)


def _by_seed(group: Group, home: Group) -> list[str]:
    if group is home or group.first.evaluated_on != home.first.evaluated_on:
        return ["-", "-"]
    differences = [
        100 * (mine.score.accuracy - theirs.score.accuracy)
        for mine, theirs in common_seeds(group, home).values()
        if mine.score is not None and theirs.score is not None
    ]
    if not differences:
        return ["-", "-"]
    found = spread(differences)
    interval = "-" if found.interval is None else " to ".join(map(signed, found.interval))
    return [f"{signed(found.mean)} ({found.count} seed(s))", interval]


def _paired(pairs: Sequence[Pair | str], others: Sequence[Run], base: Run) -> Html:
    compared = paired_table(pairs, [run.name for run in others], base)
    return section(f"Same samples: against {base.name}", compared, note=PAIRED_NOTE)


def _times(runs: Sequence[Run]) -> Html:
    """Time and speed; the ratio of epochs is the paper's measure of what OAT costs."""
    timings = [read_timing(run) for run in runs]
    plain = [timing.phase("cross_entropy") for timing in timings]
    reference = next((phase.epoch_seconds for phase in plain if phase is not None and phase.epoch_seconds), None)
    rows = []
    for run, timing in zip(runs, timings, strict=True):
        oat, other = timing.phase("oat"), timing.phase("cross_entropy")
        mine = None if oat is None else oat.epoch_seconds
        last = timing.phases[-1] if timing.phases else None
        rows.append(
            [
                run.name,
                duration(timing.wall),
                duration(None if other is None else other.epoch_seconds),
                duration(mine),
                "-" if not mine or not reference else f"{mine / reference:.3f}",
                "-" if last is None or last.speed is None else f"{last.speed:,.0f}",
                "-" if last is None or last.data_wait is None else f"{100 * last.data_wait:.1f}",
                "-" if timing.memory_gb is None else f"{timing.memory_gb:.3g}",
            ]
        )
    head = ["Run", "Wall time#", "Cross-entropy epoch#", "OAT epoch#", "Ratio#"]
    head += ["Samples/s#", "Data wait %#", "Memory GB#"]
    caption = (
        "Epochs are training alone. Ratio: an OAT epoch to the first cross-entropy epoch above (the paper: 0.934)."
    )
    cut_off = [f"{run.name}{cut_off_text(t.cut_off)}" for run, t in zip(runs, timings, strict=True) if t.cut_off]
    if cut_off:
        caption += f" Wall time: {'; '.join(cut_off)}."
    if any(timing.estimated for timing in timings):
        caption += " Where a log has no seconds, they are estimated from its throughput."
    return section("Time", table(head, rows, caption=caption))


def _differences(runs: Sequence[Run]) -> Html:
    """Configuration keys that differ; those that are equal are not worth a line."""
    rows = [[tag("code", key), *map(shown_value, values)] for key, values in differing(runs).items()]
    title = "What differs in the configuration"
    if not rows:
        return section(title, tag("p", "Nothing but the folder."))
    return section(title, table(["Key", *(run.name for run in runs)], rows))


def _data(runs: Sequence[Run], base: int) -> Html:
    """Whether the runs saw the same data in the same order."""
    reference = runs[base]
    rows = []
    for run in runs:
        same = {key: _same(run.environment, reference.environment, f"{key}_digest") for key in ("train", "eval")}
        if run.split != reference.split and run.split and reference.split:
            same["eval"] = "another split"
        rows.append([run.name, *same.values(), "-" if run is reference else _same_order(run, reference), _machine(run)])
    head = ["Run", "Training data", "Evaluation data", "Order of samples", "Machine"]
    return section(
        "Data and machines", table(head, rows), note=f"Data and their order as compared with {reference.name}."
    )


def _same(mine: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> str:
    if not mine.get(key) or not theirs.get(key):
        return "not known"
    return "the same" if mine[key] == theirs[key] else "another set"


def _same_order(run: Run, reference: Run) -> str:
    marks = [
        {row.step: row.fingerprint for row in one.metrics.training if row.fingerprint is not None}
        for one in (run, reference)
    ]
    common = sorted(marks[0].keys() & marks[1].keys())
    if not common:
        return "not known"
    different = next((step for step in common if marks[0][step] != marks[1][step]), None)
    return f"the same up to step {common[-1]:,}" if different is None else f"another, from step {different:,} on"


def _machine(run: Run) -> str:
    parts = [run.environment.get("device"), lookup(run.environment, "engine")]
    ranks = run.environment.get("world_size")
    versions = [f"{name} {run.environment[name]}" for name in ("oat_dist", "torch") if run.environment.get(name)]
    counted = [f"{ranks} rank(s)"] if ranks else []
    return ", ".join([*(str(part) for part in parts if part), *counted, *versions]) or "-"
