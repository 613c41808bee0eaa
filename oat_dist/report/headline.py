"""The section on accuracy: the headline by protocol, what selected what, and how it went over training."""

from __future__ import annotations

from typing import Any

from oat_dist.report.data import Run, wilson
from oat_dist.report.evaluation import Evaluation, Score, fraction
from oat_dist.report.html import Html, details, facts, join, number, percent, section, table, tag
from oat_dist.report.metrics import Metrics, Validation, phase_name

__all__ = ["accuracy", "interval_of", "interval_text"]

_PROTOCOLS = {
    "argmax": "largest output, no anchor",
    "batch": "anchor of {group} test samples in a seeded order (the paper's)",
    "single": "each sample is its own batch",
    "dataset": "anchor of the whole evaluated split",
    "stored": "frozen training anchor: one image in, one answer out",
    "ordinary": "classes as frequent as in training",
    "balanced": "classes equally frequent: prior 1/C instead of that of training",
    "given": "a class prior given on the command line",
}


def accuracy(run: Run) -> Html:
    """The headline: the evaluation where there is one, else what is known, under its true name."""
    parts: list[Any] = []
    evaluation, validation = run.evaluation, run.metrics.validation
    if evaluation is not None and evaluation.scores:
        if not run.evaluated_last:
            last, chosen = run.last_validation[-1], run.selected_on
            other = "was selected on that very split" if chosen else "is not of this validation"
            parts.append(
                tag(
                    "p",
                    f"Headline: the last epoch ({last.epoch}) on split “{last.split}”. The evaluated checkpoint, "
                    f"further down, {other}.",
                )
            )
            parts += [_score_table(run.scores), _protocol_notes(run.scores, 32)]
            parts.append(tag("h3", f"Evaluated checkpoint, selected on {chosen}" if chosen else _true_name(evaluation)))
        group = evaluation.raw.get("group_size")
        parts += [
            _where(evaluation),
            _score_table(evaluation.scores),
            _seeds(evaluation),
            _protocol_notes(evaluation.scores, group if type(group) is int else 32),
        ]
        parts += [_best(evaluation), _ties(evaluation)]
    elif not validation:
        parts.append(tag("p", "Not evaluated, and no validation logged yet: this run has no accuracy to report."))
    else:
        last = validation[-1]
        parts.append(
            tag(
                "p",
                "Not evaluated: there is no evaluation.json, which training writes at its end. "
                f"Below, the last validation in training, after epoch {last.epoch} on split “{last.split}”.",
            )
        )
        parts += [_score_table(run.scores), _protocol_notes(run.scores, 32)]
    if validation:
        parts += [_over_training(run.metrics), _validation_table(run.metrics)]
    return section("Accuracy", *parts)


def interval_of(score: Score) -> tuple[float, float] | None:
    """The 95 % interval of an accuracy: the evaluation's own, else Wilson's."""
    if score.interval is not None:
        return score.interval
    if not score.total:
        return None
    return wilson(score.correct if score.correct is not None else score.accuracy * score.total, score.total)


def interval_text(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else " to ".join(percent(bound) for bound in bounds)


def _true_name(evaluation: Evaluation) -> str:
    """What an evaluation that is not the headline is of."""
    split, checkpoint = evaluation.raw.get("split"), evaluation.raw.get("checkpoint")
    name = "Saved evaluation" + (f" of checkpoint {checkpoint}" if checkpoint is not None else "")
    return name + (f" on split “{split}”" if split is not None else "")


def _where(evaluation: Evaluation) -> Html:
    raw = evaluation.raw
    forms = {"split": "split “{}”", "checkpoint": "checkpoint {}", "epoch": "after epoch {}", "phase": "phase {}"}
    values = raw | ({"phase": phase_name(raw["phase"])} if isinstance(raw.get("phase"), str) else {})
    said = [form.format(values[key]) for key, form in forms.items() if values.get(key) is not None]
    said += [f"class prior {raw['prior']}"] if raw.get("prior") not in (None, "training") else []
    said += ["calibrated probabilities"] if raw.get("calibrated") is True else []
    where = ", ".join(said)
    return tag("p", f"Evaluated: {where}.") if where else Html("")


def _score_table(scores: list[Score]) -> Html:
    measured = [score for score in scores if score.balanced is not None]
    head = ["Protocol", "Accuracy %#", "95 % interval#"]
    head += ["Top-5 %#"] if any(score.top5 is not None for score in scores) else []
    head += ["Balanced %#"] if measured else []
    head += ["Brier#"] if any(score.brier is not None for score in scores) else []
    head += ["Correct / total#"]
    rows = []
    for score in scores:
        row: list[Any] = [
            score.protocol,
            tag("span", percent(score.accuracy), class_="main"),
            interval_text(interval_of(score)),
        ]
        if "Top-5 %#" in head:
            row.append("-" if score.top5 is None else percent(score.top5))
        if "Balanced %#" in head:
            row.append(_balanced(score))
        if "Brier#" in head:
            row.append("-" if score.brier is None else f"{score.brier:.4f}")
        rows.append([*row, f"{number(score.correct)} / {number(score.total)}"])
    return table(head, rows, class_="headline")


def _balanced(score: Score) -> Any:
    if score.balanced is None:
        return "-"
    if score.balanced_interval is None:
        return percent(score.balanced)
    return join([percent(score.balanced), tag("small", interval_text(score.balanced_interval))], " ")


def _seeds(evaluation: Evaluation) -> Html:
    lines = []
    for score in evaluation.scores:
        if (seeds := score.seeds) is not None and seeds.count > 1:
            lines.append(
                f"Under “{score.protocol}” with {seeds.count} seeds of the groups: {percent(seeds.mean)} ± "
                f"{percent(seeds.std)} % (mean ± standard deviation; {percent(seeds.low)} to {percent(seeds.high)})."
            )
    return join([tag("p", line) for line in lines])


def _protocol_notes(scores: list[Score], group: int) -> Html:
    own = [score for score in scores if score.interval is None and score.total]
    text = "The prediction of a sample depends on the anchor it is tested with, so every accuracy names its protocol. "
    text += "Intervals are Wilson's" if own else "Intervals are a bootstrap over samples"
    text += " and cover the choice of test samples only, not that of the seed."
    if any(score.balanced is not None for score in scores):
        text += " Balanced: the mean of the classes' accuracies."
    if any(score.brier is not None for score in scores):
        text += " Brier: mean squared distance of the probabilities from the label, 0 to 2, less is better."
    meanings = {s.protocol: _PROTOCOLS[s.protocol].format(group=group) for s in scores if s.protocol in _PROTOCOLS}
    return tag("div", join([tag("p", text), facts(meanings)]), class_="note")


def _best(evaluation: Evaluation) -> Html:
    best = evaluation.raw.get("best")
    if not isinstance(best, dict) or not best:
        return Html("")
    split = best.get("split", evaluation.raw.get("split"))
    checkpoint = best.get("checkpoint", best.get("step"))
    share = fraction(best.get("accuracy"))
    what = "Best checkpoint"
    if checkpoint is not None:
        what += f": step {checkpoint:,}" if isinstance(checkpoint, int) else f": {checkpoint}"
    what += f", {percent(share)} %" if share is not None else ""
    what += f" under {best['protocol']}" if best.get("protocol") is not None else ""
    what += f", selected on “{split}”" if split is not None else ", selected on an unknown split"
    return tag("p", f"{what}: an optimistic number on the split that chose it.")


def _ties(evaluation: Evaluation) -> Html:
    protocols = evaluation.raw.get("protocols")
    listed_ties = [one.get("ties") for one in protocols.values() if isinstance(one, dict)] if protocols else []
    ties = sorted({tie for found in listed_ties if isinstance(found, list) for tie in found if type(tie) is int})
    if not ties:
        return Html("")
    listed = ", ".join(str(sample) for sample in ties[:200]) + (", ..." if len(ties) > 200 else "")
    title = f"{len(ties):,} near-tied sample(s): the two best scores differ by less than 1e-5"
    listing = tag("p", f"Sample ids, whose label may depend on the layout: {listed}")
    return details(title, listing, printed=False)


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
    return details(f"Every validation ({len(rows)})", table(head, rows), printed=False)
