"""Galleries: samples right under one run and wrong under another (the paper's figure 5), and the surest mistakes.

Which samples are shown is drawn by a fixed seed, so the same files give the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oat_dist.report.data import Run
from oat_dist.report.html import Html, image, join, section, tag
from oat_dist.report.pairs import Pair
from oat_dist.report.pictures import Picture, open_images, pictures

__all__ = ["mistakes", "paired_gallery"]

_SHOWN = 18
_EACH_WAY = 12


def mistakes(run: Run, data: str | None) -> Html:
    """The most confident wrong answers of a run, surest first."""
    title = "Most confident mistakes"
    shards = open_images(run, data)
    if isinstance(shards, str):
        return section(title, tag("p", f"No gallery: {shards}."))
    answers = run.predictions
    assert answers is not None and run.evaluation is not None
    predicted_N = answers.predicted.get(run.protocol)
    if predicted_N is None:
        return section(title, tag("p", f"No gallery: there are no answers under “{run.protocol}”."))
    wrong = np.flatnonzero(predicted_N != answers.labels_N)
    if not len(wrong):
        return section(title, tag("p", "No mistake at all."))
    confidence_N = answers.confidence.get(run.protocol)
    rows = np.random.default_rng(0).permutation(wrong)
    if confidence_N is not None:
        rows = rows[np.argsort(-confidence_N[rows], kind="stable")]  # of equally sure ones, as drawn
    rows = rows[:_SHOWN]
    name = run.evaluation.class_name
    captions = []
    for row in rows.tolist():
        sure = "" if confidence_N is None else f", {100 * confidence_N[row]:.0f}\u00a0%"
        captions.append(
            (f"{name(int(answers.labels_N[row]))}", [("✗", f"{name(int(predicted_N[row]))}{sure}", "answered")])
        )
    ids = answers.ids_N[rows].tolist()
    how = "surest first, with the probability of the wrong answer" if confidence_N is not None else "drawn at random"
    note = f"{len(rows)} of {len(wrong):,} wrong answers under “{run.protocol}”, {how}."
    return section(title, _tiles(ids, pictures(shards, ids), captions), note=note)


def paired_gallery(pair: Pair, data: str | None) -> Html:
    """Samples that only one of two runs has right, both ways round."""
    run, base = pair.run, pair.base
    names = run.name, base.name
    title = f"Right with {run.name}, wrong with {base.name}"
    if run.trained_with_oat and not base.trained_with_oat:
        names = "with OAT", "without"
        title = "Right with OAT, wrong without"
    shards = open_images(run, data)
    if isinstance(shards, str):  # the other run may know another place of the same data
        again = open_images(base, data)
        shards = shards if isinstance(again, str) else again
    if isinstance(shards, str):
        return section(title, tag("p", f"No gallery: {shards}."))
    ways = (
        (run, base, names, np.flatnonzero(pair.run_right_N & ~pair.base_right_N)),
        (base, run, names[::-1], np.flatnonzero(pair.base_right_N & ~pair.run_right_N)),
    )
    parts: list[Any] = []
    for number, (right, wrong, called, rows) in enumerate(ways):
        if number:
            parts.append(tag("h3", f"The other way round: right with {right.name}, wrong with {wrong.name}"))
        chosen = np.sort(np.random.default_rng(0).permutation(rows)[:_EACH_WAY])
        parts.append(
            tag("p", "There is none.")
            if not len(rows)
            else tag("p", f"{len(chosen)} of {len(rows):,} samples{_how(chosen, rows)}.", class_="note")
        )
        parts.append(_paired_tiles(shards, right, wrong, called, chosen))
    note = f"{run.name} under “{run.protocol}”, {base.name} under “{base.protocol}”."
    return section(title, *parts, note=note)


def _how(chosen: np.ndarray, rows: np.ndarray) -> str:
    return ", drawn at random" if len(chosen) < len(rows) else ": all of them"


def _paired_tiles(shards: Any, right: Run, wrong: Run, called: tuple[str, str], rows: np.ndarray) -> Html:
    answers, others = right.predictions, wrong.predictions
    assert answers is not None and others is not None and right.evaluation is not None
    name: Callable[[int], str] = right.evaluation.class_name
    captions = []
    for row in rows.tolist():
        label = name(int(answers.labels_N[row]))
        mistaken = name(int(others.predicted[wrong.protocol][row]))
        captions.append((label, [("✓", called[0], "right"), ("✗", f"{called[1]}: {mistaken}", "wrong")]))
    ids = answers.ids_N[rows].tolist()
    return _tiles(ids, pictures(shards, ids), captions)


def _tiles(
    ids: Sequence[int],
    images: Sequence[Picture | None],
    captions: Sequence[tuple[str, Sequence[tuple[str, str, str]]]],
) -> Html:
    """A list of images; of each the true class, and lines of (mark, text, how a listener hears it)."""
    tiles = []
    for sample_id, found, (label, lines) in zip(ids, images, captions, strict=True):
        if found is None:
            shown = tag("p", "cannot be decoded", class_="hole")
        else:
            alt = f"sample {sample_id}, {label}; " + "; ".join(f"{heard} {text}" for _, text, heard in lines)
            shown = image(found.uri, alt, found.width, found.height, "tiny" if found.tiny else "")
        words = [tag("b", label)]
        for mark, text, _ in lines:
            words.append(tag("span", join([tag("span", mark, class_="mark"), text], " "), class_="answer"))
        tiles.append(tag("li", join([tag("div", shown, class_="picture"), *words])))
    return tag("ul", join(tiles), class_="gallery")
