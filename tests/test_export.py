"""Exports: run as their users will, on the same images as the original; and refused when they disagree."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fixtures_run import TinyRun, image_files, tiny_run

from oat_dist import OATClassifier, cli
from oat_dist.data.storage import ShardReader
from oat_dist.errors import CheckpointError, ConfigError, OatError
from oat_dist.export import write as export_write
from oat_dist.export.check import Agreement, compare, noise
from oat_dist.export.formats import run_onnx, run_torch
from oat_dist.export.graph import trace
from oat_dist.export.write import export_model
from oat_dist.files import sha256_file
from oat_dist.portable import Description, read_description

__all__ = ["tiny_run"]

Capture = pytest.CaptureFixture[str]
DOCS = Path(__file__).parent.parent / "docs" / "export.md"


@pytest.fixture(scope="module")
def classifier(tiny_run: TinyRun) -> OATClassifier:
    return OATClassifier.from_checkpoint(tiny_run.folder, "cpu")


@pytest.fixture(scope="module")
def files(tiny_run: TinyRun) -> list[bytes]:
    return image_files(tiny_run.test_split, range(0, 360, 6))


@pytest.fixture(scope="module")
def exported(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format, by the command. Read only."""
    folder = tmp_path_factory.mktemp("exports") / "digits"
    assert cli.main(["export", str(tiny_run.folder), str(folder), "--check", "50"]) == 0
    return folder


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.json").read_text())


def exporting(capsys: Capture, *arguments: object, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert cli.main(["export", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def agrees(classifier: OATClassifier, run: Callable[..., Any], files: list[bytes]) -> None:
    """The same answers, one at a time and in batches of several sizes."""
    images = np.stack([classifier.prepare(file) for file in files])
    labels, probabilities_NC = classifier.predict(files)
    scores_NC = classifier.answer(images).scores_BC
    for size in (1, 3, len(images)):
        parts = [run(images[at : at + size]) for at in range(0, len(images), size)]
        scores, probabilities, found = (np.concatenate(column) for column in zip(*parts, strict=True))
        assert found.tolist() == labels
        assert np.abs(scores - scores_NC.numpy()).max() < 1e-5
        assert np.abs(probabilities - probabilities_NC.numpy()).max() < 1e-5


# The files.


def test_the_folder_and_its_description(exported: Path, tiny_run: TinyRun, classifier: OATClassifier) -> None:
    found = described(exported)
    expected = {"README.md", "model.json", "model.onnx", "model.pt2", "model.safetensors"}
    assert {path.name for path in exported.iterdir()} == expected
    assert found["files"].keys() == expected - {"model.json"}
    for name, facts in found["files"].items():
        assert facts == {"size": (exported / name).stat().st_size, "sha256": sha256_file(exported / name)}
    weights = sha256_file(tiny_run.folder / "checkpoints" / f"step-{tiny_run.steps[-1]}" / "model.safetensors")
    assert found["source"]["weights_sha256"] == weights == found["files"]["model.safetensors"]["sha256"]
    assert found["source"]["checkpoint"] == f"step-{tiny_run.steps[-1]}"
    evaluation = json.loads((tiny_run.folder / "evaluation.json").read_text())
    share = evaluation["protocols"]["stored"]["accuracy"]
    assert found["source"]["accuracy"] == f"{share:.2%} of 359 samples of test (stored)"
    assert found["classes"] == classifier.classes
    assert found["answer"]["anchor"] == found["answer"]["stored_anchor"] == classifier.stored_anchor_C.tolist()
    assert (found["answer"]["protocol"], found["answer"]["prior"]) == ("stored", "training")
    assert found["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert found["checked"]["images"] == "images of the split test, drawn by seed 0"
    for form in ("onnx", "torch", "portable"):
        facts = found["checked"][form]
        assert (facts["images_one_at_a_time"], facts["labels_different"]) == (50, 0)
        assert 0 <= facts["largest_score_difference"] < 1e-5
    assert {"python", "torch", "onnx", "onnxruntime"} <= found["versions"].keys()
    assert 'OATClassifier.from_pretrained("USER/NAME")' in (exported / "README.md").read_text()


def test_onnx_runs(exported: Path, classifier: OATClassifier, files: list[bytes]) -> None:
    agrees(classifier, run_onnx(exported / "model.onnx"), files)
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("images", "tensor(uint8)", ["batch", 32, 32, 3])
    ]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("scores", "tensor(float)", ["batch", 10]),
        ("probabilities", "tensor(float)", ["batch", 10]),
        ("labels", "tensor(int64)", ["batch"]),
    ]
    inside = json.loads(session.get_modelmeta().custom_metadata_map["oat_dist"])
    assert Description.from_json(inside) == dataclasses.replace(read_description(exported), weights_sha256=None)
    onnx.checker.check_model(exported / "model.onnx")


def test_torch_export_runs(exported: Path, classifier: OATClassifier, files: list[bytes]) -> None:
    agrees(classifier, run_torch(exported / "model.pt2"), files)
    inside = {"model.json": ""}
    torch.export.load(exported / "model.pt2", extra_files=inside)
    assert json.loads(inside["model.json"])["classes"] == classifier.classes


def test_portable_files_load_back(
    exported: Path, tiny_run: TinyRun, classifier: OATClassifier, files: list[bytes], capsys: Capture, tmp_path: Path
) -> None:
    loaded = OATClassifier.from_pretrained(exported)
    assert (loaded.classes, loaded.card["crop"]) == (classifier.classes, "squash")
    for protocol in ("stored", "single", "batch"):
        assert torch.equal(loaded.predict(files, protocol)[1], classifier.predict(files, protocol)[1])
    again = loaded.save_pretrained(tmp_path / "again")
    assert {path.name for path in again.iterdir()} == {"README.md", "model.json", "model.safetensors"}
    assert read_description(again) == read_description(exported)
    path = tmp_path / "digit.png"
    path.write_bytes(files[0])
    outputs = []
    for model in (tiny_run.folder, exported, again):
        capsys.readouterr()
        assert cli.main(["predict", str(model), str(path), "--format", "csv"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    with pytest.raises(CheckpointError, match=r"an exported model, not a run; load it with OATClassifier\.from_"):
        OATClassifier.from_checkpoint(exported)
    for options, message in ((["--checkpoint", "best"], "has no checkpoints"), (["--calibrated"], "without a temper")):
        assert cli.main(["predict", str(exported), str(path), *options]) == 2
        assert message in capsys.readouterr().err


def test_the_lines_of_the_documentation(
    exported: Path, classifier: OATClassifier, files: list[bytes], capsys: Capture, tmp_path: Path
) -> None:
    (code,) = re.findall(r"```python\n(import json\n.*?)```", DOCS.read_text(), re.DOTALL)
    code = code.replace(
        "json.load(open(", "json.loads(open_text("
    )  # a file left open is a warning, and so an error here
    paths = []
    for number, file in enumerate(files):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(file)
    names = {"folder": exported, "paths": paths, "open_text": lambda path, encoding: Path(path).read_text(encoding)}
    exec(compile(code, DOCS, "exec"), names)
    assert names["labels"].tolist() == classifier.predict(files)[0]
    assert capsys.readouterr().out == f"{[classifier.classes[label] for label in names['labels']]}\n"
    model = described(exported)
    model["preprocessing"] |= {"crop": "center_crop", "crop_fraction": 0.7}
    names["model"] = model
    cropping = OATClassifier(
        classifier.network, classifier.card | {"crop": "center_crop", "crop_fraction": 0.7}, classifier.stored_anchor_C
    )
    assert all(np.array_equal(names["prepare"](path), cropping.prepare(path)) for path in paths)


# The check on the spot.


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_wrong_anchor_in_the_graph_is_refused(
    tiny_run: TinyRun, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def wrong(classifier: OATClassifier) -> torch.export.ExportedProgram:
        assert classifier.stored_anchor_C is not None
        return trace(OATClassifier(classifier.network, classifier.card, classifier.stored_anchor_C.roll(1)))

    monkeypatch.setattr(export_write, "trace", wrong)
    out, err = exporting(capsys, tiny_run.folder, tmp_path / "new" / "out", "--format", form, "--check", 20, status=2)
    assert out == ""
    assert err.startswith(f"error: format {form}: the exported model does not agree with the original on 20 images, ")
    assert err.endswith("(0.0001 allowed); nothing is written\n")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_network_stays_as_it_is(classifier: OATClassifier, exported: Path, tmp_path: Path) -> None:
    before = [value.requires_grad for value in classifier.network.parameters()]
    export_model(classifier, tmp_path / "out", ["torch"], noise(32, 2), images_are="noise")
    assert [value.requires_grad for value in classifier.network.parameters()] == before == [True] * len(before)
    assert torch.backends.mha.get_fastpath_enabled()
    images = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    assert not any(output.requires_grad for output in torch.export.load(exported / "model.pt2").module()(images))


def test_what_the_check_lets_pass(classifier: OATClassifier) -> None:
    images = list(noise(32, 5))

    def altered(change: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]) -> Agreement:
        def run(batch: np.ndarray) -> Any:
            answers = classifier.answer(batch)
            return change(*(x.numpy().copy() for x in (answers.scores_BC, answers.probabilities_BC, answers.labels_B)))

        return compare(classifier, {"x": run}, images)["x"]

    same = altered(lambda s, p, y: (s, p, y))
    assert same.holds
    assert (same.images, same.different) == (5, 0)
    near = altered(lambda s, p, y: (s + 9e-5, p - 9e-5, y))
    assert near.holds
    assert near.score == pytest.approx(9e-5, rel=1e-3)
    assert not altered(lambda s, p, y: (s + 1.1e-4, p, y)).holds
    assert not altered(lambda s, p, y: (s, p + 1.1e-4, y)).holds
    assert not altered(lambda s, p, y: (s * np.nan, p, y)).holds
    other = altered(lambda s, p, y: (s, p, (y + 1) % 10))
    assert not other.holds
    assert other.different == 10  # alone and in a batch
    with pytest.raises(OatError, match="outputs of other shapes"):
        altered(lambda s, p, y: (s[:, :9], p, y))
    assert not compare(classifier, {"x": lambda batch: None}, [])["x"].holds


def test_labels_may_swap_at_a_tie() -> None:
    """Two classes of the very same score: either will do."""

    class Tied(torch.nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 1.0 + 1e-6, 0.0]]).repeat(len(images_BCHW), 1)

    card = {"name": "x", "classes": list("abc"), "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    model = OATClassifier(Tied(), card | {"objective": "cross_entropy", "center": "probabilities", "floor": 0.0}, None)

    def first(batch: np.ndarray) -> Any:
        answers = model.answer(batch)
        return answers.scores_BC.numpy(), answers.probabilities_BC.numpy(), np.zeros(len(batch), np.int64)

    found = compare(model, {"x": first}, noise(8, 3))["x"]
    assert found.holds
    assert (found.different, found.ties) == (0, 6)


# Other models.


def test_cross_entropy_alone(tiny_run: TinyRun, files: list[bytes], capsys: Capture, tmp_path: Path) -> None:
    out, _ = exporting(capsys, tiny_run.pretrained, tmp_path / "out", "--format", "onnx", "--check", 10)
    assert "same labels" in out
    pretrained = OATClassifier.from_checkpoint(tiny_run.pretrained)
    agrees(pretrained, run_onnx(tmp_path / "out" / "model.onnx"), files)
    found = described(tmp_path / "out")
    assert (found["answer"]["protocol"], found["answer"]["anchor"], found["answer"]["scores"]) == (
        "argmax",
        None,
        "logits",
    )
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors; export the model with --format portable"):
        OATClassifier.from_pretrained(tmp_path / "out")


def test_prior_and_temperature_travel(classifier: OATClassifier, files: list[bytes], tmp_path: Path) -> None:
    card = classifier.card | {"center": "prior", "crop": "center_crop", "crop_fraction": 0.9}
    for prior, temperature in (("balanced", 0.3), ([*range(1, 11)], None)):
        model = OATClassifier(
            classifier.network, card, classifier.stored_anchor_C, "cpu", prior=prior, temperature=temperature
        )
        folder = tmp_path / str(temperature)
        found = export_model(model, folder, ["torch", "portable"], noise(32, 8), images_are="noise")
        assert found["torch"].images == 8
        loaded = OATClassifier.from_pretrained(folder)
        assert (loaded.temperature, loaded.prior) == (temperature, model.prior)
        assert torch.equal(loaded.predict(files)[1], model.predict(files)[1])
        agrees(model, run_torch(folder / "model.pt2"), files)
        assert torch.equal(
            OATClassifier.from_pretrained(folder, prior=model.prior).predict(files)[1], model.predict(files)[1]
        )
    trained = OATClassifier(classifier.network, card, classifier.stored_anchor_C, "cpu")
    again = OATClassifier.from_pretrained(tmp_path / "None", prior="training")
    assert torch.equal(again.predict(files)[1], trained.predict(files)[1])
    with pytest.raises(ConfigError, match="calibrated for the class prior balanced"):
        OATClassifier.from_pretrained(tmp_path / "0.3", prior="training")


# What cannot be.


def test_folders_that_are_there(tiny_run: TinyRun, capsys: Capture, tmp_path: Path) -> None:
    quick = ("--format", "portable", "--check", 5)
    output = tmp_path / "out"
    out, err = exporting(capsys, tiny_run.folder, output, *quick)
    assert (out.splitlines()[0], err) == (f"exported  {output}: README.md, model.json, model.safetensors", "")
    before = (output / "model.json").read_bytes()
    _, err = exporting(capsys, tiny_run.folder, output, *quick, status=2)
    assert err.startswith(f"error: {output}: is there already; choose another folder, or replace")
    assert (output / "model.json").read_bytes() == before
    exporting(capsys, tiny_run.pretrained, output, *quick, "--overwrite")
    assert described(output)["answer"]["objective"] == "cross_entropy"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for taken in (mine, tmp_path / "file", tmp_path):
        _, err = exporting(capsys, tiny_run.folder, taken, *quick, "--overwrite", status=2)
        assert "is there and is not an exported model, so it is not replaced" in err
    assert (mine / "thesis.txt").read_text() == "dear"
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_the_evaluation_split(tiny_run: TinyRun, exported: Path, capsys: Capture, tmp_path: Path) -> None:
    """A checkpoint that somebody sent: random pixels then, and it says so."""
    step = f"step-{tiny_run.steps[-1]}"
    shutil.copytree(tiny_run.folder / "checkpoints" / step, tmp_path / "sent" / step)
    quick = ("--format", "portable", "--check", 5)
    out, err = exporting(capsys, tmp_path / "sent" / step, tmp_path / "a", *quick)
    assert re.fullmatch(r"note: no evaluation split to compare on \([^\n]*\); random images instead\n", err)
    assert "compared  with the original on 5 images, one at a time: random pixels, seed 0" in out
    assert described(tmp_path / "a")["checked"]["images"] == "random pixels, seed 0"
    out, err = exporting(
        capsys, exported, tmp_path / "b", *quick, "--data", tiny_run.data, "--split", "train"
    )  # an export is exported
    assert (err, "images of the split train" in out) == ("", True)
    _, err = exporting(capsys, tiny_run.folder, tmp_path / "c", *quick, "--split", "validation", status=2)
    assert "no such packed split" in err


def test_options_that_cannot_be(
    tiny_run: TinyRun, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        (["--format", "onnx,tflite"], "--format onnx,tflite: 'tflite' is unknown; use any of onnx, torch, portable"),
        (["--format", ","], "--format is empty"),
        (["--opset", "7", "--format", "onnx"], "--opset 7: the network can be written with opset "),
        (["--prior", "balanced"], "whose anchor is no class prior"),
        (["--calibrated"], "not calibrated"),
        (["--push-to-hub", "a/b", "--format", "onnx"], "--push-to-hub needs the format portable"),
        (["--push-to-hub", "a b"], "a b: not a name of the hub; it must be user/name"),
    ):
        out, err = exporting(capsys, tiny_run.folder, tmp_path / "out", *options, status=2)
        assert out == ""
        assert re.fullmatch(r"error: [^\n]*\n", err)
        assert message in err
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)  # as if it were not installed
    _, err = exporting(capsys, tiny_run.folder, tmp_path / "out", status=2)
    assert err == (
        "error: format onnx needs onnxscript: pip install 'oat_dist[onnx]', or leave it out: --format torch,portable\n"
    )
    assert list(tmp_path.iterdir()) == []


def damaged(exported: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(exported, folder)
    values = described(folder)
    change(values)
    (folder / "model.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format="other"), "not the description of an exported model"),
        (lambda v: v.update(version=2), "version 2 of the format, and this oat_dist reads 1; update it"),
        (lambda v: v.pop("classes"), "damaged, 'classes' is missing"),
        (lambda v: v.update(classes="abc"), "classes must be names"),
        (lambda v: v.update(classes=[]), "classes must be names"),
        (lambda v: v.update(network="../../evil"), "its network cannot be built: model.name='../../evil' is unknown"),
        (lambda v: v.update(network="wrn_28_10"), "the weights do not fit wrn_28_10"),
        (lambda v: v["preprocessing"].update(image_size=10**9), "image_size 1000000000"),
        (lambda v: v["preprocessing"].update(image_size=True), "image_size True"),
        (lambda v: v["preprocessing"].update(crop="random_resized_crop"), "crop 'random_resized_crop'"),
        (lambda v: v["preprocessing"].update(std=[0, 0, 0]), "std must be positive"),
        (lambda v: v["preprocessing"].update(mean=[float("nan")] * 3), "nan is not a number"),
        (lambda v: v["answer"].update(anchor=[0.5]), "anchor must be 10 numbers"),
        (lambda v: v["answer"].update(temperature=-1), "temperature -1"),
        (lambda v: v["answer"].update(objective="magic"), "objective 'magic'"),
        (lambda v: v.update(answer=3), "damaged"),
        (lambda v: v["files"]["model.safetensors"].update(sha256="0"), "its SHA-256 is not that of model.json"),
    ],
)
def test_descriptions_that_are_damaged_or_mean_harm(
    exported: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = damaged(exported, tmp_path / "model", change)
    with pytest.raises(CheckpointError) as caught:
        OATClassifier.from_pretrained(folder)
    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_damaged(exported: Path, tmp_path: Path) -> None:
    for text in ("", "[]", "{", '{"format": "oat_dist-model"}', "[" * 100_000):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"model.json: "):
            OATClassifier.from_pretrained(tmp_path)
    shutil.copy(exported / "model.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be loaded"):
        OATClassifier.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder, and not a name of the hub"):
        OATClassifier.from_pretrained(tmp_path / "no")


def test_odd_class_names(classifier: OATClassifier, tmp_path: Path) -> None:
    names = ["ä", "`code`", "new\nline", "\udcff", "<b>", "---", "|", '"', "\\", "\x1b"]
    model = OATClassifier(classifier.network, classifier.card | {"classes": names}, classifier.stored_anchor_C)
    folder = model.save_pretrained(tmp_path / "odd")
    assert OATClassifier.from_pretrained(folder).classes == names
    page = (folder / "README.md").read_bytes()
    (listed,) = re.findall(rb"```json\n(.*)\n```", page)
    assert json.loads(listed) == names
    assert b"\x1b" not in page


# The hub.


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub whose cache is ours, without network and login; the folder of the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "cache"


def test_a_model_in_the_cache_of_the_hub(
    exported: Path, classifier: OATClassifier, files: list[bytes], offline: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline / "models--user--digits"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("model.json", "model.safetensors"):
        shutil.copy(exported / name, snapshot)
    for revision in (None, "main", commit):
        loaded = OATClassifier.from_pretrained("user/digits", revision=revision)
        assert torch.equal(loaded.predict(files)[1], classifier.predict(files)[1])
    for name, revision in (("user/other", None), ("user/digits", "v2")):
        with pytest.raises(CheckpointError) as caught:
            OATClassifier.from_pretrained(name, revision=revision)
        assert str(caught.value).startswith(f"{name}{'@v2' if revision else ''}: cannot be fetched from the hub (")
        assert "\n" not in str(caught.value)


def test_pushing_without_login_or_network(
    tiny_run: TinyRun,
    classifier: OATClassifier,
    offline: Path,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, err = exporting(capsys, tiny_run.folder, tmp_path / "out", "--push-to-hub", "user/digits", status=2)
    assert err.startswith("error: user/digits: cannot be pushed, nobody is logged in to the hub; run `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(OatError, match="user/digits: cannot be pushed to the hub "):
        classifier.push_to_hub("user/digits")
    assert not (tmp_path / "out").exists()


def test_every_image_of_the_split_is_used_when_more_are_asked_for(tiny_run: TinyRun, classifier: OATClassifier) -> None:
    from oat_dist.export.check import split_images

    shards = tiny_run.test_split
    images = list(split_images(classifier, shards, 10**6))
    assert len(images) == shards.num_samples
    reader = ShardReader(shards)
    every = {classifier.prepare(reader.read(number)).tobytes() for number in range(shards.num_samples)}
    reader.close()
    assert {image.tobytes() for image in images} == every
    some = list(split_images(classifier, shards, 7))
    assert [image.tobytes() for image in some] == [image.tobytes() for image in images[:7]]


def test_nothing_is_replaced_that_no_export_wrote(
    exported: Path, tiny_run: TinyRun, capsys: Capture, tmp_path: Path
) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(exported, folder)
    (folder / ".git").mkdir()
    _, problem = exporting(capsys, tiny_run.folder, folder, "--format", "portable", "--overwrite", status=2)
    assert "holds '.git', which no export wrote" in problem
    assert (folder / ".git").is_dir() and (folder / "model.onnx").is_file()
    _, problem = exporting(capsys, exported, exported, "--format", "portable", "--overwrite", status=2)
    assert "is the model that is to be exported" in problem


def test_an_export_says_nothing_of_the_machine(exported: Path) -> None:
    top = str(Path(__file__).parents[1]).encode()
    for name in ("model.onnx", "model.pt2"):
        assert top not in (exported / name).read_bytes(), name
    assert (exported / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_outputs_that_are_not_finite_are_an_error(classifier: OATClassifier, files: list[bytes]) -> None:
    network = copy.deepcopy(classifier.network)
    next(network.parameters()).data.fill_(float("nan"))
    broken = OATClassifier(network, classifier.card, classifier.stored_anchor_C)
    with pytest.raises(CheckpointError, match="not finite"):
        broken.predict(files)
