"""What a table says and draws of its rows."""

from __future__ import annotations

from pathlib import Path

from oat_dist.experiments.across import across, across_files
from oat_dist.experiments.content import content_of
from oat_dist.experiments.plan import Options, make_plan
from oat_dist.experiments.statistics import Mean
from oat_dist.experiments.summary import Row, Score
from oat_dist.experiments.tables import Arm, Cell, Table

ARMS = {"base": Arm("nothing", phases="pretrain"), "one": Arm("first"), "two": Arm("second")}


def row(cell: str, arm: str, checkpoint: str, difference: Mean | None) -> Row:
    score = Score({0: 50.0, 1: 52.0}, Mean(2, 51.0, (38.3, 63.7)), None, None, "argmax", difference)
    return Row(cell, arm, checkpoint, "batch", {"batch": score}, [], [], None)


def test_each_difference_stands_at_its_cell() -> None:
    cells = {name: Cell(f"cell {name}") for name in "abcd"}
    table = Table("Many", ARMS, "base", cells, config="configs/quickstart.yaml", select="val", seeds=2)
    plan = make_plan(table, Path("out"), Options())
    shift = {cell: Mean(2, float(number), (number - 0.5, number + 0.5)) for number, cell in enumerate(cells)}
    rows = [row(cell, "base", "final", None) for cell in cells]
    rows += [row(cell, "one", "final", shift[cell]) for cell in "abc"]  # d has diverged
    rows += [row("b", "two", "final", Mean(1, -1.0, None))]
    rows += [row(cell, "one", "best", shift[cell]) for cell in "ab"]  # too few
    rows.append(Row("d", "one", "final", "batch", {}, [], [1], None))
    (figure,) = across(plan, rows)
    assert figure.name == "differences-final" and figure.title == "Last epoch"
    assert figure.cells == ["cell a", "cell b", "cell c"] and figure.arms == [(1, "first"), (2, "second")]
    assert figure.points == [
        *((0, 1, shift["a"]), (1, 1, shift["b"]), (2, 1, shift["c"])),
        (1, 2, Mean(1, -1.0, None)),
    ]
    files = across_files(figure)
    assert across_files(figure) == files  # the same bytes
    assert b">second<" in files["svg"] and files["png"].startswith(b"\x89PNG")


def test_class_priors_are_compared_where_classes_were_uneven() -> None:
    table = Table("Prior", ARMS, "base", {"a": Cell("a")}, config="configs/quickstart.yaml", seeds=2)
    plan, score = make_plan(table, Path("out"), Options()), row("a", "one", "final", None).scores["batch"]

    def titles(base: dict[str, Score]) -> list[str]:
        ours = {"batch": score, "balanced": score}  # which the center prior has on any set
        rows = [
            Row("a", arm, "final", own, scores, [], [], None)
            for arm, own, scores in (("base", "argmax", base), ("one", "batch", ours))
        ]
        return [grid.title for grid in content_of(plan, Options(), {}, rows, [], "").grids]

    assert "Under each class prior" not in titles({"argmax": score})
    assert "Under each class prior" in titles({"argmax": score, "balanced": score})
