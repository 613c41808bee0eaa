"""The commands on a real run: help, tables and JSON, and one line for whatever is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_run import TinyRun, image_files, tiny_run
from test_evaluate import evaluate_run

from oat_dist import cli
from oat_dist.commands import predict

__all__ = ["tiny_run"]

Capture = pytest.CaptureFixture[str]


def refusal(capsys: Capture, command: Callable[[list[str]], int], *arguments: object) -> str:
    """The one line on stderr; nothing on stdout, status 2."""
    capsys.readouterr()
    assert command([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


# Help.


@pytest.mark.parametrize(
    "command",
    [
        "pack",
        "index",
        "verify",
        "inspect",
        "train",
        "evaluate",
        "predict",
        "export",
        "report",
        "verify-parallel",
        "doctor",
    ],
)
def test_help_of_every_command(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: oat-dist {command} ")
    if command == "train":
        assert "accelerate launch --config_file configs/accelerate/cpu-2.yaml launch/train.py CONFIG" in text
        assert "anchor.center=probabilities" in text
    assert "example" in text
    assert max(map(len, text.splitlines())) < 200


def test_help_of_them_all(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "oat-dist evaluate runs/quickstart" in text
    for command in cli._COMMANDS:
        assert re.search(rf"\n    {command}\s", text)


@pytest.mark.parametrize(
    "arguments", [[], ["pact"], ["evaluate"], ["evaluate", "x", "--protocol", "bach"], ["predict", "x"]]
)
def test_wrong_usage_ends_with_status_2(capsys: Capture, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: oat-dist")
    assert "error: " in captured.err.splitlines()[-1]


def test_the_installed_command() -> None:
    script = Path(sys.executable).with_name("oat-dist")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: oat-dist [-h] COMMAND ...\n")
    assert "Traceback" not in done.stderr


# predict.


def test_predict(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    shards = tiny_run.test_split
    paths = []
    for number in (0, 100, 358):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(image_files(shards, range(number, number + 1))[0])
    expected = evaluate_run(tiny_run, 256).protocols["stored"].predicted_N
    capsys.readouterr()
    assert cli.main(["predict", str(tiny_run.folder), *map(str, paths)]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [str(path) for path in paths]
    assert [row[1] for row in rows] == [shards.classes[int(expected[number])] for number in (0, 100, 358)]
    assert all(0 < float(row[2]) <= 1 and len(row[2]) == 5 for row in rows)
    bad = tmp_path / "notes.txt"
    bad.write_text("no image")
    assert predict.main([str(tiny_run.folder), str(bad), str(paths[0])]) == 0
    captured = capsys.readouterr()
    assert captured.out.split("\t")[:2] == rows[0][:2]
    assert captured.err.startswith(f"skipped: {bad}: not an image that can be decoded: ")


def test_predict_refuses_what_it_cannot_do(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    assert "no valid checkpoint" in refusal(capsys, predict.main, tmp_path, "x.png")
    assert predict.main([str(tiny_run.folder), str(tmp_path / "no.png")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"skipped: {tmp_path / 'no.png'}: cannot be read (No such file or directory)"
    assert lines[1] == "error: none of the files is an image that can be decoded"


def test_no_traceback_from_a_real_process(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "launch" / "evaluate.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}: no valid checkpoint in this run folder\n"
