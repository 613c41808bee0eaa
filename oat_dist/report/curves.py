"""The section of curves: which figures a log gives, and what their captions say."""

from __future__ import annotations

from dataclasses import replace

from oat_dist.report import figures
from oat_dist.report.figures import Panel
from oat_dist.report.html import Html, figure, join, percent, section, tag
from oat_dist.report.metrics import Metrics, phase_name

__all__ = ["curves"]


def curves(metrics: Metrics) -> Html:
    """The section of all figures, each with its caption; a log without anything to draw says so."""
    drawn = [
        *([_accuracy_figure(metrics)] if metrics.validation else []),
        *([_loss_figure(metrics)] if metrics.series("loss")[0] else []),
        *_step_figures(metrics),
    ]
    if not drawn:
        return section("Curves", tag("p", "Nothing to draw yet: the log holds no training step and no validation."))
    return section("Curves", tag("div", join(drawn), class_="figures"))


def _accuracy_figure(metrics: Metrics) -> Html:
    ends = "; ".join(f"{p} {percent(metrics.of_protocol(p)[-1].accuracy)} %" for p in metrics.protocols)
    caption = f"Accuracy after each epoch. Last values: {ends}.{_switch_note(metrics)}"
    return figure("Validation accuracy", figures.accuracy_svg(metrics, f"Line chart. {caption}"), caption)


def _loss_figure(metrics: Metrics) -> Html:
    _, values = metrics.series("loss")
    window = figures.smooth(values)[1]
    caption = f"Training loss from {values[0]:.4g} to {values[-1]:.4g} at the last logged step."
    caption += " Light: as logged; strong: a running mean." if window > 1 else ""
    if metrics.switches:
        caption += " Cross-entropy and OAT's squared loss have different scales, so each phase has its own axes."
    return figure("Training loss", figures.loss_svg(metrics, f"Line chart. {caption}"), caption + _switch_note(metrics))


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
    return "All ranks together: " + ", ".join(parts) + "."


def _switch_note(metrics: Metrics) -> str:
    return "".join(
        f" Dashed line: {phase_name(s.phase)} begins, {s.epoch} epochs done, step {s.step:,}." for s in metrics.switches
    )
