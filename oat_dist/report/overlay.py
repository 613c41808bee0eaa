"""The curves of several runs in one figure: accuracy as the paper's figures 2 to 4, and the losses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from oat_dist.report.curves import evaluated_when, smoothing_note
from oat_dist.report.data import Run
from oat_dist.report.drawing import key, numbered_look
from oat_dist.report.figures import Curve, accuracy_svg, last_phase_epoch, loss_pieces, loss_svg
from oat_dist.report.groups import Group
from oat_dist.report.html import Html, figure, join, percent
from oat_dist.report.metrics import Validation, phase_name

__all__ = ["accuracy_figure", "headline_rows", "loss_figure"]

_SHORT = 24  # letters of a name in the text of a figure

Piece = tuple[list[float], list[float]]


def headline_rows(run: Run) -> list[Validation]:
    """A run's accuracies under the protocol of its headline, and before OAT under argmax."""
    protocols = {"argmax", run.protocol}
    rows = [row for row in run.metrics.validation if row.protocol in protocols]
    return [row for row in rows if not (row.phase == "oat" and row.protocol != run.protocol)]


def accuracy_figure(groups: Sequence[Group]) -> Html:
    """Accuracy over epochs, one line a run; of a group with several seeds their mean."""
    drawn = [_group_curve(number, group) for number, group in enumerate(groups)]
    apart = [run for group in groups if len(group.runs) > 1 for run in group.apart]
    drawn += [_run_curve(len(groups) + number, run) for number, run in enumerate(apart)]
    drawn = [curve for curve in drawn if any(x for x, _ in curve.pieces)]
    if not drawn:
        return Html("")
    ends = "; ".join(f"{curve.label} {percent(curve.pieces[-1][1][-1])} %" for curve in drawn)
    several = any(len(group.runs) > 1 for group in groups)
    runs = [run for group in groups for run in group.runs]
    when, unit = evaluated_when([run.metrics for run in runs])
    caption = f"Accuracy {when}. Last values: {ends}."
    smoothed = smoothing_note(max(curve.window for curve in drawn), unit)
    if several:
        smoothed += " Runs that differ in their seed alone are one line, their mean; light: each of them."
    if apart:
        smoothed += f" Lines of their own, not in a mean: {', '.join(run.name for run in apart)}."
    switches = sorted({(s.epoch, s.phase) for run in runs for s in run.metrics.switches})
    svg = accuracy_svg(
        drawn,
        f"Line chart. {caption}",
        since=last_phase_epoch([run.metrics for run in runs if run.metrics.validation]),
        switches=switches if len(switches) == 1 else [(epoch, "") for epoch, _ in switches],
        name="compare-accuracy",
    )
    begins = "".join(f" Dashed line: {phase_name(phase)} begins, {epoch} epochs done." for epoch, phase in switches)
    legend = key([(curve.look, curve.label) for curve in drawn])
    return figure("Accuracy over training", join([svg, legend]), caption + smoothed + begins)


def loss_figure(groups: Sequence[Group]) -> Html:
    """Training losses, a panel for each phase; of a group with several seeds the first run."""
    panels: dict[str, list[Curve]] = {}
    legend = []
    for number, group in enumerate(groups):
        look = numbered_look(number)
        pieces = loss_pieces(group.first.metrics)
        if any(steps for steps, _ in pieces.values()):
            legend.append((look, group.name))
        points = sum(len(steps) for steps, _ in pieces.values())
        for name, piece in pieces.items():
            if piece[0]:
                panels.setdefault(name, []).append(Curve(look, group.name, [piece], part=40, points=points))
    if not panels:
        return Html("")
    several = any(len(group.runs) > 1 for group in groups)
    caption = "Training loss, each phase on its own axes: cross-entropy and OAT's squared loss have different scales."
    caption += " Of runs that differ in their seed alone, the first." if several else ""
    windows = [curve.window for lines in panels.values() for curve in lines]
    svg = loss_svg(panels, f"Line chart. {caption}", name="compare-loss")
    return figure("Training loss", join([svg, key(legend)]), caption + smoothing_note(max(windows), "logged steps"))


def _group_curve(number: int, group: Group) -> Curve:
    members = [_pieces(run) for run in group.by_seed.values()]
    if len(members) < 2:
        return _run_curve(number, group.first)
    label = f"{group.name} (mean of {len(members)} seeds)"
    look = numbered_look(number)
    mean: list[Piece] = []
    for phase in dict.fromkeys(phase for member in members for phase in member):
        by_epoch: dict[float, list[float]] = {}
        for member in members:
            for epoch, share in zip(*member.get(phase, ([], [])), strict=True):
                by_epoch.setdefault(epoch, []).append(share)
        whole = {epoch: shares for epoch, shares in sorted(by_epoch.items()) if len(shares) == len(members)}
        mean.append((list(whole), [statistics.fmean(shares) for shares in whole.values()]))
    lights = [_joined(list(member.values())) for member in members]
    return Curve(look, label, [piece for piece in mean if piece[0]], lights)


def _run_curve(number: int, run: Run) -> Curve:
    return Curve(numbered_look(number), run.name, list(_pieces(run).values()))


def _pieces(run: Run) -> dict[str, Piece]:
    """Epochs and accuracies by phase: what is smoothed does not reach over a switch."""
    found: dict[str, Piece] = {}
    for row in headline_rows(run):
        epochs, shares = found.setdefault(row.phase, ([], []))
        epochs.append(row.epoch)
        shares.append(row.accuracy)
    return found


def _joined(pieces: Sequence[Piece]) -> Piece:
    return [x for xs, _ in pieces for x in xs], [y for _, ys in pieces for y in ys]
