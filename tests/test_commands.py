"""The commands on a real run: help, tables and JSON, and one line for whatever is wrong."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_run import TinyRun, image_files, tiny_run
from test_evaluate import evaluate_run

from oat_dist import cli
from oat_dist.commands import evaluate, predict
from oat_dist.data.packing import write_shards
from oat_dist.data.packing.samples import Sample

__all__ = ["tiny_run"]

Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, *arguments: object) -> dict[str, dict[str, dict[str, object]]]:
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


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
    "command", ["pack", "index", "verify", "inspect", "train", "evaluate", "predict", "report", "verify-parallel"]
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


# evaluate.


def test_evaluate_json(tiny_run: TinyRun, capsys: Capture) -> None:
    expected = evaluate_run(tiny_run, 256)
    values = run_json(capsys, tiny_run.folder)
    assert list(values) == ["checkpoint", "split", "seed", "group_size", "undecodable", "protocols"]
    assert values["checkpoint"] == str(tiny_run.folder / "checkpoints" / f"step-{tiny_run.steps[-1]}")
    assert (values["split"], values["seed"], values["group_size"], values["undecodable"]) == ("test", 0, 32, 0)
    assert values["protocols"] == {
        name: {"accuracy": r.accuracy, "correct": r.correct, "total": r.total, "ties": r.ties}
        for name, r in expected.protocols.items()
    }
    # What training said of its last step.
    said = json.loads((tiny_run.folder / "evaluation.json").read_text())["protocols"]
    assert {name: r["accuracy"] for name, r in said.items()} == {
        n: r["accuracy"] for n, r in values["protocols"].items()
    }


def test_evaluate_through_oat_dist_prints_a_table(tiny_run: TinyRun, capsys: Capture) -> None:
    values = run_json(capsys, tiny_run.folder)
    assert cli.main(["evaluate", str(tiny_run.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{values['checkpoint']} on test"
    assert lines[1].split() == ["protocol", "accuracy", "correct", "samples", "ties"]
    for line, (name, result) in zip(lines[2:], values["protocols"].items(), strict=True):
        row = [name, f"{result['accuracy']:.3%}", str(result["correct"]), str(result["total"]), "0"]
        assert line.split()[:4] == row[:4]


def test_evaluate_only_some_protocols(tiny_run: TinyRun, capsys: Capture) -> None:
    everything = run_json(capsys, tiny_run.folder)["protocols"]
    some = run_json(capsys, tiny_run.folder, "--protocol", "stored", "--protocol", "batch")["protocols"]
    assert some == {name: everything[name] for name in ("batch", "stored")}
    text = refusal(capsys, evaluate.main, tiny_run.folder, "--protocol", "argmax")
    assert text == "protocol argmax does not apply to this checkpoint; it has batch, single, dataset, stored"
    text = refusal(capsys, evaluate.main, tiny_run.pretrained, "--protocol", "stored")
    assert text == "protocol stored does not apply to this checkpoint; it has argmax"


def test_evaluate_other_checkpoints(tiny_run: TinyRun, capsys: Capture) -> None:
    first, last = tiny_run.steps
    for name, step in (("latest", last), (f"step-{first}", first)):
        values = run_json(capsys, tiny_run.folder, "--checkpoint", name)
        assert values["checkpoint"] == str(tiny_run.folder / "checkpoints" / f"step-{step}")
    best = (tiny_run.folder / "checkpoints" / "best").read_text().strip()
    assert str(run_json(capsys, tiny_run.folder, "--checkpoint", "best")["checkpoint"]).endswith(best)
    assert list(run_json(capsys, tiny_run.pretrained)["protocols"]) == ["argmax"]
    message = refusal(capsys, evaluate.main, tiny_run.folder, "--checkpoint", "newest")
    assert message == "--checkpoint newest: must be latest, best or step-<n>"
    message = refusal(capsys, evaluate.main, tiny_run.folder, "--checkpoint", "step-1")
    assert message == f"{tiny_run.folder / 'checkpoints' / 'step-1'}: no such folder"


def test_evaluate_other_data_and_groups(tiny_run: TinyRun, capsys: Capture) -> None:
    base = run_json(capsys, tiny_run.folder)["protocols"]
    explicit = run_json(capsys, tiny_run.folder, "--data", tiny_run.data, "--split", "test", "--batch-size", 7)
    assert {n: r["correct"] for n, r in explicit["protocols"].items()} == {n: r["correct"] for n, r in base.items()}
    train = run_json(capsys, tiny_run.folder, "--split", "train")
    assert train["split"] == "train"
    assert train["protocols"]["batch"]["total"] != base["batch"]["total"]
    alone = run_json(capsys, tiny_run.folder, "--group-size", 1, "--seed", 5)
    assert alone["protocols"]["batch"] == base["single"]  # groups of one are the samples themselves
    assert (alone["seed"], alone["group_size"]) == (5, 1)
    whole = run_json(capsys, tiny_run.folder, "--group-size", 10**6)
    assert whole["protocols"]["batch"]["correct"] == base["dataset"]["correct"]


def test_predictions_agree_with_the_accuracies(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    values = run_json(capsys, tiny_run.folder, "--predictions", path)["protocols"]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "label", "batch", "single", "dataset", "stored"]
    assert [int(row["id"]) for row in rows] == list(range(tiny_run.test_split.num_samples))
    assert [int(row["label"]) for row in rows] == tiny_run.test_split.index.label.tolist()
    for name, result in values.items():
        assert sum(row[name] == row["label"] for row in rows) == result["correct"]
        assert result["correct"] / len(rows) == result["accuracy"]
    run_json(capsys, tiny_run.folder, "--predictions", path, "--protocol", "single")
    assert path.read_text().splitlines()[0] == "id,label,single"
    missing = tmp_path / "no" / "x.csv"
    text = refusal(capsys, evaluate.main, tiny_run.folder, "--predictions", missing)
    assert text == f"{missing}: no such folder to write to"


def test_evaluate_refuses_what_it_cannot_do(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        return refusal(capsys, evaluate.main, *arguments)

    assert refused(tmp_path / "no").startswith(f"{tmp_path / 'no'}: no such folder; give a run folder")
    assert "no such folder" in refused(tiny_run.config)
    assert "this run has no best checkpoint yet; use --checkpoint latest" in refused(tmp_path, "--checkpoint", "best")
    assert refused(tiny_run.folder, "--batch-size", 0) == "--batch-size and --group-size must be at least 1"
    assert refused(tiny_run.folder, "--group-size", 0) == "--batch-size and --group-size must be at least 1"
    folder = tiny_run.data / "validation"
    expected = f"{folder}: no such packed split; {tiny_run.data} holds test, train"
    assert refused(tiny_run.folder, "--split", "validation") == expected
    assert "no such packed split" in refused(tiny_run.folder, "--data", tmp_path)
    image = image_files(tiny_run.test_split, range(1))[0]
    write_shards([Sample(f"{i}.png", "ab"[i], image) for i in range(2)], tmp_path / "other" / "test", workers=1)
    expected = f"{tmp_path / 'other' / 'test'}: its classes are not the 10 classes of the checkpoint"
    assert refused(tiny_run.folder, "--data", tmp_path / "other") == expected


@pytest.mark.parametrize("text", ["", "- 1\n", "data: 3\n", "a: [", None])
def test_evaluate_with_a_damaged_run_config(
    tiny_run: TinyRun, capsys: Capture, tmp_path: Path, text: str | None
) -> None:
    """The weights are whole: they can still be evaluated on data that is named."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tiny_run.folder / "checkpoints")
    if text is not None:
        (run / "config.yaml").write_text(text)
    message = refusal(capsys, evaluate.main, run)
    assert message.startswith(str(run))
    assert "config.yaml" in message
    named = ("--data", tiny_run.data, "--split", "test")
    assert run_json(capsys, run, *named, "--seed", 0, "--group-size", 32)["split"] == "test"
    assert evaluate.main([*map(str, (run, *named))]) == 0
    assert "protocol batch uses seed 0 and groups of 32" in capsys.readouterr().err


def test_an_undecodable_sample_is_left_out_and_counted(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    shards = tiny_run.test_split
    number = 17
    folder = tmp_path / "packed" / "test"
    folder.mkdir(parents=True)
    for path in shards.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tar = folder / shards.manifest.shards[int(shards.index.shard[number])].name
    data, offset = bytearray(tar.read_bytes()), int(shards.index.offset[number])
    data[offset : offset + 20] = bytes(20)
    tar.write_bytes(data)
    values = run_json(capsys, tiny_run.folder, "--data", tmp_path / "packed")
    assert values["undecodable"] == 1
    assert {result["total"] for result in values["protocols"].values()} == {shards.num_samples - 1}
    assert evaluate.main([str(tiny_run.folder), "--data", str(tmp_path / "packed")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "1 undecodable sample(s) left out; list them with shards/verify.py"


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
