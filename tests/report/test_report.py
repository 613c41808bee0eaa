"""The report from a run folder made here: both phases, a resume, a torn last line, hostile names."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from page_checks import Page

from oat_dist.commands.report import main
from oat_dist.errors import DataError
from oat_dist.report import write_report
from oat_dist.report.data import flatten, wilson
from oat_dist.report.drawing import key, protocol_look
from oat_dist.report.figures import accuracy_png, smooth
from oat_dist.report.metrics import PROTOCOLS as EVERY_PROTOCOL
from oat_dist.report.metrics import read_metrics

HOSTILE = ["airplane", "<script>alert(1)</script>", 'quo"te & <b>', "naïve 猫", "\ud800 lone"]
STEPS_PER_EPOCH, PRETRAIN, EPOCHS, LOG_EVERY = 100, 3, 8, 10
PROTOCOLS = ("batch", "single", "dataset", "stored")


def training_line(step: int) -> dict[str, Any]:
    oat = step > PRETRAIN * STEPS_PER_EPOCH
    line: dict[str, Any] = {
        "step": step,
        "epoch": (step - 1) // STEPS_PER_EPOCH,
        "phase": "oat" if oat else "cross_entropy",
        "loss": 0.8 + 0.2 * math.cos(step) if oat else 2.3 * math.exp(-step / 200) + 0.1 * math.sin(step),
        "lr": 0.001 * min(1.0, step / 50),
        "samples_per_s": 1200 + 40 * math.sin(step),
        "data_wait": 0.02 + 0.01 * math.cos(step),
        "fingerprint": f"{step * 0x9E3779B97F4A7C15 % 2**64:016x}",
    }
    if oat:
        line |= {"anchor_min": 0.05, "anchor_max": 0.2, "anchor_entropy": 2.2, "grad_norm": 1.5}
    return line


def validation_lines(epoch: int) -> list[dict[str, Any]]:
    oat = epoch > PRETRAIN
    lines = []
    for number, protocol in enumerate(PROTOCOLS if oat else ("argmax",)):
        correct = 3000 + 400 * epoch - 31 * number - 700 * (epoch == EPOCHS)  # the best epoch is the last but one
        common = {"step": epoch * STEPS_PER_EPOCH, "epoch": epoch, "phase": "oat" if oat else "cross_entropy"}
        counts = {"accuracy": correct / 10_000, "correct": correct, "total": 10_000}
        lines.append({**common, "split": "test", "protocol": protocol, **counts})
    return lines


def log_lines(first: int, last: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        if step == PRETRAIN * STEPS_PER_EPOCH + 1:
            lines.append({"event": "phase", "phase": "oat", "step": step - 1, "time": "2026-11-03T10:05:00+00:00"})
        if step % LOG_EVERY == 0:
            lines.append(training_line(step))
        if step % STEPS_PER_EPOCH == 0:
            lines += validation_lines(step // STEPS_PER_EPOCH)
    return lines


def write_log(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed after step 470, resumed at 400, finished; a torn line at the end. Read only, but for its report."""
    folder = tmp_path_factory.mktemp("made") / "cifar10-<oat>"
    folder.mkdir()
    config = {
        "batch_size": 32,
        "epochs": EPOCHS,
        "pretrain_epochs": PRETRAIN,
        "deterministic": True,
        "model": {"name": "lightweight", "weights": None},
        "data": {"path": "data/<cifar10>", "augment": {"flip": False}},
        "anchor": {"center": "probabilities", "scope": "global"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {
        "command": ["launch/train.py", "configs/cifar10.yaml", "note=<i>x</i>"],
        "started": "2026-11-03T10:00:00+00:00",
        "torch": "2.14.1",
        "oat_dist": "0.1.0",
        "device": "cpu",
        "engine": "ddp",
        "world_size": 2,
        "data": {"train": "ab" * 32, "test": "cd" * 32},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [{"event": "start", "step": 0, "time": 1793700000.0}, *log_lines(1, 470)]
    lines += [{"event": "resume", "step": 400, "time": 1793700600.0}, *log_lines(401, 800)]
    lines += [{"event": "finished", "step": 800, "time": 1793701200.0}]
    write_log(folder, lines, '{"step": 810, "ep')
    evaluation = {
        "checkpoint": "step-800",
        "step": 800,
        "epoch": 8,
        "phase": "oat",
        "split": "test",
        "total": 10_000,
        "protocols": {
            "stored": {"accuracy": 0.6111, "correct": 6111, "ties": [17]},
            "batch": {"accuracy": 0.6543, "correct": 6543, "ties": [17, 4711]},
        },
        "class_names": HOSTILE,
        "per_class": {"batch": [0.9, 0.1234, 0.5, 0.6, None]},
        "best": {"checkpoint": "step-700", "accuracy": 0.66, "protocol": "batch", "split": "test"},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture
def run(untouched: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(untouched, tmp_path / untouched.name, ignore=lambda *_: ["report.html"])


@pytest.fixture(scope="module")
def page(untouched: Path) -> Page:
    """The report as the command writes it."""
    assert main([str(untouched)]) == 0
    return Page(untouched / "report.html")


def test_the_numbers_stand_on_the_page(page: Page) -> None:
    text = page.text
    assert "7 of 7 steps trained again have the same fingerprint" in text
    assert "Finished (step 800, in epoch 8 of 8)." in text
    assert "split “test”, checkpoint step-800, after epoch 8, phase OAT." in text
    # 6543 of 10,000: 65.43 +- 1.96 * sqrt(.6543 * .3457 / 10,000), as good as Wilson's at this size
    assert re.search(r"batch 65\.43 64\.49 to 66\.36 6,543 / 10,000", text)
    assert re.search(r"stored 61\.11 60\.15 to 62\.06 6,111 / 10,000", text)
    assert text.index("65.43 64.49") < text.index("61.11 60.15")  # our order of protocols, not the file's
    assert "batch anchor of 32 test samples" in text
    assert "Best checkpoint: step-700, 66.00 % under batch, selected on “test”" in text
    # the log: last epoch 3000 + 8 * 400 - 700, best epoch 7, mean of the five OAT epochs
    assert "batch 55.00 (epoch 8) 52.60 (5) 58.00 (epoch 7)" in text
    assert "argmax 42.00 (epoch 3) 38.00 (3) 42.00 (epoch 3)" in text
    assert "2 near-tied sample(s)" in text and "17, 4711" in text
    assert "2 rank(s)" in text and "abababab" in text and "torch 2.14.1" in text
    assert "augment.flip false" in text and "deterministic: true" in text
    assert f"{800 * 0x9E3779B97F4A7C15 % 2**64:016x} at step 800" in text
    assert "OAT run report" in text and "finished 800 2026-11-03" in text


def test_weakest_classes_come_first_and_empty_ones_last(page: Page) -> None:
    section = page.source[page.source.index("<h2>Classes") : page.source.index("<h2>Throughput")]
    assert re.findall(r'<td class="n">([^<]*)</td>', section) == ["12.34", "50.00", "60.00", "90.00", "-"]


def test_figures_are_inline_and_told_apart(page: Page) -> None:
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.images == 5
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any("batch 55.00 %" in label for label in labels)
    assert len(page.ids) == len(set(page.ids)), "ids of two figures collide"
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', page.source)
    assert used and set(used) <= set(page.ids)
    assert page.text.count("switch to OAT") == 6  # accuracy, both losses, and once in each other figure
    assert "Dashed line: OAT begins, 3 epochs done, step 300." in page.text
    # the two losses on axes of their own
    loss = page.source[page.source.index("<h3>Training loss") :]
    loss = loss[: loss.index("</figure>")]
    assert ">cross-entropy</text>" in loss and ">OAT</text>" in loss and "different scales" in loss
    assert "var(--s0)" in page.source and "#0b5fa5" not in page.source.split("</style>")[1]


def test_nothing_is_fetched_or_run_and_names_stay_text(page: Page, untouched: Path) -> None:
    assert not {"script", "link", "img", "iframe", "object", "b", "i"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text and 'quo"te & <b>' in page.text and "naïve 猫" in page.text
    assert "note=<i>x</i>" in page.text and "data/<cifar10>" in page.text and "cifar10-<oat>" in page.text
    assert str(untouched.parent) not in page.source


def test_signed_urls_are_not_passed_on_with_the_page(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["path"] = "https://host/set?signature=hush"
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    text = write_report(run).read_text()
    assert "https://host/set?..." in text and "hush" not in text


def test_the_same_files_give_the_same_bytes(run: Path, page: Page) -> None:
    first = page.source.encode()
    assert write_report(run) == run / "report.html" and (run / "report.html").read_bytes() == first
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["protocols"]["batch"] = {"accuracy": 0.6544, "correct": 6544}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert write_report(run).read_bytes() != first
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []


def test_a_resume_takes_back_what_came_after_its_step(run: Path) -> None:
    metrics = read_metrics(run / "metrics.jsonl")
    assert [row.step for row in metrics.training] == list(range(10, 801, 10))
    assert metrics.replayed_equal == 7 and metrics.replayed_different == []  # steps 410..470
    assert metrics.lines_skipped == [] and metrics.finished
    # killed again, and resumed at 300 with another data order: not finished, and said
    other = training_line(310) | {"fingerprint": "0" * 16}
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"event": "resume", "step": 300}) + "\n" + json.dumps(other) + "\n")
    metrics = read_metrics(run / "metrics.jsonl")
    assert metrics.training[-1].step == 310 and metrics.replayed_different == [310] and not metrics.finished
    assert max(row.epoch for row in metrics.validation) == 3
    assert len(metrics.lines_skipped) == 1  # the torn line is no longer the last
    text = Page(write_report(run)).text
    assert "resumed with another data order" in text and "7 of 8 steps" in text
    assert "In progress or interrupted: last logged step 310, in epoch 4 of 8" in text


def test_malformed_lines_are_counted_and_said(run: Path) -> None:
    bad = [
        "nonsense",
        "[1, 2]",
        "5",
        '"text"',
        '{"step": -1, "epoch": 0, "phase": "oat", "loss": 1.0}',
        '{"step": 1}',
    ]
    bad += [
        '{"step": 1, "epoch": 0, "phase": 3, "loss": 1}',
        '{"event": 3}',
        '{"protocol": "batch", "accuracy": 1.5}',
    ]
    good = json.dumps(training_line(10) | {"loss": math.nan, "lr": math.inf})
    (run / "metrics.jsonl").write_text("\n".join([*bad, good, json.dumps(training_line(20))]) + "\n\n")
    metrics = read_metrics(run / "metrics.jsonl")
    assert metrics.lines_skipped == list(range(1, 10)) and metrics.non_finite == 2
    assert metrics.series("loss")[0] == [20] and metrics.series("lr")[0] == [20]
    text = Page(write_report(run)).text
    assert "9 lines not understood and skipped (lines 1, 2, 3" in text and "2 number(s) not finite" in text


def test_a_missing_evaluation_is_said(run: Path) -> None:
    (run / "evaluation.json").unlink()
    text = Page(write_report(run)).text
    assert "Not evaluated: there is no evaluation.json" in text
    assert "last validation in training, after epoch 8 on split “test”" in text
    assert "55.00 54.02 to 55.97 5,500 / 10,000" in text


def test_an_evaluation_older_than_the_log_or_at_odds_with_itself_is_said(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation |= {
        "step": 700,
        "protocols": {"batch": {"accuracy": 0.9, "correct": 10}, "single": {"accuracy": 7}},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = Page(write_report(run)).text
    assert "evaluated checkpoint is of step 700; the log goes on to step 800" in text
    assert "the accuracy under 'batch' is not 10 of 10,000" in text
    assert "the accuracy under 'single' is not a number in 0..1" in text


@pytest.mark.parametrize("log", ["", "\n", '{"event": "start", "step": 0, "time": 0}\n', '{"step": 1, "lo'])
def test_a_run_that_has_logged_nothing_yet(tmp_path: Path, log: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(log)
    page = Page(write_report(tmp_path))
    assert "No training step has been logged yet." in page.text and "no accuracy to report" in page.text
    assert "config.yaml cannot be read" in page.text and "environment.json cannot be read" in page.text
    assert page.images == 0


@pytest.mark.parametrize(
    "content", ["{", "[]", "a: [", "a: b: c", '{"protocols": 3}', "\x00", "&a {b: *a}", "b: &a [*a]"]
)
def test_damaged_side_files_are_warnings(run: Path, content: str) -> None:
    write_log(run, validation_lines(EPOCHS))
    for name in ("config.yaml", "environment.json", "evaluation.json"):
        (run / name).write_text(content)
    page = Page(write_report(run))
    assert "evaluation.json" in page.text and "Not evaluated" in page.text
    assert "batch 55.00 54.02 to 55.97" in page.text


def test_one_phase_one_step_and_sparse_lines(tmp_path: Path) -> None:
    minimal = {"step": 1, "epoch": 0, "phase": "oat", "loss": 1.0}
    write_log(tmp_path, [minimal])
    assert Page(write_report(tmp_path)).images == 1
    write_log(tmp_path, [training_line(step) for step in range(1, 2001)])
    page = Page(write_report(tmp_path))
    assert page.images == 4 and len(page.source) < 1_000_000


def test_a_run_that_diverges(tmp_path: Path) -> None:
    lines = [training_line(step) for step in range(250, 350, 2)]
    write_log(tmp_path, [line | ({"loss": math.nan} if line["phase"] == "oat" else {}) for line in lines])
    text = Page(write_report(tmp_path)).text
    assert "24 number(s) not finite" in text
    write_log(
        tmp_path,
        [
            line | {"loss": 10.0 ** (line["step"] - 100), "grad_norm": 1e300 if line["step"] % 4 else 1e308}
            for line in lines
        ],
    )
    assert Page(write_report(tmp_path)).images == 4
    write_log(tmp_path, [lines[0], lines[1] | {"step": 10**30}, lines[2] | {"loss": 10**400}])
    assert read_metrics(tmp_path / "metrics.jsonl").lines_skipped == [2, 3]


def test_many_steps_stay_small_and_keep_their_extremes(tmp_path: Path) -> None:
    lines = [{"step": s, "epoch": 0, "phase": "oat", "loss": 1.0 + (s == 7777)} for s in range(1, 20_001)]
    write_log(tmp_path, lines)
    source = write_report(tmp_path).read_text()
    assert len(source) < 100_000
    write_log(tmp_path, [line | {"loss": 1.0} for line in lines])
    assert write_report(tmp_path).read_text().count("\nL ") < source.count("\nL ")  # the one spike is drawn


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"metrics.jsonl is missing; give the output_dir"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="no such run folder"):
        write_report(tmp_path / "absent")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_accuracy_png(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "accuracy.png"
    for runs in ({"OAT": run}, {"OAT $x": run, "again": run}):
        accuracy_png(runs, output)
        data = output.read_bytes()
        assert data.startswith(b"\x89PNG") and struct.unpack(">I", data[16:20]) == (1000,)
        assert len(data) < 100_000
        accuracy_png(runs, output)
        assert output.read_bytes() == data
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"metrics.jsonl: cannot be read"):
        accuracy_png({"none": empty}, output)
    (empty / "metrics.jsonl").touch()
    with pytest.raises(DataError, match="nothing to draw"):
        accuracy_png({"none": empty}, output)


def test_wilson_against_known_values() -> None:
    # Wilson 1927 as tabulated by Newcombe 1998: 81/263, 15/148, 0/20, 1/29
    known = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, total), bounds in known.items():
        assert wilson(correct, total) == pytest.approx(bounds, abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_every_protocol_has_a_look_that_the_key_can_draw() -> None:
    looks = [protocol_look(name) for name in EVERY_PROTOCOL]
    assert len(set(looks)) == len(EVERY_PROTOCOL)
    assert key([(look, "x") for look in looks]).count("<li>") == len(EVERY_PROTOCOL)


def test_small_parts() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    mean, window = smooth([0.0] * 80 + [3.0] + [0.0] * 80)
    assert window == 5 and mean[80] == pytest.approx(0.6) and mean[77] == 0
    mean, window = smooth([4.0] * 100)
    assert window == 3 and mean == pytest.approx([4.0] * 100)  # no droop at the ends
    mean, window = smooth([float(k) for k in range(200)], part=10)
    assert window == 21 and mean[:190] == pytest.approx(range(190))  # nor a lift at a steep start
    assert mean[-1] == pytest.approx(194)  # of the last 11
    assert smooth(range(200), part=10, ends=False)[0] == pytest.approx(range(200))  # nor a droop where a piece follows
    assert smooth([1.0, 5.0], part=10)[1] == 1 and list(smooth([1.0, 5.0], part=10)[0]) == [1.0, 5.0]
