"""The data-set card: what was trained on and evaluated, out of the set's own manifests where they can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from oat_dist.data.manifest import Manifest
from oat_dist.data.remote.fetch import shown_text
from oat_dist.report.data import Run, flatten, lookup
from oat_dist.report.drawing import WIDTH, drawing, key, numbered_look, plain, to_svg
from oat_dist.report.html import Html, details, escape, facts, figure, join, section, table, tag
from oat_dist.report.pictures import read_manifest

__all__ = ["card", "shown_value"]

_BARS = 30  # classes up to which each has a bar of its own
_FACTS = ("train_samples", "train_digest", "eval_samples", "eval_digest")


def card(run: Run, data: str | None) -> Html:
    """Splits, class balance, classes by name, the data settings, and the digests that name the bytes."""
    manifests, reasons = _manifests(run, data)
    parts: list[Any] = []
    if manifests:
        parts += [_splits(manifests), _balance(manifests)]
    parts += [tag("p", f"{reason[0].upper()}{reason[1:]}.", class_="note") for reason in dict.fromkeys(reasons)]
    if run.evaluation is not None:
        total, bad = run.evaluation.raw.get("total"), run.evaluation.raw.get("undecodable")
        if type(total) is int:
            left_out = f"; {bad:,} undecodable ones left out" if type(bad) is int and bad else ""
            parts.append(tag("p", f"Evaluated samples: {total:,}{left_out}."))
    names = next((m.classes for m in manifests.values()), run.evaluation.class_names if run.evaluation else [])
    if names:
        chips = tag("ol", join(tag("li", name) for name in names), class_="chips", start="0")
        parts.append(details(f"{len(names):,} classes by name", chips))
    settings = flatten(run.config.get("data") or {})
    values = {key: shown_value(value) for key, value in settings.items() if key}
    digests = {key: tag("code", v) for key, v in flatten(run.environment).items() if key in _FACTS and v is not None}
    if digests:
        parts.append(facts(digests))
    if values:
        parts.append(details("Data settings", facts(values), printed=False))
    if not parts:
        parts.append(tag("p", "Neither config nor environment says anything of it."))
    return section("Data set", *parts)


def _manifests(run: Run, data: str | None) -> tuple[dict[str, Manifest], list[str]]:
    """By split, and why others are missing."""
    if data is None and not lookup(run.config, "data.path"):
        return {}, []
    found: dict[str, Manifest] = {}
    reasons: list[str] = []
    wanted = {"train": lookup(run.config, "data.train_split"), "eval": lookup(run.config, "data.eval_split")}
    for what, split in wanted.items():
        if not isinstance(split, str) or (what == "train" and lookup(run.config, "data.mode") == "stream"):
            continue
        manifest = read_manifest(run, split, run.environment.get(f"{what}_digest"), data)
        if isinstance(manifest, str):
            reasons.append(manifest)
        else:
            found[split] = manifest
    return found, reasons


def _splits(manifests: Mapping[str, Manifest]) -> Html:
    rows = []
    for split, manifest in manifests.items():
        counts = [count for count in manifest.class_counts if count]
        balance = f"{min(counts):,} to {max(counts):,}" if counts else "-"
        rows.append(
            [
                split,
                f"{manifest.num_samples:,}",
                f"{len(manifest.classes):,}",
                balance,
                _sizes(manifest.image_sizes),
                _bytes(manifest.num_bytes),
                f"{len(manifest.shards):,}",
                f"{len(manifest.skipped):,}",
                shown_text(manifest.source),
            ]
        )
    head = [
        *("Split", "Samples#", "Classes#", "Samples a class#", "Pixels: least, median, most", "Images#", "Shards#"),
        *("Left out#", "Source"),
    ]
    return table(head, rows)


def _sizes(sizes: Mapping[str, Sequence[int]]) -> str:
    texts = ["{} x {}".format(*sizes[key]) for key in ("min", "median", "max") if key in sizes]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts) or "-"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count:,} bytes"


def _balance(manifests: Mapping[str, Manifest]) -> Html:
    classes = next(iter(manifests.values())).classes
    columns = {
        split: dict(zip(manifest.classes, manifest.class_counts, strict=True)) for split, manifest in manifests.items()
    }
    if len(classes) <= _BARS:
        return figure("Class balance", _bars(classes, columns), "Samples of each class, in each split.", class_="wide")
    looks = {split: numbered_look(number) for number, split in enumerate(columns)}
    with drawing("balance") as name:
        sheet = Figure(figsize=(WIDTH, 2.6))
        axes = sheet.add_subplot(1, 1, 1)
        for split, counts in columns.items():
            values = sorted(counts.values(), reverse=True)
            axes.plot(range(1, len(values) + 1), values, color=looks[split].colour, linestyle=looks[split].line)
        axes.set_ylim(0, None)
        axes.set_xlabel("class, by number of samples")
        axes.set_ylabel("samples")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(plain))
        drawn = to_svg(sheet, name, f"Line chart. Samples of each of {len(classes):,} classes, largest class first.")
    legend = key([(look, split) for split, look in looks.items()])
    return figure("Class balance", join([drawn, legend]), f"{len(classes):,} classes, largest first.", class_="half")


def _bars(classes: Sequence[str], columns: Mapping[str, Mapping[str, int]]) -> Html:
    head = [tag("th", "Class", scope="col"), *(tag("th", split, scope="col") for split in columns)]
    rows = []
    for name in classes:
        cells = [tag("th", name, scope="row")]
        for counts in columns.values():
            count, most = counts.get(name, 0), max([1, *counts.values()])
            width = f"width:{100 * count / most:.4g}%"
            bar = tag("span", tag("span", "", class_="bar", style=width), class_="track")
            cells.append(tag("td", join([bar, tag("span", f"{count:,}", class_="count")], "")))
        rows.append(tag("tr", join(cells, "")))
    body = [tag("thead", tag("tr", join(head, ""))), tag("tbody", join(rows))]
    return tag("div", tag("table", join(body), class_="bars"), class_="scroll")


def shown_value(value: Any) -> Any:
    """A config value in words of YAML: null, true, false instead of Python's names; URLs without their secrets."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return escape(shown_text(value) if isinstance(value, str) else value)
