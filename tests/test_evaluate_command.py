"""`evaluate` on a real run: tables, JSON, two runs compared, priors, temperatures, and one line for what is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from fixtures_run import TinyRun, image_files, tiny_run
from safetensors.torch import load_file
from test_commands import Capture, refusal
from test_evaluate import evaluate_run

from oat_dist import cli
from oat_dist.commands import evaluate
from oat_dist.data.packing import write_shards
from oat_dist.data.packing.samples import Sample
from oat_dist.files import sha256_bytes
from oat_dist.measures import mcnemar_exact

__all__ = ["tiny_run"]


def run_json(capsys: Capture, *arguments: object) -> dict:
    capsys.readouterr()
    assert evaluate.main([*map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_json(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    expected = evaluate_run(tiny_run, 256)
    path = tmp_path / "answer.json"
    values = run_json(capsys, tiny_run.folder, "--output", path)
    assert json.loads(path.read_text()) == values
    facts = ["checkpoint", "split", "seed", "group_size", "prior", "calibrated", "class_names", "total", "undecodable"]
    assert list(values) == [*facts, "protocols", "per_class", "confusion"]
    assert values["checkpoint"] == str(tiny_run.folder / "checkpoints" / f"step-{tiny_run.steps[-1]}")
    assert (values["split"], values["seed"], values["group_size"], values["undecodable"]) == ("test", 0, 32, 0)
    for name, result in expected.protocols.items():
        found = values["protocols"][name]
        assert (found["accuracy"], found["correct"], found["total"], found["ties"]) == (
            *(result.accuracy, result.correct, result.total, result.ties),
        )
        assert sum(count for _, _, count in values["confusion"][name]) == found["total"]
        assert sum(count for true, said, count in values["confusion"][name] if true == said) == found["correct"]
        assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert values["protocols"]["batch"]["seeds"]["count"] == 5
    # What training said of its last step, measures included.
    said = json.loads((tiny_run.folder / "evaluation.json").read_text())
    assert {key: said[key] for key in ("protocols", "per_class", "confusion", "total", "class_names", "seed")} == {
        key: values[key] for key in ("protocols", "per_class", "confusion", "total", "class_names", "seed")
    }


def test_through_oat_dist_it_prints_a_table(tiny_run: TinyRun, capsys: Capture) -> None:
    values = run_json(capsys, tiny_run.folder, "--seeds", 2)
    assert cli.main(["evaluate", str(tiny_run.folder), "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{values['checkpoint']} on test: 359 samples, 10 classes"
    assert " ".join(lines[1].split()) == "protocol accuracy 95% interval balanced top-5 Brier correct ties"
    for line, (name, result) in zip(lines[2:6], values["protocols"].items(), strict=True):
        low, high = (f"{100 * bound:.2f}" for bound in result["interval"])
        shares = [f"{result[key]:.2%}" for key in ("balanced_accuracy", "top5")]
        row = [name, f"{result['accuracy']:.2%}", low, "to", high, *shares, f"{result['brier']:.4f}"]
        assert line.split() == [*row, str(result["correct"]), "0"]
    assert lines[6].startswith("batch over 2 seeds of its groups: mean ")
    weakest = min(values["per_class"]["stored"])
    assert lines[7].startswith("weakest classes (stored): ") and f" {weakest:.1%}" in lines[7]
    assert lines[8].startswith("most confused (stored): ")


def test_two_runs_are_compared_sample_by_sample(tiny_run: TinyRun, capsys: Capture) -> None:
    """The network before OAT against the one after: other protocols, the same samples."""
    values = run_json(capsys, tiny_run.folder, "--against", tiny_run.pretrained)
    after = evaluate_run(tiny_run, 256)
    before = run_json(capsys, tiny_run.pretrained)["protocols"]["argmax"]
    assert values["against"]["checkpoint"] == str(tiny_run.pretrained)
    for name, test in values["against"]["protocols"].items():
        assert test["protocol"] == "argmax"
        assert test["samples"] == 359
        assert test["only_first"] - test["only_second"] == after.protocols[name].correct - before["correct"]
        assert test["p_value"] == mcnemar_exact(test["only_first"], test["only_second"])
        assert test["interval"][0] <= test["difference"] <= test["interval"][1]
    assert evaluate.main([str(tiny_run.folder), "--against", str(tiny_run.folder), "--protocol", "single"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["single", "+0.00", "+0.00", "to", "+0.00", "0", "0", "1"]  # against itself
    message = refusal(capsys, evaluate.main, tiny_run.folder, "--against", tiny_run.folder / "no")
    assert "no such folder" in message


def test_save_makes_it_the_evaluation_of_the_run(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tiny_run.folder / "checkpoints")
    (run / "config.yaml").write_bytes((tiny_run.folder / "config.yaml").read_bytes())
    # Where the folder is reached through another path, the checkpoint is the one the run's folder holds.
    assert evaluate.main([str(run), "--save", "--checkpoint", f"step-{tiny_run.steps[0]}"]) == 0
    assert f"saved in {run}" in capsys.readouterr().out
    saved = json.loads((run / "evaluation.json").read_text())
    assert (saved["checkpoint"], saved["step"], saved["phase"]) == (f"step-{tiny_run.steps[0]}", 45, "cross_entropy")
    answers = load_file(run / "evaluation.safetensors")
    right = answers["predicted.argmax"] == answers["labels"]
    assert int(right.sum()) == saved["protocols"]["argmax"]["correct"]
    assert answers["ids"].tolist() == list(range(359))
    trained = load_file(tiny_run.folder / "evaluation.safetensors")
    assert {"predicted.batch", "confidence.stored"} <= trained.keys()  # training leaves one, too


def test_a_temperature_is_fitted_kept_and_used(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tiny_run.folder / "checkpoints")
    (run / "config.yaml").write_bytes((tiny_run.folder / "config.yaml").read_bytes())
    assert "is not calibrated" in refusal(capsys, evaluate.main, run, "--calibrated")
    message = refusal(capsys, evaluate.main, run, "--fit-temperature", "--split", "train")
    assert "which the run trained on" in message and "held-out" in message
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "holdout").symlink_to(tiny_run.data / "train")
    elsewhere = ("--data", tmp_path / "renamed", "--split", "holdout")
    assert "which the run trained on" in refusal(capsys, evaluate.main, run, "--fit-temperature", *elsewhere)
    plain = run_json(capsys, run)
    fitted = run_json(capsys, run, "--fit-temperature")["temperature"]
    kept = json.loads((run / "calibration" / f"step-{tiny_run.steps[-1]}.json").read_text())
    assert kept["priors"]["training"] == {"split": "test", **fitted}
    assert fitted["brier"][0] == pytest.approx(plain["protocols"]["stored"]["brier"])
    warm = run_json(capsys, run, "--calibrated")
    assert (warm["calibrated"], warm["calibrated_on"]) == (True, "test")
    assert warm["protocols"]["stored"]["brier"] < plain["protocols"]["stored"]["brier"]
    assert warm["protocols"]["stored"]["correct"] == plain["protocols"]["stored"]["correct"]
    assert warm["protocols"]["batch"] == plain["protocols"]["batch"]
    assert evaluate.main([str(run), "--fit-temperature"]) == 0
    assert "calibration error" in capsys.readouterr().out


def test_a_temperature_that_cannot_be_fitted_costs_no_answer(
    tiny_run: TinyRun, capsys: Capture, tmp_path: Path
) -> None:
    image = image_files(tiny_run.test_split, range(1))[0]
    samples = [Sample(f"{k}.png", str(k), image) for k in range(10)]
    write_shards(samples, tmp_path / "few" / "test", classes=[str(k) for k in range(10)], workers=1)
    capsys.readouterr()
    assert evaluate.main([str(tiny_run.folder), "--data", str(tmp_path / "few"), "--fit-temperature"]) == 2
    said = capsys.readouterr()
    assert "10 samples, 10 classes" in said.out and "stored" in said.out
    assert said.err == (
        "error: --fit-temperature: 10 samples are too few to fit a temperature and to check it; use a larger split\n"
    )


def test_a_checkpoint_by_a_short_path(tiny_run: TinyRun, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_json(capsys, tiny_run.folder)["protocols"]
    monkeypatch.chdir(tiny_run.folder / "checkpoints")
    assert run_json(capsys, f"step-{tiny_run.steps[-1]}")["protocols"] == expected
    monkeypatch.chdir(f"step-{tiny_run.steps[-1]}")
    assert run_json(capsys, ".")["protocols"] == expected


def test_a_class_prior_is_for_networks_trained_with_the_center_prior(
    tiny_run: TinyRun, capsys: Capture, tmp_path: Path
) -> None:
    message = refusal(capsys, evaluate.main, tiny_run.folder, "--prior", "balanced")
    assert "anchor.center=prior" in message and "anchor.center=probabilities" in message
    run = _as_prior(tiny_run, tmp_path)
    values = run_json(capsys, run)["protocols"]
    assert list(values) == ["batch", "single", "dataset", "stored", "balanced"]
    shares = ",".join(f"{k}={k + 1}" for k in range(10))
    given = run_json(capsys, run, "--prior", shares)["protocols"]
    assert list(given) == [*values, "given"]
    equal = ",".join(f"{k}=3" for k in range(10))
    assert run_json(capsys, run, "--prior", equal)["protocols"]["given"] == values["balanced"]
    assert "lacks 1, 2" in refusal(capsys, evaluate.main, run, "--prior", "0=1")
    run_json(capsys, run, "--prior", "balanced", "--fit-temperature")
    assert run_json(capsys, run, "--prior", "balanced", "--calibrated")["calibrated"] is True
    assert "not calibrated under the class prior training" in refusal(capsys, evaluate.main, run, "--calibrated")


def _as_prior(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """The run as if it had been trained with the center "prior": what is asked about is evaluation, not training."""
    run, name = tmp_path / "prior-run", f"step-{tiny_run.steps[-1]}"
    folder = run / "checkpoints" / name
    folder.mkdir(parents=True)
    for path in (tiny_run.folder / "checkpoints" / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (run / "config.yaml").write_bytes((tiny_run.folder / "config.yaml").read_bytes())
    card = json.loads((folder / "model.json").read_text()) | {"center": "prior", "floor": 0.02}
    (folder / "model.json").write_text(json.dumps(card))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "model.json").read_bytes()
    manifest["files"]["model.json"] = {"size": len(data), "sha256": sha256_bytes(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_only_some_protocols(tiny_run: TinyRun, capsys: Capture) -> None:
    everything = run_json(capsys, tiny_run.folder)["protocols"]
    some = run_json(capsys, tiny_run.folder, "--protocol", "stored", "--protocol", "batch")["protocols"]
    assert some == {name: everything[name] for name in ("batch", "stored")}
    text = refusal(capsys, evaluate.main, tiny_run.folder, "--protocol", "argmax")
    assert text == "protocol argmax does not apply to this checkpoint; it has batch, single, dataset, stored"
    text = refusal(capsys, evaluate.main, tiny_run.pretrained, "--protocol", "stored")
    assert text == "protocol stored does not apply to this checkpoint; it has argmax"


def test_other_checkpoints(tiny_run: TinyRun, capsys: Capture) -> None:
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


def test_other_data_and_groups(tiny_run: TinyRun, capsys: Capture) -> None:
    base = run_json(capsys, tiny_run.folder)["protocols"]
    explicit = run_json(capsys, tiny_run.folder, "--data", tiny_run.data, "--split", "test", "--batch-size", 7)
    assert {n: r["correct"] for n, r in explicit["protocols"].items()} == {n: r["correct"] for n, r in base.items()}
    train = run_json(capsys, tiny_run.folder, "--split", "train")
    assert train["split"] == "train"
    assert train["protocols"]["batch"]["total"] != base["batch"]["total"]
    alone = run_json(capsys, tiny_run.folder, "--group-size", 1, "--seed", 5)
    seeds = alone["protocols"]["batch"].pop("seeds")
    assert alone["protocols"]["batch"] == base["single"]  # groups of one are the samples themselves
    assert set(seeds["accuracies"]) == {base["single"]["accuracy"]}
    assert (alone["seed"], alone["group_size"]) == (5, 1)
    whole = run_json(capsys, tiny_run.folder, "--group-size", 10**15)
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
    same = ("--predictions", tmp_path / "one", "--output", tmp_path / "one")
    assert "would overwrite each other" in refusal(capsys, evaluate.main, tiny_run.folder, *same)
    assert "a folder; name a file" in refusal(capsys, evaluate.main, tiny_run.folder, "--output", tmp_path)
    text = refusal(capsys, evaluate.main, tiny_run.folder, "--predictions", missing)
    assert text == f"{missing}: no such folder to write to"


def test_refuses_what_it_cannot_do(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        return refusal(capsys, evaluate.main, *arguments)

    assert refused(tmp_path / "no").startswith(f"{tmp_path / 'no'}: no such folder; give a run folder")
    assert "no such folder" in refused(tiny_run.config)
    assert "this run has no best checkpoint yet; use --checkpoint latest" in refused(tmp_path, "--checkpoint", "best")
    folder = tiny_run.data / "validation"
    expected = f"{folder}: no such packed split; {tiny_run.data} holds test, train"
    assert refused(tiny_run.folder, "--split", "validation") == expected
    assert "no such packed split" in refused(tiny_run.folder, "--data", tmp_path)
    image = image_files(tiny_run.test_split, range(1))[0]
    write_shards([Sample(f"{i}.png", "ab"[i], image) for i in range(2)], tmp_path / "other" / "test", workers=1)
    expected = f"{tmp_path / 'other' / 'test'}: its classes are not the 10 classes of the checkpoint"
    assert refused(tiny_run.folder, "--data", tmp_path / "other") == expected


@pytest.mark.parametrize("text", ["", "- 1\n", "data: 3\n", "data: {path: 3, eval_split: test}\n", "a: [", None])
def test_with_a_damaged_run_config(tiny_run: TinyRun, capsys: Capture, tmp_path: Path, text: str | None) -> None:
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
