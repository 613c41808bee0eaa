"""What stands on the page of one run, from top to bottom: `render` is the table of contents."""

from __future__ import annotations

from typing import Any

from oat_dist.data.remote.fetch import shown_text
from oat_dist.report.card import card, shown_value
from oat_dist.report.confusion import confusion
from oat_dist.report.curves import curves
from oat_dist.report.data import Run, flatten, lookup
from oat_dist.report.evaluation import Evaluation
from oat_dist.report.gallery import mistakes, paired_gallery
from oat_dist.report.headline import accuracy, interval_of, interval_text
from oat_dist.report.html import (
    Html,
    contents,
    details,
    document,
    facts,
    join,
    number,
    percent,
    section,
    stats,
    table,
    tag,
    warning_list,
)
from oat_dist.report.metrics import METRICS_NAME, phase_name, utc_text
from oat_dist.report.pairs import PAIRED_NOTE, compare_pair, paired_table
from oat_dist.report.timing import cut_off_text, duration, read_timing, timing_section

__all__ = ["compared", "render"]

_OPEN_PER_CLASS = 20  # more classes than this start folded


def render(run: Run, against: Run | None = None, data: str | None = None) -> str:
    """The report of a run as one HTML document.

    Args:
        against: a run to compare its answers with.
        data: another place where the data set lies; None: where the configuration says.
    """
    sections = [
        accuracy(run),
        *(compared(run, against, data) if against is not None else []),
        curves(run.metrics, run.evaluation.class_names if run.evaluation is not None else []),
        confusion(run),
        mistakes(run, data),
        _per_class(run.evaluation),
        timing_section(run),
        card(run, data),
        _reproduction(run),
        _configuration(run),
    ]
    return document(
        f"{run.name}: OAT run report", _header(run), contents(sections), warning_list(run.warnings), *sections
    )


def _header(run: Run) -> Html:
    metrics, environment = run.metrics, run.environment
    epochs = lookup(run.config, "epochs")
    if not metrics.training:
        status = "No training step has been logged yet."
    else:
        last = metrics.training[-1]
        ends = [e.step for e in metrics.events if e.name == "finished" and e.step is not None]
        step = ends[-1] if metrics.finished and ends else last.step
        place = f"step {step:,}, in epoch {last.epoch + 1}" + (f" of {epochs}" if epochs is not None else "")
        status = f"Finished ({place})." if metrics.finished else f"In progress or interrupted: last logged {place}."
    ema = lookup(run.config, "optim.ema")
    precision = "fp32" if environment.get("precision") == "no" else environment.get("precision")
    summary = {
        "Model": lookup(run.config, "model.name"),
        "Weights": None if ema is None else f"moving average, EMA {ema}",
        "Machine": _joined(environment, {"device": "{}", "world_size": "{} rank(s)", "threads": "{} thread(s) each"}),
        "Engine": _joined(environment | {"precision": precision}, {"engine": "{}", "precision": "{}"}),
        "Versions": _joined(
            environment, {"oat_dist": "oat_dist {}", "torch": "torch {}", "accelerate": "accelerate {}"}
        ),
        # environment.json is written anew by every resume
        "Started": next((e.time for e in metrics.events if e.name == "start" and e.time), "")
        or utc_text(environment.get("started"))
        or None,
        "Begun as a copy of": next((e.start_from for e in metrics.events if e.start_from), None),
    }
    return tag("header", join([tag("h1", run.name), tag("p", status, class_="status"), _stats(run), facts(summary)]))


def _stats(run: Run) -> Html:
    """The headline in large numbers."""
    tiles: list[tuple[str, Any, Any]] = []
    score = run.score
    if score is not None:
        bounds = interval_of(score)
        where = run.split
        note = f"{interval_text(bounds)}, 95 % interval" if bounds is not None else ""
        tiles.append(
            (f"Accuracy, “{score.protocol}”" + (f" on {where}" if where else ""), percent(score.accuracy), note)
        )
    timing = read_timing(run)
    spent = timing.wall
    if spent is None and timing.phases and all(phase.seconds is not None for phase in timing.phases):
        spent = sum(phase.seconds or 0.0 for phase in timing.phases)
    if spent is not None:
        with_evaluations = f"with evaluations{cut_off_text(timing.cut_off)}"
        tiles.append(("Time", duration(spent), with_evaluations if timing.wall is not None else "training alone"))
    phases = [phase for phase in timing.phases if phase.speed is not None]
    if phases:
        note = "median, all ranks" + (f", {phase_name(phases[-1].phase)}" if len(phases) > 1 else "")
        tiles.append(("Samples per second", f"{phases[-1].speed:,.0f}", note))
    parameters = run.environment.get("parameters")
    if type(parameters) is int:
        tiles.append(("Parameters", _short(parameters), lookup(run.config, "model.name") or ""))
    return stats(tiles)


def _short(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _joined(values: dict[str, Any], forms: dict[str, str]) -> str | None:
    return ", ".join(form.format(values[key]) for key, form in forms.items() if values.get(key) is not None) or None


def compared(run: Run, base: Run, data: str | None) -> list[Html]:
    """The sections that set the answers of a run against those of another."""
    pair = compare_pair(run, base)
    named = f"“{run.protocol}” against {base.name} under “{base.protocol}”"
    tests = section(
        f"Compared with {base.name}",
        paired_table([pair], [run.name], base),
        tag("p", f"Accuracy under {named}. {PAIRED_NOTE}", class_="note"),
    )
    return [tests] if isinstance(pair, str) else [tests, paired_gallery(pair, data)]


def _per_class(evaluation: Evaluation | None) -> Html:
    if evaluation is None or not any(evaluation.per_class.values()):
        return Html("")
    protocols = list(evaluation.per_class)
    count = max(len(values) for values in evaluation.per_class.values())
    rows = []
    for k in range(count):
        values = [column[k] if k < len(column) else None for column in evaluation.per_class.values()]
        rows.append((evaluation.class_name(k), values))
    rows.sort(key=lambda row: (row[1][0] is None, row[1][0] or 0.0))
    cells = [[name, *("-" if v is None else percent(v) for v in values)] for name, values in rows]
    caption = f"Accuracy of each class, weakest under “{protocols[0]}” first."
    listed = table(["Class", *(f"{p} %#" for p in protocols)], cells, caption=caption)
    return section("Classes", details(f"{count} classes", listed, opened=count <= _OPEN_PER_CLASS))


def _reproduction(run: Run) -> Html:
    metrics = run.metrics
    marked = [row for row in metrics.training if row.fingerprint is not None]
    values: dict[str, Any] = {"Command": _code(run.environment["command"]) if "command" in run.environment else None}
    if marked:
        values["Fingerprint"] = join([_code(marked[-1].fingerprint), f" at step {marked[-1].step:,}"], "")
    if metrics.replayed_equal or metrics.replayed_different:
        seen = metrics.replayed_equal + len(metrics.replayed_different)
        values["After resuming"] = f"{metrics.replayed_equal} of {seen} steps trained again have the same fingerprint"
    note = (
        "The fingerprint sums a hash of (epoch, position, sample) over all samples consumed: "
        "equal fingerprints mean the same data in the same order."
    )
    parts: list[Any] = [facts(values), tag("p", note, class_="note") if marked else ""]
    events = [event for event in metrics.events if event.name != "warning"]
    if events:
        rows = [[event.name, number(event.step), event.time or "-"] for event in events]
        parts.append(table(["Event", "Step#", "Time"], rows, caption="History of the run"))
    return section("Reproducing this run", *parts)


def _configuration(run: Run) -> Html:
    parts: list[Any] = []
    if run.config_text:
        parts.append(details("config.yaml, as resolved", tag("pre", shown_text(run.config_text.rstrip("\n")))))
    environment = {key: shown_value(value) for key, value in flatten(run.environment).items() if key}
    if environment:
        parts.append(details("Environment", facts(environment)))
    made = f"Made from {METRICS_NAME} and the files beside it; the same files give the same page."
    return section("Configuration and environment", *parts, tag("p", made, class_="note"))


def _code(value: Any) -> Html:
    text = " ".join(str(part) for part in value) if isinstance(value, list) else value
    return tag("code", text)
