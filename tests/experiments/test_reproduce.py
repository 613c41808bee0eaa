"""`oat-dist reproduce` on a tiny table of real trainings: what it leaves, what it does again, what it survives."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from experiments.forked import Forked, start_forked

from oat_dist.commands import evaluate, reproduce
from oat_dist.data.packing import write_splits
from oat_dist.data.sources import SOURCES
from oat_dist.experiments import pool

TABLE = """\
title: "Tiny: digits"
about: Whether the harness works.
config: configs/quickstart.yaml
set: [epochs=2, pretrain_epochs=1, eval.every_epochs=1, optim.lr=0.1]
select: val
seeds: 2
gallery: oat
arms:
  cross_entropy: {title: cross-entropy, phases: pretrain}
  oat: {title: OAT}
  oat_single: {title: OAT single, protocol: single, control: true}
  wild: {title: too fast, phases: pretrain, control: true, set: [optim.lr=1e30]}
baseline: cross_entropy
compare: {oat_single: [oat]}
cells:
  digits: {title: digits, arms: [cross_entropy, oat, oat_single], paper: {cross_entropy: 50.0}}
differs: [digits are no photos]
"""


@dataclass(frozen=True)
class Desk:
    """A table, its data and where its results go; `started` are the commands of the trainings so far."""

    table: Path
    data: Path
    results: Path
    started: list[Sequence[str]]

    def run(self, *arguments: str) -> int:
        return reproduce.main([str(self.table), "--data", str(self.data), "--output", str(self.results), *arguments])

    @property
    def folder(self) -> Path:
        return self.results / "tiny"

    def files(self) -> dict[Path, tuple[int, bytes]]:
        """Every file but locks, with its time and bytes."""
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(self.results.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The table, run once."""
    folder = tmp_path_factory.mktemp("reproduce")
    plan = SOURCES["digits"]("-", splits={}, seed=0)
    train, test = list(plan.splits["train"]), list(plan.splits["test"])
    # class 0 is rare, so that there are two class priors
    few = [sample for number, sample in enumerate(train[::3]) if sample.label != plan.classes[0] or number % 3 == 0]
    splits = {"train": few, "val": train[1::9], "test": test}
    write_splits(splits, folder / "packed", classes=plan.classes, source=plan.source)
    (folder / "tiny.yaml").write_text(TABLE)
    desk = Desk(folder / "tiny.yaml", folder / "packed", folder / "results", [])

    def start(command: Sequence[str], environment: dict[str, str], log: Path) -> Forked:
        desk.started.append(command)
        return start_forked(command, environment, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "start_process", start)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert desk.run() == 0
        yield desk


def table_of(desk: Desk) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((desk.folder / "table.json").read_text())
    return found


def test_the_arms_share_their_beginning(desk: Desk) -> None:
    folders = [word.partition("=")[2] for command in desk.started for word in command if word.startswith("output_dir=")]
    runs = [f"digits/{arm}/{seed}" for seed in (0, 1) for arm in ("pretrain", "cross_entropy", "oat")]
    assert sorted(folders) == sorted(str(desk.folder / run) for run in runs)  # oat_single is oat
    for arm in ("cross_entropy", "oat"):
        lines = (desk.folder / "digits" / arm / "1" / "metrics.jsonl").read_text().splitlines()
        assert min(json.loads(line)["step"] for line in lines if "loss" in line) > 14
        assert json.loads(lines[0])["start_from"].startswith(str(desk.folder / "digits/pretrain/1"))


def test_the_numbers_are_those_of_evaluate(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    run = desk.folder / "digits" / "oat" / "0"
    assert evaluate.main([str(run), "--split", "test", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["protocols"]
    found = json.loads((run / "result.json").read_text())
    final = found["checkpoints"]["final"]
    assert {name: one["correct"] for name, one in final["protocols"].items()} == {
        name: one["correct"] for name, one in expected.items()
    }
    assert found["data"]["select"]["samples"] == 160 and found["data"]["test"]["samples"] == 359
    assert found["epoch_seconds"] > 0 and found["test_seconds"] > 0
    row = next(row for row in table_of(desk)["rows"] if (row["arm"], row["checkpoint"]) == ("oat", "final"))
    assert row["protocols"]["batch"]["by_seed"]["0"] == pytest.approx(100 * expected["batch"]["accuracy"])


def test_the_table_says_it_in_every_form(desk: Desk) -> None:
    rows = {(row["arm"], row["checkpoint"]): row for row in table_of(desk)["rows"]}
    assert list(rows) == [
        (arm, checkpoint) for arm in ("cross_entropy", "oat", "oat_single") for checkpoint in ("final", "best")
    ]
    base = rows["cross_entropy", "final"]["protocols"]["argmax"]
    ours = rows["oat", "final"]["protocols"]["batch"]
    assert base["mean"]["mean"] == pytest.approx(statistics.fmean(base["by_seed"].values()))
    assert rows["cross_entropy", "final"]["minus_paper"] == pytest.approx(base["mean"]["mean"] - 50)
    differences = [ours["by_seed"][seed] - base["by_seed"][seed] for seed in ("0", "1")]
    assert ours["difference"]["mean"] == pytest.approx(statistics.fmean(differences))
    assert rows["oat_single", "final"]["protocol"] == "single"
    assert rows["oat_single", "final"]["protocols"]["single"] == rows["oat", "final"]["protocols"]["single"]

    text = (desk.folder / "table.md").read_text()
    found = re.search(r"^\| OAT single minus OAT \| last \| single - batch \| ([+-][0-9.]+)", text, re.MULTILINE)
    single, batch = (
        rows[arm, "final"]["protocols"][name] for arm, name in (("oat_single", "single"), ("oat", "batch"))
    )
    differences = [single["by_seed"][seed] - batch["by_seed"][seed] for seed in ("0", "1")]
    assert found is not None and float(found[1]) == pytest.approx(statistics.fmean(differences), abs=0.0051)
    assert f"| OAT | last | batch | 2 | {ours['mean']['mean']:.2f} (" in text
    best = rows["cross_entropy", "best"]["protocols"]["argmax"]["mean"]["mean"]
    assert f"| cross-entropy | best on val | argmax | 2 | {best:.2f} (" in text
    within = re.search(r"^\| OAT \| last \| single (?:\| [^|]* ){2}\| ([+-][0-9.]+)", text, re.MULTILINE)
    assert within is not None and float(within[1]) == pytest.approx(statistics.fmean(differences), abs=0.0051)
    assert "| 50.000 |" in text and ours["verdict"] in text
    for said in (
        "Digits are no photos.",
        "Images from digits",
        "train 448",
        "held out of training",
        "oat-dist reproduce",
    ):
        assert said in text
    with (desk.folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (2 + 5 + 5)
    assert float(lines[0]["measure"]) == pytest.approx(base["mean"]["mean"], abs=1e-4)
    page = (desk.folder / "table.html").read_text()
    assert "<svg" in page and 'href="images-digits.html"' in page and "default-src 'none'" in page
    assert (desk.folder / "images-digits.html").exists()
    assert (desk.folder / "accuracy-digits.png").read_bytes().startswith(b"\x89PNG")


def test_where_classes_are_uneven_both_class_priors_are_compared(desk: Desk) -> None:
    rows = {row["arm"]: row["protocols"] for row in table_of(desk)["rows"] if row["checkpoint"] == "final"}
    text = (desk.folder / "table.md").read_text()
    section = text[text.index("## Under each class prior") : text.index("## Other differences")]
    cells = next(line for line in section.splitlines() if line.startswith("| OAT | last | stored |")).split(" | ")
    found = [float(cells[place].split()[0]) for place in (3, 4, 5, 6)]
    ours, theirs = rows["oat"], rows["cross_entropy"]
    stored, argmax = ours["stored"]["mean"]["mean"], theirs["argmax"]["mean"]["mean"]
    equal = [one["balanced"]["mean"]["mean"] for one in (ours, theirs)]
    assert found == pytest.approx([stored, stored - argmax, equal[0], equal[0] - equal[1]], abs=0.0051)
    assert "| OAT single minus OAT | last | balanced - balanced | +0.00 |" in text


def test_several_cells_are_drawn_side_by_side(desk: Desk, tmp_path: Path) -> None:
    count, names = len(desk.started), ("digits", "again", "thrice")
    table = tmp_path / desk.table.name  # of that name, so of the same results
    cells = "".join(f"  {name}: {{title: {name} on a line}}\n" for name in names)
    table.write_text(f"{TABLE[: TABLE.index('  digits:')]}{cells}")
    arguments = [str(table), "--data", str(desk.data), "--output", str(desk.results)]
    assert reproduce.main([*arguments, "--arms", "cross_entropy,oat,oat_single"]) == 0
    assert len(desk.started) == count  # trained alike: one run for all three
    page, text = ((desk.folder / f"table.{kind}").read_text() for kind in ("html", "md"))
    for checkpoint in ("final", "best"):
        drawn = (desk.folder / f"differences-{checkpoint}.svg").read_text()
        assert all(f">{name} on a line<" in drawn for name in names)
        assert "minus cross-entropy, percentage points" in drawn and ">OAT single<" in drawn
        assert f"(differences-{checkpoint}.svg)" in text
        assert (desk.folder / f"differences-{checkpoint}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("Dot chart") == 2 and ">Differences<" in page
    assert desk.run() == 0  # of one cell there is none
    assert "Dot chart" not in (desk.folder / "table.html").read_text()


def test_a_second_call_changes_nothing(desk: Desk) -> None:
    before, count = desk.files(), len(desk.started)
    assert desk.run() == 0
    assert len(desk.started) == count
    assert desk.files() == before


def test_damaged_results_are_computed_anew(desk: Desk) -> None:
    before, count = desk.files(), len(desk.started)
    torn, other = (desk.folder / "digits" / "oat" / seed / "result.json" for seed in "01")
    whole = [path.read_bytes() for path in (torn, other)]
    torn.write_bytes(whole[0][:-40])
    values = json.loads(whole[1])
    values["checkpoints"]["final"]["weights"] = 64 * "0"  # of another network
    other.write_text(json.dumps(values))
    assert desk.run() == 0
    assert [path.read_bytes() for path in (torn, other)] == whole
    assert len(desk.started) == count
    assert {path: found[1] for path, found in desk.files().items()} == {p: found[1] for p, found in before.items()}


def test_the_best_epoch_may_lie_before_the_arms_part(desk: Desk) -> None:
    run, before = desk.folder / "digits" / "cross_entropy" / "0", desk.files()
    evaluation, result = run / "evaluation.json", run / "result.json"
    values = json.loads(evaluation.read_text())
    values["best"]["step"] = 14  # the last one of what the arms share
    evaluation.write_text(json.dumps(values))
    result.unlink()
    assert desk.run() == 0
    best = json.loads(result.read_text())["checkpoints"]["best"]
    beginning = json.loads((desk.folder / "digits/pretrain/0/checkpoints/step-14/manifest.json").read_text())
    assert best["weights"] == beginning["files"]["model.safetensors"]["sha256"]
    for path in (evaluation, result):
        path.write_bytes(before[path][1])
    assert desk.run() == 0
    assert {path: found[1] for path, found in desk.files().items()} == {p: found[1] for p, found in before.items()}


def test_a_training_that_diverges_is_a_result(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(desk.started)
    for _ in range(2):  # nor is it tried again
        assert desk.run("--arms", "wild") == 0
        assert len(desk.started) == count + 2
    row = next(row for row in table_of(desk)["rows"] if row["arm"] == "wild")
    assert row["diverged"] == [0, 1] and row["protocols"] == {}
    text = (desk.folder / "table.md").read_text()
    assert "| too fast | last |  | 2 | diverged: seed 0, 1 |" in text and "the loss is not finite at step" in text
    assert "| OAT | last | batch | 2 |" in text  # what is there is shown too


def test_asked_to_stop_it_saves_and_goes_on_whatever_fails(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    scaled = ("--epochs-scale", "5", "--seeds", "1", "--arms", "oat", "--jobs", "1")
    run = desk.results / "tiny-x5" / "digits" / "oat" / "0"

    def stop() -> None:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop)
    watcher.start()
    assert desk.run(*scaled) == 128 + signal.SIGTERM
    watcher.join()
    said = capsys.readouterr().err
    assert "the same command goes on from there" in said and "oat-dist reproduce" in said
    assert "\nstopped   at step" in (run / "train.log").read_text()
    assert not (run / "result.json").exists()

    # a run that cannot be trained does not stop the others
    failing = run.parents[1] / "cross_entropy" / "0"
    failing.mkdir(parents=True)
    (failing / "checkpoints").write_text("in the way")
    assert desk.run(*scaled[:-4], "--arms", "cross_entropy,oat") == 2
    assert "error: digits/cross_entropy/0: status " in capsys.readouterr().err
    events = [json.loads(line).get("event") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert events.count("resume") == 1 and events[-1] == "finished"
    text = (desk.results / "tiny-x5" / "table.md").read_text()
    assert text.startswith("# Tiny: digits (epochs x 5)") and "epochs multiplied by 5" in text
    assert "| cross-entropy | last |  | 0 of 1 | not trained yet |" in text and "| OAT | last | batch | 1 |" in text
    assert "One seed: there are no intervals" in text and "10 epochs, 5 of them cross-entropy" in text


def test_what_cannot_be_trained_is_refused_first(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(desk.started)
    assert desk.run("--set", "data.eval_split=test") == 2
    assert "data.eval_split=test: is not to be set here" in capsys.readouterr().err
    desk.table.with_name("other.yaml").write_text(TABLE.replace("select: val", "select: held"))
    arguments = [str(desk.table.with_name("other.yaml")), "--data", str(desk.data), "--output", str(desk.results)]
    assert reproduce.main(arguments) == 2
    said = capsys.readouterr().err
    assert "held" in said and "--hold-out held=0.1" in said
    assert len(desk.started) == count


def test_a_dry_run_says_what_is_missing(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    before = desk.files()
    assert desk.run("--seeds", "3", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "9 run(s), 3 of them not done" in said
    assert said.count("missing") == 3 and said.count("-m oat_dist.train") == 3
    assert desk.files() == before


def test_for_slurm_the_beginnings_go_first(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("--seeds", "3", "--slurm", "--dry-run", "--slurm-options=--time=5") == 0
    first, second, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch")]
    assert "--array=1-1 --time=5 launch/slurm/sweep.sbatch" in first and "--dependency" not in first
    assert "--array=1-2 --dependency=afterok:JOB1 --kill-on-invalid-dep=yes" in second
