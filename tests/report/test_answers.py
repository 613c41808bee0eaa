"""What a report makes of the answers to each sample: confusions, galleries, tests of pairs, the data-set card."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_runs import OAT_PROTOCOLS, Made, answers, make_run
from page_checks import Page
from PIL import Image
from safetensors.numpy import load_file, save_file

from oat_dist.data.index import ShardSet
from oat_dist.data.packing import write_shards
from oat_dist.data.packing.samples import Sample
from oat_dist.data.storage import ShardReader
from oat_dist.measures import paired_test
from oat_dist.report import write_comparison, write_report
from oat_dist.report.card import card
from oat_dist.report.confusion import confusion, top_pairs
from oat_dist.report.curves import curves
from oat_dist.report.data import Run, read_run
from oat_dist.report.gallery import mistakes
from oat_dist.report.headline import accuracy
from oat_dist.report.html import Html, warning_list
from oat_dist.report.metrics import utc_text
from oat_dist.report.page import compared
from oat_dist.report.timing import duration, read_timing, timing_section

HOSTILE = ('<img src=x onerror="alert(1)">', "naïve 猫", 'quo"te & <b>')


@pytest.fixture
def run(digits: dict[str, ShardSet], tmp_path: Path) -> Path:
    return make_run(tmp_path / "oat", digits["test"], Made())


@pytest.fixture
def base(digits: dict[str, ShardSet], tmp_path: Path) -> Path:
    return make_run(tmp_path / "ce", digits["test"], Made(oat=False, skill=0.7))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def parts(run: Path, *sections: Callable[[Run], Html]) -> Page:
    """Some sections of a report: most of a whole page's time goes into its curves."""
    read = read_run(run)
    return Page("\n".join([*(section(read) for section in sections), str(warning_list(read.warnings))]))


def gallery(run: Run) -> Html:
    return mistakes(run, None)


def data_set(run: Run) -> Html:
    return card(run, None)


def images(page: Page) -> list[Image.Image]:
    uris = [value for name, value in page.attributes if name == "src"]
    assert all(uri.startswith("data:image/") for uri in uris)
    return [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))) for uri in uris]


def test_the_matrix_has_every_count_and_the_pairs_are_the_most_frequent(run: Path, digits: dict[str, ShardSet]) -> None:
    labels_N = digits["test"].index.label
    predicted_N, _ = answers(digits["test"], Made(), "batch")
    page = parts(run, confusion)
    matrix = page.source[page.source.index('class="confusion"') :]
    cells = re.findall(r'<td class="([de])[^"]*">([^<]*)</td>', matrix[: matrix.index("</table>")])
    assert len(cells) == 100 and [kind for kind, _ in cells].count("d") == 10
    for number, (kind, text) in enumerate(cells):
        true, predicted = divmod(number, 10)
        count = int(((labels_N == true) & (predicted_N == predicted)).sum())
        assert text == (str(count) if count else "·") and (kind == "d") == (true == predicted)
    wrong = [(int(t), int(p)) for t, p in zip(labels_N, predicted_N, strict=True) if t != p]
    most = max(wrong.count(pair) for pair in set(wrong))
    first = re.search(r"Samples Share % (\d+) → (\d+) (\d+) ([\d.]+)", page.section("Confusion"))
    assert first is not None and int(first[3]) == most == wrong.count((int(first[1]), int(first[2])))
    assert float(first[4]) == pytest.approx(100 * most / int((labels_N == int(first[1])).sum()), abs=0.06)
    assert page.tags.count("details") == 3  # the other protocols, folded


def test_pairs_are_ordered_and_shares_are_of_the_true_class() -> None:
    cells = {(0, 0): 6, (0, 1): 4, (1, 0): 4, (1, 1): 36, (2, 1): 5}
    assert top_pairs(cells) == [(2, 1, 5, 1.0), (0, 1, 4, 0.4), (1, 0, 4, 0.1)]
    assert top_pairs(cells, 1) == [(2, 1, 5, 1.0)] and top_pairs({(0, 0): 3}) == []


@pytest.mark.parametrize("classes", [25, 101, 300])
def test_many_classes_are_a_heat_map_and_beyond_200_pairs_alone(tmp_path: Path, classes: int) -> None:
    samples = [Sample(f"{i:04d}.png", f"class {i % classes:03d} of some name", PIXEL) for i in range(2 * classes)]
    shards = write_shards(samples, tmp_path / "set" / "test", shard_samples=1000)
    run = make_run(tmp_path / "run", shards, Made(epochs=6, pretrain=2))
    page = parts(run, confusion, lambda read: curves(read.metrics, shards.classes))
    heat = [value for name, value in page.attributes if name == "aria-label" and value.startswith("Heat map")]
    assert len(heat) == (0 if classes > 200 else 2)  # confusion, and anchors by class
    assert page.source.count("too many to draw") == (2 if classes > 200 else 0)
    assert "Most confused pairs" in page.text and 'class="confusion"' not in page.source
    if classes == 25:
        assert ">class 000…ome name</text>" in page.source
    # one path a shade, not one a cell
    assert page.source.count('class="diagonal"') <= 10 and len(page.source) < 700_000


PIXEL = (lambda file: (Image.new("RGB", (2, 2), (200, 30, 30)).save(file, "PNG"), file.getvalue())[1])(io.BytesIO())


def test_the_gallery_shows_the_surest_mistakes(run: Path, digits: dict[str, ShardSet]) -> None:
    labels_N = digits["test"].index.label
    predicted_N, confidence_N = answers(digits["test"], Made(), "batch")
    wrong = np.flatnonzero(predicted_N != labels_N)
    page = parts(run, gallery)
    alts = [value for name, value in page.attributes if name == "alt"]
    shown = [int(re.match(r"sample (\d+),", alt)[1]) for alt in alts]  # type: ignore[index]
    assert len(shown) == 18 and set(shown) <= set(wrong.tolist())
    assert sorted(confidence_N[shown]) == sorted(confidence_N[wrong])[-18:]
    assert list(confidence_N[shown]) == sorted(confidence_N[shown], reverse=True)
    first = shown[0]
    assert alts[0] == (
        f"sample {first}, {labels_N[first]}; answered {predicted_N[first]}, {100 * confidence_N[first]:.0f}\u00a0%"
    )
    assert f"18 of {len(wrong)} wrong answers" in page.section("Most confident mistakes")
    pictures = images(page)
    assert {picture.size for picture in pictures} == {(8, 8)} and {picture.format for picture in pictures} == {"PNG"}
    data = ShardReader(digits["test"]).read(first)
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_photos_are_thumbnails_and_what_cannot_be_decoded_is_said(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((400, 300), 60).convert("RGB").save(file, "JPEG")
    samples = [Sample(f"{i:02d}.jpg", f"class {i % 3}", file.getvalue()) for i in range(40)]
    shards = write_shards(samples, tmp_path / "set" / "test", shard_samples=50)
    run = make_run(tmp_path / "run", shards, Made(skill=0.5))
    page = parts(run, gallery)
    assert {picture.size for picture in images(page)} == {(160, 120)}
    assert {picture.format for picture in images(page)} == {"JPEG"}
    row = shards.row(int(re.findall(r'alt="sample (\d+)', page.source)[0]))
    with (shards.folder / shards.manifest.shards[0].name).open("r+b") as tar:  # damaged after it was packed
        tar.seek(row[1])
        tar.write(b"\0" * row[2])
    text = parts(run, gallery).section("Most confident mistakes")
    assert text.count("cannot be decoded") == 1


def test_right_with_oat_and_wrong_without(run: Path, base: Path, digits: dict[str, ShardSet]) -> None:
    labels_N = digits["test"].index.label
    mine_N = answers(digits["test"], Made(), "batch")[0] == labels_N
    theirs_N = answers(digits["test"], Made(oat=False, skill=0.7), "argmax")[0] == labels_N
    test = paired_test(mine_N, theirs_N)
    assert write_report(run, against=base) == run / "report.html"
    page = Page(run / "report.html")
    table = page.section("Compared with ce")
    low, high = test.interval
    row = f"oat {100 * test.difference:+.2f} {100 * low:+.2f} to {100 * high:+.2f} {test.only_first} {test.only_second}"
    assert f"{row} {test.p_value:.4f}" in table or f"{row} < 0.0001" in table
    section = page.section("Right with OAT, wrong without")
    counts = test.only_first, test.only_second
    assert min(counts) > 0
    for count in counts:
        assert f"{min(12, count)} of {count} samples" in section
    ways = page.source[page.source.index("<h2>Right with OAT") :].partition("</section>")[0].split("The other way")
    for way, right_N, wrong_N in ((ways[0], mine_N, theirs_N), (ways[1], theirs_N, mine_N)):
        shown = [int(n) for n in re.findall(r'alt="sample (\d+)', way)]
        assert len(shown) == min(12, int((right_N & ~wrong_N).sum())) and all(
            right_N[n] and not wrong_N[n] for n in shown
        )
    first = run.joinpath("report.html").read_bytes()
    write_report(run, against=base)
    assert run.joinpath("report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "ce has no evaluation.safetensors; write it with oat-dist evaluate RUN --save"),
        ("another set", "were evaluated on different data sets: their digests differ"),
        ("another split", "was evaluated on split “test”, ce on “val”"),
        ("other samples", "were not evaluated on the same samples"),
    ],
)
def test_runs_that_cannot_be_compared_say_why(run: Path, base: Path, damage: str, said: str) -> None:
    path = base / "evaluation.safetensors"
    tensors = load_file(path)
    facts = {"checkpoint": "step-480", "split": "test", "eval_digest": read_run(base).predictions.digest}  # type: ignore[union-attr]
    if damage == "missing":
        path.unlink()
    elif damage == "another set":
        save_file(tensors, path, metadata=facts | {"eval_digest": "0" * 64})
    elif damage == "another split":
        save_file(tensors, path, metadata=facts | {"split": "val"})
    else:  # a wrong one left out, so that what is right still agrees with evaluation.json
        last = int(np.flatnonzero(tensors["predicted.argmax"] != tensors["labels"])[-1])
        save_file({name: np.delete(t, last) for name, t in tensors.items()}, path, metadata=facts)
    (section,) = compared(read_run(run), read_run(base), None)
    assert said in Page(section).section("Compared with ce")


def test_a_set_that_moved_or_is_another_gives_no_gallery_and_says_so(
    run: Path, digits: dict[str, ShardSet], tmp_path: Path
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())

    both = (mistakes, "Most confident mistakes"), (card, "Data set")

    def told(path: str, data: str | None = None) -> tuple[str, ...]:
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": config["data"] | {"path": path}}))
        read = read_run(run)
        return tuple(Page(part(read, data)).section(title) for part, title in both)

    for text in told(str(tmp_path / "gone")):
        assert "the data set “gone” is not where the configuration says" in text.replace("The data", "the data")
    assert "--data FOLDER" in told("")[0] and "No gallery" in told("a\0b")[0]
    shown, known = told("https://host/set?signature=hush")
    assert "nothing is fetched unless asked for" in shown and "hush" not in shown + known
    real = str(digits["test"].folder.parent)
    shown, known = told(str(tmp_path / "gone"), data=real)
    assert "18 of" in shown and "test 359 10" in known
    tensors = load_file(run / "evaluation.safetensors")
    whose = {"checkpoint": "step-480", "split": "test", "eval_digest": "1" * 64}
    save_file(tensors, run / "evaluation.safetensors", metadata=whose)
    assert "is not the one this run used: its digest differs" in told(real)[0]
    change(run / "environment.json", train_digest="2" * 64)
    assert "Split “train” of the data set “digits0” is not the one" in told(real)[1]


def test_the_card_says_what_the_set_holds(run: Path, digits: dict[str, ShardSet]) -> None:
    page = parts(run, data_set)
    text = page.section("Data set")
    counts = digits["train"].manifest.class_counts
    assert f"train 1,438 10 {min(counts):,} to {max(counts):,} 8 x 8" in text
    assert "Class balance" in text and page.source.count('class="bar"') == 20
    assert "Evaluated samples: 359." in text
    change(run / "evaluation.json", undecodable=3)
    assert "3 undecodable ones left out" in parts(run, data_set).text


@pytest.mark.parametrize(
    "damage",
    [
        "not one",
        "cut short",
        "of another checkpoint",
        "unequal columns",
        "no labels",
        "shuffled",
        "at odds",
        "negative",
    ],
)
def test_damaged_answers_are_a_warning(run: Path, damage: str) -> None:
    path = run / "evaluation.safetensors"
    tensors, facts = load_file(path), {"checkpoint": "step-480", "split": "test"}
    if damage == "not one":
        path.write_bytes(b"nonsense")
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "of another checkpoint":
        save_file(tensors, path, metadata=facts | {"checkpoint": "step-3"})
    else:
        changed = {
            "unequal columns": {"predicted.batch": tensors["predicted.batch"][1:]},
            "shuffled": {"ids": tensors["ids"][::-1].copy()},
            "at odds": {"predicted.batch": tensors["labels"]},
            "negative": {"labels": tensors["labels"] - 1},
            "no labels": {},
        }[damage]
        kept = {name: t for name, t in tensors.items() if damage != "no labels" or name != "labels"}
        save_file(kept | changed, path, metadata=facts)
    page = parts(run, gallery, accuracy, confusion)
    assert page.text.split("Warnings")[1].startswith(" evaluation.safetensors") and "left out" in page.text
    assert "No gallery" in page.text and "Confusion matrix under “batch”" in page.text
    assert re.search(r"batch 8\d", page.section("Accuracy"))


def test_an_evaluation_without_the_newer_keys_still_gives_a_report(run: Path) -> None:
    old = json.loads((run / "evaluation.json").read_text())
    for values in old["protocols"].values():
        for key in ("interval", "top5", "balanced_accuracy", "balanced_interval", "brier", "seeds", "total"):
            values.pop(key, None)
    old.pop("confusion")
    (run / "evaluation.json").write_text(json.dumps(old))
    page = parts(run, accuracy, confusion)
    assert "Intervals are Wilson's" in page.text and "Brier" not in page.text
    assert "Confusion matrix under “batch”" in page.text  # counted from the answers
    (run / "evaluation.safetensors").unlink()
    page = parts(run, confusion, gallery)
    assert "evaluation.json holds no confusion matrix: an older version wrote it" in page.text
    assert "No gallery: there is no evaluation.safetensors" in page.text and page.text.count("Warnings") == 0


def test_odd_values_in_the_evaluation_are_left_out(run: Path) -> None:
    odd: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    odd["protocols"]["batch"] |= {"interval": [0.9, "x"], "top5": 7, "brier": -1, "seeds": {"count": "many"}}
    odd["protocols"]["batch"] |= {"balanced_interval": [0.9, 0.1], "ties": 3}
    odd["confusion"]["batch"] += [[0, 0], [1, 2, -3], [0, 0, 1], "x", [1.5, 2, 3]]
    odd |= {"per_class": {"batch": ["x", None, 2]}, "group_size": "huge", "undecodable": "some", "best": []}
    (run / "evaluation.json").write_text(json.dumps(odd))
    assert utc_text(1e300) == utc_text(math.nan) == utc_text([]) == ""
    page = parts(run, accuracy, confusion, gallery, data_set)
    assert "5 cell(s) of the confusion under 'batch' not understood" in page.text
    assert "Confusion matrix under “batch”" in page.text


def test_hostile_class_names_stay_text(tmp_path: Path) -> None:
    samples = [Sample(f"{i:02d}.png", HOSTILE[i % 3], PIXEL) for i in range(60)]
    shards = write_shards(samples, tmp_path / "set" / "test", shard_samples=100)
    run = make_run(tmp_path / "run<b>", shards, Made(epochs=6, pretrain=2, skill=0.5))
    base = make_run(tmp_path / "base & <i>", shards, Made(oat=False, epochs=6, skill=0.4))
    page = Page(write_report(run, against=base))
    assert not {"script", "iframe", "i"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name in HOSTILE:
        assert name in page.text and any(name in value for key, value in page.attributes if key == "alt")
    tiles = len(re.findall(r'<li><div class="picture">', page.source))
    assert tiles and page.tags.count("img") == tiles  # no picture but ours


def test_selected_on_test_is_not_the_headline(run: Path) -> None:
    """An evaluation of the best checkpoint, saved over that of the last step."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {line["protocol"]: line for line in log if "protocol" in line and line["step"] == 480}
    best = {"step": 460, "split": "test", "protocol": "batch", "accuracy": 0.83}
    change(run / "evaluation.json", step=460, epoch=23, checkpoint="step-460", best=best)
    page = Page(write_report(run))
    text = page.section("Accuracy")
    assert "Headline: the last epoch (24) on split “test”" in text
    first, _, second = text.partition("Evaluated checkpoint, selected on test")
    assert f"batch {100 * last['batch']['accuracy']:.2f}" in first and "checkpoint step-460" in second
    big = re.search(r"Accuracy, “batch” on test ([\d.]+)", page.text)
    assert big is not None and big[1] == f"{100 * last['batch']['accuracy']:.2f}"
    change(run / "evaluation.json", best=best | {"split": "val"})  # chosen on another split, but not the last either
    assert "Saved evaluation of checkpoint step-460 on split “test”" in parts(run, accuracy).text


@pytest.mark.parametrize("saved", [{"split": "train"}, {"eval_digest": "another"}])
def test_an_evaluation_saved_later_is_not_the_headline(run: Path, base: Path, saved: dict[str, str]) -> None:
    last = 100 * json.loads((run / "evaluation.json").read_text())["protocols"]["batch"]["accuracy"]
    change(run / "evaluation.json", protocols={"batch": {"accuracy": 0.999}}, confusion={}, per_class={}, **saved)
    read = read_run(run)
    assert read.score is not None and 100 * read.score.accuracy == pytest.approx(last) and read.split == "test"
    page = Page(write_report(run))
    text = page.section("Accuracy")
    assert text.index(f"batch {last:.2f}") < text.index("Saved evaluation") < text.index("batch 99.90")
    assert f"Accuracy, “batch” on test {last:.2f}" in page.text
    assert "is not of the last validation: classes, confusions" in page.text
    both = Page(write_comparison([run, base], run / "both.html"))
    assert "99.90" not in both.text and "Split" in both.section("Results")
    assert "Saved answers, not those of the headline: oat (split “test”" in both.section("Same samples")


def test_steps_of_an_epoch_of_a_run_that_ends_within_one(run: Path) -> None:
    path = run / "metrics.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()]
    log = [line for line in log if line["step"] < 480]
    log.append(next(line for line in log if "protocol" in line and line["step"] == 460) | {"step": 475})
    path.write_text("".join(json.dumps(line) + "\n" for line in log))
    assert [phase.epochs for phase in read_timing(read_run(run)).phases] == [4, 19.75]
    change(run / "evaluation.json", steps_per_epoch=10)
    assert [phase.epochs for phase in read_timing(read_run(run)).phases] == [8, 39.5]


def test_started_and_times_of_a_run_that_was_cut_off(run: Path, base: Path) -> None:
    path = run / "metrics.jsonl"
    first, rest = path.read_text().split("\n", 1)
    first = json.dumps(json.loads(first) | {"start_from": "runs/<pretraining>/checkpoints/step-0"})
    path.write_text(first + '\n{"event": "resume", "step": 0, "time": 1793700100.0}\n' + rest)
    change(run / "environment.json", started="2027-01-01T00:00:00+00:00")
    page = Page(write_report(run))
    assert "with evaluations, without 1 start(s) that were cut off" in page.text
    assert f"Started {utc_text(1793700000.0)}" in page.text
    assert "Begun as a copy of runs/<pretraining>/checkpoints/step-0" in page.text
    times = Page(write_comparison([run, base], run / "both.html")).section("Time")
    assert "Wall time: oat, without 1 start(s) that were cut off." in times


def test_times_are_summed_and_what_is_missing_is_estimated(run: Path) -> None:
    timing = read_timing(read_run(run))
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for phase, epochs in (("cross_entropy", 4), ("oat", 20)):
        found = timing.phase(phase)
        assert found is not None and found.epochs == epochs
        seconds = sum(line["seconds"] for line in log if "loss" in line and line["phase"] == phase)
        assert found.seconds == pytest.approx(seconds) and found.epoch_seconds == pytest.approx(seconds / epochs)
    assert timing.wall == 3725.0 and timing.cut_off == 0 and not timing.estimated
    assert (timing.evaluations, timing.evaluation) == (24, 24 * 1.25)  # not once for each protocol
    assert timing.memory_gb == 0.61
    text = parts(run, timing_section).section("Throughput and time")
    assert "62 min" in text and "24, 30 s together" in text
    older = [{key: value for key, value in line.items() if key not in ("seconds", "memory_gb")} for line in log]
    older.insert(1, {"event": "resume", "step": 0, "time": 1793700100.0})  # the first start was cut off
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    again = read_timing(read_run(run))
    assert again.estimated and again.evaluation is None and (again.wall, again.cut_off) == (3625.0, 1)
    assert again.phases[1].seconds == pytest.approx(timing.phases[1].seconds, rel=1e-6)
    assert "estimated from the logged throughput" in parts(run, timing_section).text
    assert [duration(s) for s in (None, 0.5, 89.0, 600.0, 7265.0)] == ["-", "0.5 s", "89 s", "10 min", "2 h 01 min"]


def test_warnings_of_the_trainer_and_anchors_of_a_resumed_run(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = {"event": "warning", "text": "loss is <b>odd</b>", "step": 300, "time": 1793700000.0}
    anchors = [line for line in lines if "anchor" in line]
    taken_back = [{"event": "resume", "step": 460}, anchors[-1] | {"anchor": [0.5, *[0.5 / 9] * 9]}]
    bad = [anchors[-1] | {"anchor": ["x"]}, anchors[-1] | {"anchor": []}]
    again = [line for line in lines if line.get("step") == 480 and "anchor" not in line and "event" not in line]
    log = [*lines[:-1], said, said, *taken_back, *bad, *again, lines[-1]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    metrics = read_run(run).metrics
    assert [row.epoch for row in metrics.anchors] == list(range(5, 25))
    assert metrics.anchors[-1].values[0] == 0.5 and len(metrics.lines_skipped) == 2
    page = Page(write_report(run))
    warned = page.text[page.text.index("Warnings") :][:400]
    assert warned.count("loss is <b>odd</b> (step 300)") == 1 and "2 lines not understood" in warned
    assert "the largest entry is that of 0 (0.5)" in page.text and "1/C is 0.1." in page.text
    assert "warning" not in page.section("Reproducing this run")


def test_the_report_needs_no_torch(run: Path, base: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from oat_dist.report import write_report, write_comparison; "
        "a, b, c = map(Path, sys.argv[1:]); write_report(a, against=b); write_comparison([a, b], c); "
        "print([m for m in ('torch', 'torchvision', 'accelerate', 'sklearn') if m in sys.modules])"
    )
    arguments = [str(run), str(base), str(run / "both.html")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_protocol_of_a_made_run_is_read(run: Path) -> None:
    read = read_run(run)
    assert read.evaluation is not None and read.predictions is not None and read.warnings == []
    assert [score.protocol for score in read.evaluation.scores] == list(OAT_PROTOCOLS)
    assert read.predictions.predicted.keys() == read.predictions.confidence.keys() == set(OAT_PROTOCOLS)
    score = read.evaluation.score("batch")
    assert score is not None and score.seeds is not None and score.seeds.count == 5 and score.interval is not None
    assert read.protocol == "batch" and dataclasses.replace(read, config={}).protocol == "batch"
