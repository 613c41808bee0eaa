"""What the evaluate command says: tables for people, one JSON object for programs, a CSV of every sample."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oat_dist.calibration import Calibration
from oat_dist.checkpoint import Checkpoint
from oat_dist.commands.evaluation_subject import Subject
from oat_dist.errors import OatError
from oat_dist.files import write_named
from oat_dist.inference.writers import printable
from oat_dist.measures import PairedTest, paired_test
from oat_dist.results import Evaluation

__all__ = ["Found", "show"]

_LISTED = 3  # weakest classes and most confused pairs in the printed summary


@dataclass(frozen=True)
class Found:
    """Everything an evaluation found; `reference` is the run compared with."""

    checkpoint: Checkpoint
    classes: list[str]
    evaluation: Evaluation
    facts: dict[str, Any]
    fitted: Calibration | None
    fit_problem: str | None
    reference: tuple[Subject, Evaluation] | None

    def paired(self, names: Sequence[str]) -> dict[str, tuple[str, PairedTest]]:
        """By protocol: the protocol of the reference it is compared with, and the test."""
        if self.reference is None:
            return {}
        other = self.reference[1]
        pairs = {}
        for name in names:
            theirs = name if name in other.protocols else next(iter(other.protocols))
            pairs[name] = (theirs, paired_test(self.evaluation.right_N(name), other.right_N(theirs)))
        return pairs


def show(arguments: argparse.Namespace, found: Found) -> None:
    """Print the tables or the JSON object, and write the files that were asked for."""
    names = arguments.protocol or list(found.evaluation.protocols)
    pairs = found.paired(names)
    values = _values(found, names, pairs)
    if arguments.json:
        print(json.dumps(values, indent=1))
    else:
        _print_table(found, values, names)
        _print_pairs(found, pairs)
        if found.fitted is not None:
            _print_fitted(found, arguments.prior)
    if arguments.predictions is not None:  # what fails here costs no answer
        _write_predictions(arguments.predictions, found.evaluation, names)
    if arguments.output is not None:
        _write(arguments.output, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    if arguments.json:
        return
    for path in (arguments.output, arguments.predictions):
        if path is not None:
            print(f"written: {path}")
    if arguments.save:
        folder = found.checkpoint.folder.parent.parent
        print(f"saved in {folder}; next: oat-dist report {folder}")


def _values(found: Found, names: Sequence[str], pairs: dict[str, tuple[str, PairedTest]]) -> dict[str, Any]:
    summary = found.evaluation.summary(found.classes)
    for key in ("protocols", "per_class", "confusion"):
        summary[key] = {name: summary[key][name] for name in names}
    values = found.facts | summary
    if found.fitted is not None:
        values["temperature"] = asdict(found.fitted)
    if found.reference is not None:
        tests = {name: {"protocol": theirs, **asdict(test)} for name, (theirs, test) in pairs.items()}
        values["against"] = {"checkpoint": str(found.reference[0].checkpoint.folder), "protocols": tests}
    return values


def _print_table(found: Found, values: dict[str, Any], names: Sequence[str]) -> None:
    print(f"{found.checkpoint.folder} on {values['split']}: {values['total']:,} samples, {len(found.classes)} classes")
    head = f"{'protocol':<9} {'accuracy':>8} {'95% interval':>15} {'balanced':>9} {'top-5':>8} {'Brier':>7}"
    print(f"{head} {'correct':>9} {'ties':>5}")
    for name in names:
        row = values["protocols"][name]
        interval = f"{100 * row['interval'][0]:.2f} to {100 * row['interval'][1]:.2f}"
        top5 = "-" if row["top5"] is None else f"{row['top5']:.2%}"
        print(
            f"{name:<9} {row['accuracy']:>8.2%} {interval:>15} {row['balanced_accuracy']:>9.2%} {top5:>8} "
            f"{row['brier']:>7.4f} {row['correct']:>9,} {len(row['ties']):>5}"
        )
    seeds = values["protocols"].get("batch", {}).get("seeds")
    if seeds and seeds["count"] > 1:
        spread = f"mean {seeds['mean']:.2%}, standard deviation {100 * seeds['std']:.2f}"
        print(f"batch over {seeds['count']} seeds of its groups: {spread} ({seeds['min']:.2%} to {seeds['max']:.2%})")
    _print_weak_points(found, values, names)
    if values["calibrated"] and values["calibrated_protocol"] in names:
        print(f"{values['calibrated_protocol']}: with a temperature fitted on {values['calibrated_on']}")
    if values["undecodable"]:
        print(f"{values['undecodable']} undecodable sample(s) left out; list them with shards/verify.py")


def _print_weak_points(found: Found, values: dict[str, Any], names: Sequence[str]) -> None:
    """Under the protocol that answers single images where it is shown, else the first."""
    name = next((n for n in ("stored", "argmax") if n in names), names[0])
    shares = [(share, k) for k, share in enumerate(values["per_class"][name]) if share is not None]
    if len(shares) < 3:
        return
    classes = [printable(name) for name in found.classes]
    weakest = ", ".join(f"{classes[k]} {share:.1%}" for share, k in sorted(shares)[:_LISTED])
    print(f"weakest classes ({name}): {weakest}")
    wrong = sorted(((n, t, p) for t, p, n in values["confusion"][name] if t != p), key=lambda cell: (-cell[0], cell))
    if wrong:
        pairs = ", ".join(f"{classes[t]} as {classes[p]} ({n})" for n, t, p in wrong[:_LISTED])
        print(f"most confused ({name}): {pairs}")


def _print_pairs(found: Found, pairs: dict[str, tuple[str, PairedTest]]) -> None:
    if found.reference is None:
        return
    other, evaluation = found.reference
    print(f"\nagainst {other.checkpoint.folder} ({evaluation})")
    head = f"{'protocol':<20} {'difference':>10} {'95% interval':>16}"
    print(f"{head} {'only here':>10} {'only there':>11} {'McNemar p':>10}")
    for name, (theirs, test) in pairs.items():
        low, high = test.interval
        print(
            f"{name if name == theirs else f'{name} - {theirs}':<20} {100 * test.difference:>+10.2f} "
            f"{f'{100 * low:+.2f} to {100 * high:+.2f}':>16} {test.only_first:>10,} {test.only_second:>11,} "
            f"{test.p_value:>10.3g}"
        )
    print("(one pair of trainings: the interval covers the choice of test samples, not that of the seed)")


def _print_fitted(found: Found, prior: str) -> None:
    fitted = found.fitted
    assert fitted is not None
    print(
        f"\ntemperature {fitted.temperature:.4g}, fitted on {fitted.samples:,} samples of {found.facts['split']}. "
        f"Each half judged with the other's temperature:\n"
        f"  Brier score {fitted.brier[0]:.4f} -> {fitted.brier[1]:.4f}, calibration error "
        f"{fitted.ece[0]:.4f} -> {fitted.ece[1]:.4f}, log-likelihood {-fitted.nll:.4f}\n"
        f"next: oat-dist predict {shlex.quote(str(found.checkpoint.folder))} IMAGE... --calibrated"
        + ("" if prior == "training" else f" --prior {shlex.quote(prior)}")
    )


def _write_predictions(path: Path, evaluation: Evaluation, names: Sequence[str]) -> None:
    lines = [",".join(["id", "label", *names])]
    columns = [evaluation.ids_N, evaluation.labels_N, *(evaluation.protocols[name].predicted_N for name in names)]
    lines += [",".join(map(str, row)) for row in zip(*(column.tolist() for column in columns), strict=True)]
    _write(path, "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        write_named(path, text.encode(errors="backslashreplace"))  # class names may hold lone surrogates
    except OSError as error:
        raise OatError(f"{path}: cannot be written ({error.strerror})") from error
