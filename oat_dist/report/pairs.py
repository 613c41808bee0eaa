"""Two runs on the same samples: which of them is right where, and whether the difference is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oat_dist.measures import PairedTest, paired_test
from oat_dist.report.data import Run
from oat_dist.report.html import Html, number, table, tag

__all__ = ["Pair", "compare_pair", "p_text", "paired_table", "points", "signed"]


@dataclass(frozen=True)
class Pair:
    """A run against its base on the samples (N,) of both, each under the protocol of its own headline."""

    run: Run
    base: Run
    test: PairedTest
    run_right_N: np.ndarray
    base_right_N: np.ndarray

    def oat_first(self) -> Pair:
        """The same with the run that was trained with OAT first, where only one was."""
        if self.run.trained_with_oat or not self.base.trained_with_oat:
            return self
        turned = compare_pair(self.base, self.run)
        assert isinstance(turned, Pair)
        return turned


def compare_pair(run: Run, base: Run) -> Pair | str:
    """The comparison, or why there is none: the answers must be to the same samples of the same data set."""
    for one in (run, base):
        if one.predictions is None:
            return f"{one.name} has no evaluation.safetensors; write it with oat-dist evaluate RUN --save"
        if one.protocol not in one.predictions.predicted:
            return f"{one.name} has no answers under “{one.protocol}”"
    mine, theirs = run.predictions, base.predictions
    assert mine is not None and theirs is not None
    if mine.split != theirs.split:
        return f"{run.name} was evaluated on split “{mine.split}”, {base.name} on “{theirs.split}”"
    if not len(mine.ids_N):
        return f"{run.name} was evaluated on no sample"
    if mine.digest != theirs.digest:
        return f"{run.name} and {base.name} were evaluated on different data sets: their digests differ"
    if not np.array_equal(mine.ids_N, theirs.ids_N) or not np.array_equal(mine.labels_N, theirs.labels_N):
        return f"{run.name} and {base.name} were not evaluated on the same samples (undecodable images?)"
    right_N, base_right_N = mine.right_N(run.protocol), theirs.right_N(base.protocol)
    return Pair(run, base, paired_test(right_N, base_right_N), right_N, base_right_N)


def paired_table(pairs: Sequence[Pair | str], labels: Sequence[str], base: Run) -> Html:
    """A row for each comparison with `base`; where there is none the reason stands below."""
    rows = []
    for label, pair in zip(labels, pairs, strict=True):
        if isinstance(pair, str):
            continue
        test = pair.test
        rows.append(
            [
                label,
                tag("span", points(test.difference), class_="main"),
                " to ".join(map(points, test.interval)),
                number(test.only_first),
                number(test.only_second),
                p_text(test.p_value),
            ]
        )
    compared = {id(one): one for pair in pairs if isinstance(pair, Pair) for one in (pair.base, pair.run)}.values()
    saved = [
        f"{one.name} (split “{one.predictions.split}”, checkpoint {one.predictions.checkpoint})"
        for one in compared
        if one.predictions is not None and not one.evaluated_last
    ]
    missing = [tag("p", f"Saved answers, not those of the headline: {', '.join(saved)}.")] if saved else []
    missing += [tag("p", f"Not compared: {pair}.") for pair in pairs if isinstance(pair, str)]
    head = [
        "Run",
        "Difference, points#",
        "95 % interval#",
        "Only it right#",
        f"Only {base.name} right#",
        "McNemar's p#",
    ]
    parts = [table(head, rows, class_="headline")] if rows else []
    return tag("div", Html("\n".join([*parts, *missing])))


PAIRED_NOTE = (
    "Differences in accuracy on the same samples, in percentage points. The interval is a bootstrap over samples, "
    "p that of McNemar's exact two-sided test. Both cover the choice of test samples, not that of the seed: another "
    "seed of training may turn a difference around."
)


def points(fraction: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return signed(100 * fraction)


def signed(value: float) -> str:
    """Two digits and a sign."""
    return f"{value:+.2f}"


def p_text(p_value: float) -> str:
    """A p-value as it is written."""
    return "< 0.0001" if p_value < 0.0001 else f"{p_value:.4f}"
