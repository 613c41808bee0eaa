"""The section of curves: which figures a log gives, and what their captions say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from oat_dist.report import figures
from oat_dist.report.drawing import key, numbered_look
from oat_dist.report.figures import Curve, Panel
from oat_dist.report.grid import LEVELS, grid_svg, shade_key
from oat_dist.report.html import Html, figure, join, percent, section, tag
from oat_dist.report.metrics import Metrics, phase_name

__all__ = ["curves", "evaluated_when", "smoothing_note"]

_LINES = 12  # classes up to which each has a line of its own
_ROWS = 200  # classes up to which their anchors are drawn at all
_COLUMNS = 100  # epochs of the heat map, at most


def curves(metrics: Metrics, class_names: Sequence[str]) -> Html:
    """The section of all figures, each with its caption; a log without anything to draw says so."""
    drawn = [
        *([_accuracy_figure(metrics)] if metrics.validation else []),
        *([_loss_figure(metrics)] if metrics.series("loss")[0] else []),
        *_anchor_figure(metrics, class_names),
        *_step_figures(metrics),
    ]
    if not drawn:
        return section("Curves", tag("p", "Nothing to draw yet: the log holds no training step and no validation."))
    return section("Curves", tag("div", join(drawn), class_="figures"))


def smoothing_note(window: int, unit: str) -> str:
    """What a caption says of a smoothed curve; empty where nothing was smoothed."""
    return f" Light: as measured; strong: a running mean over {window} {unit}." if window > 1 else ""


def evaluated_when(logs: Iterable[Metrics]) -> tuple[str, str]:
    """When the accuracies were measured, and what there is one of: epochs, where every one of them has its own."""
    for metrics in logs:
        places = sorted({(row.step, row.epoch) for row in metrics.validation})
        epochs = [epoch for _, epoch in places]
        if epochs and epochs != list(range(1, len(epochs) + 1)):
            return "at each evaluation", "evaluations"
    return "after each epoch", "epochs"


def _accuracy_figure(metrics: Metrics) -> Html:
    drawn = [figures.protocol_curve(metrics, protocol) for protocol in metrics.protocols]
    ends = "; ".join(f"{p} {percent(metrics.of_protocol(p)[-1].accuracy)} %" for p in metrics.protocols)
    when, unit = evaluated_when([metrics])
    caption = f"Accuracy {when}. Last values: {ends}."
    smoothed = smoothing_note(max(curve.window for curve in drawn), unit)
    svg = figures.accuracy_svg(
        drawn,
        f"Line chart. {caption}",
        since=figures.last_phase_epoch([metrics]),
        switches=[(s.epoch, s.phase) for s in metrics.switches],
    )
    legend = key([(curve.look, curve.label) for curve in drawn])
    return figure("Accuracy", join([svg, legend]), caption + smoothed + _switch_note(metrics))


def _loss_figure(metrics: Metrics) -> Html:
    _, values = metrics.series("loss")
    caption = f"Training loss from {values[0]:.4g} to {values[-1]:.4g} at the last logged step."
    panels = {
        name: [Curve(numbered_look(number), name, [piece], part=40, points=len(values))]
        for number, (name, piece) in enumerate(figures.loss_pieces(metrics).items())
    }
    windows = [curve.window for lines in panels.values() for curve in lines]
    smoothed = smoothing_note(max(windows), "logged steps")
    if len(panels) > 1:
        caption += " Cross-entropy and OAT's squared loss have different scales, so each phase has its own axes."
    switches = [(s.step, s.phase) for s in metrics.switches]
    svg = figures.loss_svg(panels, f"Line chart. {caption}", switches=switches)
    return figure("Training loss", svg, caption + smoothed + _switch_note(metrics))


def _anchor_figure(metrics: Metrics, class_names: Sequence[str]) -> list[Html]:
    """The mean training anchor of each epoch by class: lines, of many classes a heat map."""
    rows = [row for row in metrics.anchors if len(row.values) == len(metrics.anchors[-1].values)]
    if not rows:
        return []
    values_EC = np.array([row.values for row in rows])
    classes = values_EC.shape[1]
    names = [class_names[k] if k < len(class_names) else f"class {k}" for k in range(classes)]
    epochs = [row.epoch for row in rows]
    last = values_EC[-1]
    low, high = int(last.argmin()), int(last.argmax())
    caption = (
        f"Mean training anchor of each OAT epoch. At the end the largest entry is that of {names[high]} "
        f"({last[high]:.4g}), the smallest that of {names[low]} ({last[low]:.4g}); 1/C is {1 / classes:.4g}."
    )
    title = "Anchor by class"
    if classes <= _LINES:
        drawn = [
            Curve(numbered_look(k), names[k], [(epochs, values_EC[:, k].tolist())], part=10**9) for k in range(classes)
        ]
        svg = figures.epochs_svg(drawn, f"Line chart. {caption}", name="anchor-classes", label="anchor")
        return [figure(title, join([svg, key([(c.look, c.label) for c in drawn])]), caption)]
    if classes > _ROWS:
        return [figure(title, tag("p", f"{classes:,} classes are too many to draw."), caption)]
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _COLUMNS)).round().astype(np.int64))
    shown_CE = values_EC[kept].T
    least, most = float(shown_CE.min()), float(shown_CE.max())
    span = most - least
    levels = np.ceil((shown_CE - least) / span * (LEVELS - 1)).astype(np.int64) + 1 if span > 0 else shown_CE * 0 + 1
    svg = grid_svg(
        levels.astype(np.int64),
        f"Heat map. {caption}",
        rows=names,
        columns=[str(epochs[k]) for k in kept],
        row_title="class",
        column_title="finished epochs",
        square=False,
    )
    scale = shade_key([(1, f"{least:.4g}"), ((1 + LEVELS) // 2, f"{(least + most) / 2:.4g}"), (LEVELS, f"{most:.4g}")])
    return [figure(title, join([svg, scale]), caption)]


def _step_figures(metrics: Metrics) -> list[Html]:
    """The figures of the other logged numbers; what was not logged is not drawn."""

    def logged(*panels: Panel) -> list[Panel]:
        kept = [replace(p, series={k: v for k, v in p.series.items() if metrics.series(v)[0]}) for p in panels]
        return [panel for panel in kept if panel.series]

    groups = {
        "anchor": (
            "Anchor",
            logged(
                Panel("smallest and largest entry", {"max": "anchor_max", "min": "anchor_min"}),
                Panel("entropy (nats)", {"entropy": "anchor_entropy"}),
            ),
            "The anchor's extreme entries: an entry near zero makes targets of about 1/a.",
        ),
        "rate": (
            "Learning rate",
            logged(
                Panel("learning rate", {"lr": "lr"}, exact=True),
                Panel("gradient norm", {"norm": "grad_norm"}),
            ),
            "The learning rate is a pure function of the global step.",
        ),
        "speed": (
            "Throughput",
            logged(
                Panel("samples per second", {"samples/s": "samples_per_s"}),
                Panel("share of time waiting for data (%)", {"waiting": "data_wait"}, percent=True),
                Panel("memory of rank 0 (GB)", {"memory": "memory_gb"}),
            ),
            _speed_caption(metrics),
        ),
    }
    return [
        figure(title, figures.steps_svg(name, metrics, panels, f"Line chart. {title}. {caption}"), caption)
        for name, (title, panels, caption) in groups.items()
        if panels
    ]


def _speed_caption(metrics: Metrics) -> str:
    speeds, waits = sorted(metrics.series("samples_per_s")[1]), sorted(metrics.series("data_wait")[1])
    parts = [f"median {speeds[len(speeds) // 2]:,.0f} samples per second"] if speeds else []
    parts += [f"median {100 * waits[len(waits) // 2]:.1f} % of the time waiting for data"] if waits else []
    return "All ranks together: " + ", ".join(parts) + "." if parts else "Memory of rank 0."


def _switch_note(metrics: Metrics) -> str:
    return "".join(
        f" Dashed line: {phase_name(s.phase)} begins, {s.epoch} epochs done, step {s.step:,}." for s in metrics.switches
    )
