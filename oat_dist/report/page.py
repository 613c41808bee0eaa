"""What stands on the report page, from top to bottom: `render` is the table of contents."""

from __future__ import annotations

from typing import Any

from oat_dist.data.remote.fetch import shown_text
from oat_dist.report.curves import curves
from oat_dist.report.data import Evaluation, Run, Score, flatten, fraction, lookup, wilson
from oat_dist.report.html import Html, details, document, escape, facts, join, percent, section, table, tag
from oat_dist.report.metrics import METRICS_NAME, Metrics, Validation, utc_text

__all__ = ["render"]

_PROTOCOLS = {
    "argmax": "largest output, no anchor",
    "batch": "anchor of 32 test samples in a seeded order (the paper's)",
    "single": "each sample is its own batch",
    "dataset": "anchor of the whole evaluated split",
    "stored": "frozen training anchor: one image in, one answer out",
}
_OPEN_PER_CLASS = 20  # more classes than this start folded


def render(run: Run) -> str:
    """The report of a run as one HTML document."""
    return document(
        f"{run.name}: OAT run report",
        _header(run),
        _warnings(run),
        _accuracy(run),
        curves(run.metrics),
        _per_class(run.evaluation),
        _data_set(run),
        _reproduction(run),
        _configuration(run),
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
    precision = "fp32" if environment.get("precision") == "no" else environment.get("precision")
    summary = {
        "Model": lookup(run.config, "model.name"),
        "Machine": _joined(environment, {"device": "{}", "world_size": "{} rank(s)", "threads": "{} thread(s) each"}),
        "Engine": _joined(environment | {"precision": precision}, {"engine": "{}", "precision": "{}"}),
        "Versions": _joined(
            environment, {"oat_dist": "oat_dist {}", "torch": "torch {}", "accelerate": "accelerate {}"}
        ),
        "Started": utc_text(environment.get("started")) or None,
    }
    return tag("header", join([tag("h1", run.name), tag("p", status, class_="status"), facts(summary)]))


def _joined(values: dict[str, Any], forms: dict[str, str]) -> str | None:
    return ", ".join(form.format(values[key]) for key, form in forms.items() if values.get(key) is not None) or None


def _warnings(run: Run) -> Html:
    if not run.warnings:
        return Html("")
    items = tag("ul", join(tag("li", warning) for warning in run.warnings))
    return tag("aside", join([tag("strong", "Warnings"), items]), class_="warn", aria_label="Warnings")


def _accuracy(run: Run) -> Html:
    """The headline: the evaluation where there is one, else what is known, under its true name."""
    parts: list[Any] = []
    evaluation = run.evaluation
    if evaluation is not None and evaluation.scores:
        raw = evaluation.raw
        where = _joined(
            raw,
            {
                "split": "split “{}”",
                "checkpoint": "checkpoint {}",
                "epoch": "after epoch {}",
                "phase": "phase {}",
            },
        )
        parts += [
            tag("p", f"Evaluated: {where}.") if where else "",
            _score_table(evaluation.scores),
            _protocol_notes(evaluation.scores),
        ]
        parts += [_evaluation_best(evaluation), _ties(evaluation)]
    elif not run.metrics.validation:
        parts.append(tag("p", "Not evaluated, and no validation logged yet: this run has no accuracy to report."))
    else:
        last = run.metrics.validation[-1]
        rows = [row for row in run.metrics.validation if row.step == last.step]
        parts.append(
            tag(
                "p",
                "Not evaluated: there is no evaluation.json, which training writes at its end. "
                f"Below, the last validation in training, after epoch {last.epoch} on split “{last.split}”.",
            )
        )
        scores = [Score(row.protocol, row.accuracy, row.correct, row.total) for row in rows]
        parts += [_score_table(scores), _protocol_notes(scores)]
    if run.metrics.validation:
        parts += [_over_training(run.metrics), _validation_table(run.metrics)]
    return section("Accuracy", *parts)


def _score_table(scores: list[Score]) -> Html:
    rows = []
    for score in scores:
        interval = "-"
        if score.total:
            correct = score.correct if score.correct is not None else score.accuracy * score.total
            interval = " to ".join(f"{100 * bound:.2f}" for bound in wilson(correct, score.total))
        counts = f"{_number(score.correct)} / {_number(score.total)}"
        rows.append([score.protocol, tag("span", percent(score.accuracy), class_="main"), interval, counts])
    return table(["Protocol", "Accuracy %#", "95 % interval#", "Correct / total#"], rows, class_="headline")


def _protocol_notes(scores: list[Score]) -> Html:
    text = (
        "The prediction of a sample depends on the anchor it is tested with, so every accuracy names its "
        "protocol. Intervals are Wilson's and cover the choice of test samples only, not that of the seed."
    )
    meanings = {s.protocol: _PROTOCOLS[s.protocol] for s in scores if s.protocol in _PROTOCOLS}
    return tag("div", join([tag("p", text), facts(meanings)]), class_="note")


def _evaluation_best(evaluation: Evaluation) -> Html:
    best = evaluation.raw.get("best")
    if not isinstance(best, dict):
        return Html("")
    split = best.get("split", evaluation.raw.get("split"))
    checkpoint = best.get("checkpoint", best.get("step"))
    accuracy = fraction(best.get("accuracy"))
    what = f"Best checkpoint: {_step_name(checkpoint)}" if checkpoint is not None else "Best checkpoint"
    if accuracy is not None:
        what += f", {percent(accuracy)} %"
    what += f" under {best['protocol']}" if best.get("protocol") is not None else ""
    what += f", selected on “{split}”" if split is not None else ", selected on an unknown split"
    return tag("p", f"{what}: an optimistic number on the split that chose it.")


def _step_name(checkpoint: Any) -> str:
    return f"step {checkpoint:,}" if isinstance(checkpoint, int) else str(checkpoint)


def _ties(evaluation: Evaluation) -> Html:
    protocols = evaluation.raw.get("protocols")
    listed_ties = [one.get("ties") for one in protocols.values()] if isinstance(protocols, dict) else []
    ties = sorted({tie for found in listed_ties if isinstance(found, list) for tie in found if type(tie) is int})
    if not ties:
        return Html("")
    listed = ", ".join(str(sample) for sample in ties[:200]) + (", ..." if len(ties) > 200 else "")
    title = f"{len(ties):,} near-tied sample(s): the two best scores differ by less than 1e-5"
    return details(title, tag("p", f"Sample ids, whose label may depend on the layout: {listed}"))


def _over_training(metrics: Metrics) -> Html:
    rows = []
    for protocol in metrics.protocols:
        found = metrics.of_protocol(protocol)
        best, tail = max(found, key=lambda row: row.accuracy), found[-10:]
        mean = sum(row.accuracy for row in tail) / len(tail)
        rows.append(
            [
                protocol,
                f"{percent(found[-1].accuracy)} (epoch {found[-1].epoch})",
                f"{percent(mean)} ({len(tail)})",
                f"{percent(best.accuracy)} (epoch {best.epoch})",
            ]
        )
    splits = " and ".join(f"“{name}”" for name in sorted({row.split for row in metrics.validation}))
    caption = f"During training, on split {splits}. “Best” is selected on that very split, so it is optimistic."
    return table(["Protocol", "Last %#", "Mean of last (n) %#", "Best %#"], rows, caption=caption)


def _validation_table(metrics: Metrics) -> Html:
    by_epoch: dict[tuple[int, int], dict[str, Validation]] = {}
    for row in metrics.validation:
        by_epoch.setdefault((row.epoch, row.step), {})[row.protocol] = row
    rows = [
        [epoch, f"{step:,}", *(percent(found[p].accuracy) if p in found else "-" for p in metrics.protocols)]
        for (epoch, step), found in by_epoch.items()
    ]
    head = ["Epoch#", "Step#", *(f"{protocol} %#" for protocol in metrics.protocols)]
    return details(f"Every validation ({len(rows)})", table(head, rows))


def _per_class(evaluation: Evaluation | None) -> Html:
    if evaluation is None or not evaluation.per_class:
        return Html("")
    protocols = list(evaluation.per_class)
    count = max(len(values) for values in evaluation.per_class.values())
    names = evaluation.class_names
    rows = []
    for k in range(count):
        values = [column[k] if k < len(column) else None for column in evaluation.per_class.values()]
        rows.append((names[k] if k < len(names) else f"class {k}", values))
    rows.sort(key=lambda row: (row[1][0] is None, row[1][0] or 0.0))
    cells = [[name, *("-" if v is None else percent(v) for v in values)] for name, values in rows]
    caption = f"Accuracy of each class, weakest under “{protocols[0]}” first."
    listed = table(["Class", *(f"{p} %#" for p in protocols)], cells, caption=caption)
    return section("Classes", details(f"{count} classes", listed, opened=count <= _OPEN_PER_CLASS))


_DATA_FACTS = ("train_samples", "train_digest", "eval_samples", "eval_digest")


def _data_set(run: Run) -> Html:
    """What was trained on: the data settings, and the digests that name the bytes."""
    settings = flatten(run.config.get("data") or {})
    values = {key: _shown(value) for key, value in settings.items() if key}
    values |= {key: _code(value) for key, value in flatten(run.environment).items() if key in _DATA_FACTS}
    parts: list[Any] = [facts(values)] if values else [tag("p", "Neither config nor environment says anything of it.")]
    if run.evaluation is not None:
        total = run.evaluation.raw.get("total")
        parts.append(tag("p", f"Evaluated samples: {_number(total)}.") if type(total) is int else "")
        if run.evaluation.class_names:
            chips = tag("ul", join(tag("li", name) for name in run.evaluation.class_names), class_="chips")
            parts.append(details(f"{len(run.evaluation.class_names)} classes by name", chips))
    return section("Data set", *parts)


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
    if metrics.events:
        rows = [[event.name, _number(event.step), event.time or "-"] for event in metrics.events]
        parts.append(table(["Event", "Step#", "Time"], rows, caption="History of the run"))
    return section("Reproducing this run", *parts)


def _configuration(run: Run) -> Html:
    parts: list[Any] = []
    if run.config_text:
        parts.append(details("config.yaml, as resolved", tag("pre", shown_text(run.config_text.rstrip("\n")))))
    environment = {key: _shown(value) for key, value in flatten(run.environment).items() if key}
    if environment:
        parts.append(details("Environment", facts(environment)))
    parts.append(
        tag(
            "p",
            f"Made from {METRICS_NAME} and the files beside it; the same files give the same page.",
            class_="note",
        )
    )
    return section("Configuration and environment", *parts)


def _shown(value: Any) -> Any:
    """A config value in words of YAML: null, true, false instead of Python's names."""
    words = {None: "null", True: "true", False: "false"}
    return (
        words[value]
        if value is None or isinstance(value, bool)
        else escape(shown_text(value) if isinstance(value, str) else value)
    )


def _code(value: Any) -> Html:
    text = " ".join(str(part) for part in value) if isinstance(value, list) else value
    return tag("code", text)


def _number(value: Any) -> str:
    return f"{value:,}" if type(value) is int else "-"
