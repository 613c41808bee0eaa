"""The accuracies that the documents quote stand in the committed tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUOTED = re.compile(r"[+-]?\d+\.\d\d \([+-]?\d+\.\d\d to [+-]?\d+\.\d\d\)")
TABLES = "\n".join(path.read_text() for path in sorted((ROOT / "docs" / "results").glob("*/table.md")))


def results_of_readme() -> str:
    return (ROOT / "README.md").read_text().split("\n## Results\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    "text", [results_of_readme(), (ROOT / "docs" / "results.md").read_text()], ids=["README", "docs"]
)
def test_every_mean_with_its_interval_is_in_a_table(text: str) -> None:
    quoted = QUOTED.findall(text)
    assert len(quoted) > 10
    assert [one for one in quoted if one not in TABLES] == []
    assert quoted[0].replace(".", ".1", 1) not in TABLES  # what is not there is seen to be missing
