"""Files of tables: strict in keys and names; the runs that come of them; the committed ones all work."""

from __future__ import annotations

from pathlib import Path

import pytest

from oat_dist.commands import reproduce
from oat_dist.errors import ConfigError
from oat_dist.experiments.plan import Options, Plan, folder_name, make_plan, scaled
from oat_dist.experiments.tables import find_table, read_table, repository, table_names

ROOT = Path(__file__).parents[2]
TABLE = """\
title: Small
config: configs/quickstart.yaml
set: [epochs=20, pretrain_epochs=4]
select: val
arms:
  cross_entropy: {title: cross-entropy, phases: pretrain}
  oat: {title: OAT}
  oat_single: {title: OAT single, protocol: single, control: true}
  smooth: {title: other beginning, control: true, set: [optim.lr=0.5]}
baseline: cross_entropy
cells:
  short: {title: short, set: [pretrain_epochs=2], paper: {oat: 1e1}}
  long: {title: long, arms: [oat]}
  none: {title: none, set: [pretrain_epochs=0]}
"""


def planned(folder: Path, text: str = TABLE, **options: object) -> Plan:
    path = folder / "small.yaml"
    path.write_text(text)
    return make_plan(read_table(path), Path("out"), Options(**options))  # type: ignore[arg-type]


def test_arms_share_what_they_begin_with(tmp_path: Path) -> None:
    plan = planned(tmp_path, seeds=2, defaults=("engine.threads=1",))
    oat = plan.runs["long", "oat", 1]
    assert (oat.folder, oat.config.seed, oat.config.epochs, oat.config.pretrain_epochs) == (
        Path("out/long/oat/1"),
        *(1, 20, 4),
    )
    beginning = oat.parent
    assert beginning is not None
    assert (beginning.folder, beginning.config.epochs, beginning.config.pretrain_epochs) == (
        Path("out/short/pretrain/1"),
        *(2, 2),
    )
    assert f"start_from={beginning.folder}" in oat.overrides and "seed=1" in beginning.overrides
    assert "data.eval_split=val" in oat.overrides and "engine.threads=1" in oat.overrides
    # the same trainings are one run: another protocol, and cross-entropy whatever would follow it
    assert plan.runs["long", "oat_single", 1] == oat
    assert plan.runs["long", "cross_entropy", 1] == plan.runs["none", "cross_entropy", 1]
    assert plan.runs["long", "cross_entropy", 1].folder == Path("out/short/cross_entropy/1")
    assert plan.runs["short", "oat", 1].parent == beginning
    # nothing to share: another learning rate in the cross-entropy epochs, or none of these
    assert plan.runs["long", "smooth", 0].parent is not None  # with the smooth arms of other cells
    assert plan.runs["long", "smooth", 0].parent != plan.runs["long", "oat", 0].parent
    assert plan.runs["none", "oat", 0].parent is None


def test_runs_on_other_images_are_other_runs(tmp_path: Path) -> None:
    cells = "  short: {title: short}\n  other: {title: other, set: [data.path=packed/other]}\n"
    plan = planned(tmp_path, TABLE[: TABLE.index("  short")] + cells, seeds=1)
    for arm in ("cross_entropy", "oat"):
        ours, theirs = plan.runs["short", arm, 0], plan.runs["other", arm, 0]
        assert ours.parent is not None and theirs.parent is not None
        assert theirs.folder == Path(f"out/other/{arm}/0") and theirs.parent.folder == Path("out/other/pretrain/0")
        assert ours.folder == Path(f"out/short/{arm}/0") and ours.parent.folder == Path("out/short/pretrain/0")
    assert plan.runs["other", "oat_single", 0] == plan.runs["other", "oat", 0]


def test_the_shared_beginning_is_no_longer_than_any_arm(tmp_path: Path) -> None:
    plan = planned(
        tmp_path, TABLE.replace("phases: pretrain", "phases: pretrain, set: [epochs=1, pretrain_epochs=1]"), seeds=1
    )
    for arm in ("cross_entropy", "oat"):
        beginning = plan.runs["short", arm, 0].parent
        assert beginning is not None and beginning.config.epochs == 1


def test_what_is_chosen_does_not_move_a_folder(tmp_path: Path) -> None:
    plan = planned(tmp_path, seeds=1)
    chosen = [run.name for run in plan.chosen(["long"], None)]
    assert chosen == ["short/pretrain/0", "long/oat/0"]
    assert [run.name for run in plan.chosen(["short"], None)] == [
        *("short/pretrain/0", "short/cross_entropy/0", "short/oat/0"),
    ]
    assert [run.name for run in plan.chosen(["short", "none"], ["oat_single"])] == [
        *("short/pretrain/0", "short/oat/0", "none/oat/0"),
    ]


def test_a_schedule_that_knows_its_end_is_not_shared(tmp_path: Path) -> None:
    plan = planned(tmp_path, set=("optim.schedule=cosine",))
    assert {run.parent for run in plan.runs.values()} == {None}


def test_epochs_scale() -> None:
    assert scaled(100, 10, 1.0) == (100, 10)
    assert scaled(100, 10, 0.1) == (10, 1)
    assert scaled(100, 10, 0.01) == (2, 1)  # at least one epoch of each
    assert scaled(100, 0, 0.01) == (1, 0)
    assert scaled(100, 100, 0.004) == (1, 1)
    assert scaled(20, 5, 0.5) == (10, 2)


def test_variants_lie_apart() -> None:
    names = [
        folder_name("table4", options)
        for options in (
            Options(),
            Options(scale=0.1),
            Options(set=("optim.ema=0.999",)),
            Options(set=("data.augment=flip pad_crop",)),
            Options(set=("data.augment=flip_pad_crop",)),
        )
    ]
    assert names[:3] == ["table4", "table4-x0.1", "table4+optim.ema=0.999"]
    assert len(set(names)) == len(names) and not any("/" in name or " " in name for name in names)


def test_data_is_found_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data other=x: this table reads digits"):
        planned(tmp_path, data={"other": "x"})
    for data, expected in (({"digits": "there"}, "there"), ({"": "all"}, "all"), ({}, "packed/digits")):
        assert planned(tmp_path, data=data).runs["long", "oat", 0].config.data.path == expected


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("select: val", "selekt: val", "unknown key 'selekt'; did you mean select?"),
        ("phases: pretrain", "phase: pretrain", "unknown key 'arms.cross_entropy.phase'; did you mean arms."),
        ("phases: pretrain", "phases: oats", "'oats' is not one of oat, pretrain; did you mean oat?"),
        ("protocol: single", "protocol: singel", "'singel' is not one of argmax, batch, single"),
        ("phases: pretrain", "phases: pretrain, protocol: batch", "'batch' is not one of argmax, balanced, ordinary"),
        ("baseline: cross_entropy", "baseline: cross", "'cross' is not one of cross_entropy, oat"),
        ("baseline: cross_entropy\n", "", "baseline is missing"),
        ("title: Small\n", "", "title is missing"),
        ("select: val", "select: test", "on the very split it is judged on"),
        ("control: true", "control: maybe", "arms.oat_single.control is true or false, not 'maybe'"),
        ("{oat: 1e1}", "{oat: many}", "cells.short.paper.oat is a number, not 'many'"),
        ("{oat: 1e1}", "{oats: 1}", "'oats' is not one of"),
        ("arms: [oat]", "arms: oat", "cells.long.arms is a list of texts"),
        ("arms: [oat]", "arms: [oat, oats]", "'oats' is not one of"),
        ("  short: {", "  ../short: {", "becomes a folder"),
        ("  oat: {", "  pretrain-x: {", "cannot be called pretrain"),
        ("config: configs/quickstart.yaml\n", "", "cell short has no config"),
        ("set: [epochs=20", "set: [[epochs]", "set is a list of texts"),
        ("arms:\n", "arms: [\n", "not valid YAML"),
    ],
)
def test_what_a_file_cannot_say(tmp_path: Path, before: str, after: str, said: str) -> None:
    assert before in TABLE
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, TABLE.replace(before, after, 1))
    assert said in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_impossible_arm_is_refused_only_where_it_is_chosen(tmp_path: Path) -> None:
    plan = planned(tmp_path, TABLE.replace("optim.lr=0.5", "optim.lrr=0.5"))
    assert plan.chosen(["long"], None)
    with pytest.raises(ConfigError, match=r"unknown key 'optim.lrr'; did you mean optim.lr\?"):
        plan.chosen(["long"], ["smooth"])


def test_unknown_names_are_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["tabel4"], "tabel4: no such table; did you mean table4?"),
        (["table4", "--only", "lightwight"], "did you mean lightweight?"),
        (["table4", "--arms", "oats"], "did you mean oat?"),
        (["table4", "--arms", ","], "--arms names nothing; there are cross_entropy, oat"),
        (["nowhere.yaml"], "nowhere.yaml: no such table file"),
        (["table4", "--data", "a=b", "a=c"], "--data a=c: give one PLACE"),
        ([], "name a table"),
    ):
        assert reproduce.main(arguments) == 2
        assert said in capsys.readouterr().err


def test_the_list_shows_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert {f"table{number}" for number in range(1, 8)} | {"figures", "bar_authors", "scope"} <= set(table_names())
    assert all(f"{name}: " in listed for name in table_names())


def test_the_repository_is_found() -> None:
    assert repository().resolve() == ROOT


@pytest.mark.parametrize("name", table_names())
def test_every_table_of_the_repository_can_be_trained(name: str) -> None:
    """All arms of all cells, controls too: `load_config` takes each of them."""
    table = read_table(find_table(name))
    plan = make_plan(table, Path("out"), Options(seeds=1))
    assert plan.problems == {}
    assert plan.chosen(list(table.cells), list(table.arms))
    # what is compared begins alike
    for cell in table.cells:
        runs = [plan.runs[cell, arm, 0] for arm in ("cross_entropy", "oat", "uniform") if arm in table.arms]
        begun = {run.parent.name if run.parent is not None else "" for run in runs}
        assert len(begun) <= 1 or cell == "pretrain_0"
