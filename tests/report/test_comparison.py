"""The page that compares runs: what differs, seeds, tests of pairs, names, and the command."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import Made, make_run
from page_checks import Page

from oat_dist.commands.report import main
from oat_dist.data.index import ShardSet
from oat_dist.errors import ConfigError, DataError
from oat_dist.report import write_comparison, write_report
from oat_dist.report.data import read_run
from oat_dist.report.drawing import numbered_look
from oat_dist.report.groups import find_groups, spread


@pytest.fixture(scope="module")
def runs(digits: dict[str, ShardSet], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of OAT and of cross-entropy. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    made = [(f"{name}-s{seed}", oat, seed) for name, oat in (("oat", True), ("ce", False)) for seed in range(3)]
    return [
        make_run(folder / name, digits["test"], Made(oat=oat, seed=seed, skill=(0.8 if oat else 0.7) + 0.01 * seed))
        for name, oat, seed in made
    ]


@pytest.fixture(scope="module")
def both(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OAT and cross-entropy of the same seed, on one page."""
    return write_comparison([runs[0], runs[3]], tmp_path_factory.mktemp("both") / "both.html")


def accuracy(run: Path, protocol: str) -> float:
    return 100 * json.loads((run / "evaluation.json").read_text())["protocols"][protocol]["accuracy"]


def test_two_runs_side_by_side(runs: list[Path], both: Path, tmp_path: Path) -> None:
    oat, ce = runs[0], runs[3]
    page = Page(both)
    assert page.images == 2 and page.tags.count("figure") == page.tags.count("figcaption") == 2
    results = page.section("Results")
    assert f"oat-s0 - {accuracy(oat, 'batch'):.2f}" in results and f"ce-s0 {accuracy(ce, 'argmax'):.2f}" in results
    assert "selected on test" in results
    assert "Comparison of 2 runs" in page.text and "Over seeds" not in page.text
    # the gallery is of OAT against cross-entropy, whichever came first
    assert "Right with OAT, wrong without" in page.text
    turned = Page(write_comparison([ce, oat], tmp_path / "turned.html"))
    assert "Right with OAT, wrong without" in turned.text
    assert page.section("Right with OAT") == turned.section("Right with OAT")
    difference = accuracy(oat, "batch") - accuracy(ce, "argmax")
    assert f"oat-s0 {difference:+.2f}" in turned.section("Same samples") and f"ce-s0 {-difference:+.2f}" in page.text
    differs = page.section("What differs")
    assert "pretrain_epochs 4 24" in differs and "batch_size" not in differs and "seed" not in differs
    data = page.section("Data and machines")
    assert "ce-s0 not known the same the same up to step 480" in data
    assert both.read_bytes() == write_comparison([oat, ce], tmp_path / "again.html").read_bytes()


def test_the_main_figure_joins_the_phases_and_states_its_smoothing(both: Path) -> None:
    page = Page(both)
    figure = page.source[page.source.index("<h3>Accuracy over training") :]
    figure = figure[: figure.index("</figure>")]
    assert "running mean over 3 epochs" in figure and "Dashed line: OAT begins, 4 epochs done." in figure
    assert (
        figure.count("opacity: 0.3") == 5
    )  # pieces of raw values: OAT has one before the switch, which the closer panel lacks
    assert ">oat-s0</span>" in figure and "stroke-dasharray" in figure
    losses = page.source[page.source.index("<h3>Training loss") :]
    assert ">cross-entropy</text>" in losses and ">OAT</text>" in losses


def test_seeds_are_grouped_with_their_spread(runs: list[Path], tmp_path: Path) -> None:
    page = Page(write_comparison(runs, tmp_path / "all.html"))
    seeds = page.section("Over seeds")
    for name, members, protocol in (("oat", runs[:3], "batch"), ("ce", runs[3:], "argmax")):
        values = [accuracy(run, protocol) for run in members]
        half = 4.3027 * statistics.stdev(values) / math.sqrt(3)
        mean = statistics.fmean(values)
        expected = f"{name} {protocol} 0, 1, 2 {mean:.2f} {statistics.stdev(values):.2f}"
        assert f"{expected} {mean - half:.2f} to {mean + half:.2f}" in seeds
    differences = [accuracy(runs[3 + k], "argmax") - accuracy(runs[k], "batch") for k in range(3)]
    assert f"{statistics.fmean(differences):+.2f} (3 seed(s))" in seeds
    legend = page.source[page.source.index("<h3>Accuracy over training") :]
    assert "oat (mean of 3 seeds)" in legend and "ce (mean of 3 seeds)" in legend and "oat-s1</span>" not in legend
    # five tests against the first run; the gallery is of the first pair that differs in more than its seed
    assert len(re.findall(r"(?:oat|ce)-s\d [+-]\d", page.section("Same samples"))) == 5
    assert "oat-s0 under “batch”, ce-s0 under “argmax”" in page.section("Right with OAT")


def test_the_spread_over_seeds() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.count, found.mean, found.std) == (3, 2.0, 1.0)
    assert found.interval == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)))
    assert spread([5.0]).interval is None
    assert len({(look.colour, look.line, look.marker) for look in map(numbered_look, range(20))}) == 20


def test_groups_by_configuration(runs: list[Path], tmp_path: Path) -> None:
    groups = find_groups([read_run(run) for run in runs])
    assert [(group.name, group.seeds) for group in groups] == [("oat", [0, 1, 2]), ("ce", [0, 1, 2])]
    again = tmp_path / "oat-s0-again"
    shutil.copytree(runs[0], again)
    (group,) = find_groups([read_run(runs[0]), read_run(again)])
    assert len(group.runs) == 2 and list(group.by_seed) == [0]  # no spread out of one seed twice
    text = Page(write_comparison([runs[0], again, runs[3]], tmp_path / "x.html")).section("Over seeds")
    assert "Seeds more than once, counted once: oat" in text


def _change_log(run: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if keep(line)))


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_does_not_belong_into_a_mean_is_left_out(runs: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs]
    _change_log(copies[1], lambda line: line.get("event") != "finished")
    _change(copies[4] / "environment.json", eval_digest="another")
    page = Page(write_comparison(copies, tmp_path / "x.html"))
    seeds = page.section("Over seeds")
    assert "Left out: oat-s1 (not finished), ce-s1 (another protocol or other data)." in seeds
    assert "oat batch 0, 2 " in seeds and "ce argmax 0, 2 " in seeds and "(2 seed(s))" in seeds
    assert "oat (mean of 2 seeds)" in page.text and "not in a mean: oat-s1, ce-s1" in page.text
    assert "Not all runs are evaluated on the same data" in page.section("Results")
    for run in copies[3:]:
        _change(run / "environment.json", eval_digest="another")
    seeds = Page(write_comparison(copies, tmp_path / "x.html")).section("Over seeds")
    assert "ce argmax 0, 1, 2 " in seeds and "seed(s)" not in seeds


def test_evaluations_that_are_not_of_every_epoch(runs: list[Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[0], tmp_path / "sparse")
    _change_log(run, lambda line: "protocol" not in line or line["epoch"] % 2 == 0)
    for page in (write_report(run), write_comparison([run, runs[3]], tmp_path / "x.html")):
        text = Page(page).text
        assert "Accuracy at each evaluation." in text and "after each epoch" not in text
        assert re.search(r"running mean over \d+ epochs", text) is None


def test_against_a_run_that_is_not_among_them(runs: list[Path], tmp_path: Path) -> None:
    page = Page(write_comparison(runs[:2], tmp_path / "x.html", against=runs[3]))
    assert "Comparison of 3 runs" in page.text and "Same samples: against ce-s0" in page.text
    page = Page(write_comparison(runs[:2], tmp_path / "x.html", against=runs[1]))
    assert "Comparison of 2 runs" in page.text and "Same samples: against oat-s1" in page.text


def test_twenty_runs_and_runs_that_hold_little(runs: list[Path], tmp_path: Path) -> None:
    folders = []
    for number in range(14):
        folder = tmp_path / f"little-{number}"
        folder.mkdir()
        line = {"step": 10, "epoch": 0, "phase": "cross_entropy", "loss": 2.0 + number, "samples_per_s": 100.0}
        (folder / "metrics.jsonl").write_text("" if number == 3 else json.dumps(line) + "\n")
        if number % 2:
            (folder / "config.yaml").write_text(yaml.safe_dump({"batch_size": 10 + number}))
        folders.append(folder)
    page = Page(write_comparison([*runs, *folders], tmp_path / "x.html"))
    assert "Comparison of 20 runs" in page.text and "little-2: config.yaml" in page.text
    assert "Not compared: little-13 has no evaluation.safetensors" in page.text
    with pytest.raises(ConfigError, match="21 runs are too many"):
        write_comparison([*runs, *folders], tmp_path / "x.html", against=_empty(tmp_path / "more"))
    alone = Page(write_comparison(folders[3:4], tmp_path / "x.html"))
    assert "little-3 alone" in alone.text and "Nothing to draw yet" in alone.text


def _empty(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    return folder


def test_names_that_are_the_same_get_their_parents_and_hostile_ones_stay_text(runs: list[Path], tmp_path: Path) -> None:
    for parent in ("<b>a", "b"):
        shutil.copytree(runs[0], tmp_path / parent / "run")
    page = Page(write_comparison([tmp_path / "<b>a" / "run", tmp_path / "b" / "run"], tmp_path / "x.html"))
    assert "<b>a/run" in page.text and "b/run" in page.text and str(tmp_path) not in page.source


def test_the_command(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(runs[0]), str(runs[3]), "--labels", "with,without"]) == 0
    assert capsys.readouterr().out == "report-compare.html\n"
    page = Page(tmp_path / "report-compare.html")
    assert "with, without." in page.text and "oat-s0" not in page.section("Results")
    assert main([str(runs[0]), "--against", str(runs[3]), "--output", "one.html"]) == 0
    assert "Compared with ce-s0" in Page(tmp_path / "one.html").text
    assert not (runs[0] / "report.html").exists()
    capsys.readouterr()
    for arguments, said in (
        ([runs[0], runs[0]], "a run is given twice"),
        ([runs[0], runs[3], "--labels", "a"], "--labels has 1 names for 2 runs"),
        ([runs[0], runs[3], "--labels", "a,a"], "every run needs a name of its own"),
        ([runs[0], "--output", "one.txt"], "give a FILE.html"),
        ([runs[0], "--output", "no/where.html"], "there is no folder no; make it first"),
        ([runs[0], tmp_path], "metrics.jsonl is missing"),
        ([runs[0], "--against", tmp_path / "gone"], "no such run folder"),
        ([runs[0], "--against", runs[0]], "is the run itself"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1, arguments


def test_a_page_that_cannot_be_written(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "x.html").mkdir()
    with pytest.raises(Exception, match=r"x.html: cannot be written .*; choose another place with --output"):
        write_report(runs[0], output=tmp_path / "x.html")
    with pytest.raises(DataError, match="no such run folder"):
        write_comparison([runs[0], tmp_path / "gone"], tmp_path / "y.html")
