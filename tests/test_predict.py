"""OATClassifier: any kind of image in, an answer that does not depend on its company out."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_run import TinyRun, image_files, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_evaluate import evaluate_run

from oat_dist import OATClassifier, predict
from oat_dist.answers import project_to_simplex
from oat_dist.calibration import Calibration, write_temperature
from oat_dist.checkpoint import find_checkpoint
from oat_dist.data.images.decode import decode_rgb
from oat_dist.errors import CheckpointError, ConfigError, DataError
from oat_dist.files import sha256_file

__all__ = ["tiny_run"]


@pytest.fixture(scope="module")
def classifier(tiny_run: TinyRun) -> OATClassifier:
    return OATClassifier.from_checkpoint(tiny_run.folder)


@pytest.fixture(scope="module")
def files(tiny_run: TinyRun) -> list[bytes]:
    return image_files(tiny_run.test_split, range(0, 360, 9))


def test_every_kind_of_image_gives_the_same_answer(
    classifier: OATClassifier, files: list[bytes], tmp_path: Path
) -> None:
    data = files[3]
    path = tmp_path / "digit.png"
    path.write_bytes(data)
    array = decode_rgb(data)
    kinds: list[Any] = [path, str(path), data, Image.open(io.BytesIO(data)), array, torch.from_numpy(array.copy())]
    kinds += [bytearray(data), memoryview(data), torch.from_numpy(array.copy()).permute(2, 0, 1), array[:, :, 0]]
    kinds += [np.dstack([array, np.full_like(array[:, :, :1], 7)]), torch.from_numpy(array[:, :, :1].copy())]
    kinds += [[path], (str(path),), [data], [array], array[None], torch.from_numpy(array.copy())[None]]
    labels, probabilities_1C = classifier.predict(path)
    assert len(labels) == 1
    assert isinstance(labels[0], int)
    assert probabilities_1C.shape == (1, 10)
    assert probabilities_1C.dtype == torch.float64
    for kind in kinds:
        again, same_1C = classifier.predict(kind)
        assert again == labels
        assert torch.equal(same_1C, probabilities_1C)
    labels, probabilities_NC = classifier.predict([path, data, array])
    assert labels == again * 3
    assert probabilities_NC.shape == (3, 10)
    assert classifier.predict([])[0] == []
    assert classifier.predict([])[1].shape == (0, 10)


@pytest.mark.parametrize("protocol", ["stored", "single"])
def test_answers_do_not_depend_on_the_company(classifier: OATClassifier, files: list[bytes], protocol: str) -> None:
    labels, together_NC = classifier.predict(files, protocol)
    assert len(set(labels)) > 3
    alone = [classifier.predict(file, protocol) for file in files]
    reverse, reverse_NC = classifier.predict(files[::-1], protocol, batch_size=7)
    assert [answer[0][0] for answer in alone] == labels == reverse[::-1]
    for other in (torch.cat([answer[1] for answer in alone]), reverse_NC.flip(0)):
        assert float((other - together_NC).abs().max()) < 1e-6


def test_protocol_batch_does_depend_on_it(classifier: OATClassifier, files: list[bytes]) -> None:
    """The negative control of the test above, and the reason why it is not the default."""
    _, together_NC = classifier.predict(files, "batch")
    _, halves_NC = classifier.predict(files[:20], "batch")
    assert float((together_NC[:20] - halves_NC).abs().max()) > 1e-4
    _, small_NC = classifier.predict(files, "batch", batch_size=3)  # but not on the forward batch
    assert float((together_NC - small_NC).abs().max()) < 1e-6
    with pytest.raises(ValueError, match="protocol must be stored, single or batch, not 'dataset'"):
        classifier.predict(files, "dataset")


def test_it_agrees_with_evaluate(classifier: OATClassifier, tiny_run: TinyRun) -> None:
    evaluation = evaluate_run(tiny_run, 256)
    everything = image_files(tiny_run.test_split, range(tiny_run.test_split.num_samples))
    for protocol in ("stored", "single"):
        result = evaluation.protocols[protocol]
        labels, _ = classifier.predict(everything, protocol)
        different = {i for i, (a, b) in enumerate(zip(labels, result.predicted_N.tolist(), strict=True)) if a != b}
        assert different <= set(result.ties)


def test_probabilities(classifier: OATClassifier, files: list[bytes]) -> None:
    for protocol in ("stored", "single", "batch"):
        labels, probabilities_NC = classifier.predict(files, protocol)
        assert bool((probabilities_NC >= 0).all())
        assert torch.allclose(probabilities_NC.sum(dim=1), torch.ones(len(files), dtype=torch.float64), atol=1e-12)
        assert probabilities_NC.argmax(dim=1).tolist() == labels


def test_classes_and_checkpoint_folders(classifier: OATClassifier, tiny_run: TinyRun) -> None:
    assert classifier.classes == tiny_run.test_split.classes
    step = tiny_run.folder / "checkpoints" / f"step-{tiny_run.steps[-1]}"
    image = image_files(tiny_run.test_split, range(1))
    assert torch.equal(OATClassifier.from_checkpoint(str(step)).predict(image)[1], classifier.predict(image)[1])


def test_a_checkpoint_of_cross_entropy_alone(tiny_run: TinyRun, files: list[bytes]) -> None:
    pretrained = OATClassifier.from_checkpoint(tiny_run.pretrained)
    assert pretrained.stored_anchor_C is None
    labels, probabilities_NC = pretrained.predict(files)
    with torch.inference_mode():
        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(file)).convert("RGB").resize((32, 32), 2)) for file in files]
        )
        inputs = (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
        expected_NC = pretrained.network(inputs.float()).double().softmax(dim=1)
    assert float((probabilities_NC - expected_NC).abs().max()) < 1e-5
    assert labels == expected_NC.argmax(dim=1).tolist()
    assert torch.equal(pretrained.predict(files, "single")[1], probabilities_NC)


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_that_are_none(classifier: OATClassifier, files: list[bytes], tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    lazy = Image.open(io.BytesIO(files[0][: len(files[0]) * 2 // 3]))  # Pillow reads the header only
    wrong: list[tuple[object, str]] = [
        (tmp_path / "no.jpg", f"{tmp_path / 'no.jpg'}: cannot be read (No such file or directory)"),
        (tmp_path, f"{tmp_path}: cannot be read (Is a directory)"),
        (text, f"{text}: not an image that can be decoded: "),
        (b"", "bytes that cannot be decoded as an image: "),
        (files[0][:30], "bytes that cannot be decoded as an image: "),
        (lazy, "a PIL image that cannot be decoded: "),
        (np.zeros((4, 4, 3)), "an image array must be uint8 of shape (H, W, 3), not float64 (4, 4, 3)"),
        (
            np.zeros((3, 5, 5), np.uint8),
            "an image array must be uint8 of shape (H, W, 3), not uint8 (3, 5, 5); its chan",
        ),
        (np.zeros((9, 5, 5), np.uint8), "an image array must be uint8 of shape (H, W, 3), not uint8 (9, 5, 5)"),
        ([np.zeros(4, np.uint8)], "an image array must be uint8 of shape (H, W, 3), not uint8 (4,)"),
        ([[[1, 2], [3]]], "not an image: list ("),
        (np.zeros((0, 4, 3), np.uint8), "an image array must be uint8 of shape (H, W, 3), not uint8 (0, 4, 3)"),
        (
            torch.zeros(4, 4, 3),
            "an image array must be uint8 of shape (H, W, 3), not float32 (4, 4, 3); floats have no",
        ),
        (torch.zeros(4, 4, 3, dtype=torch.bfloat16), "not an image: Tensor ("),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "a tensor of shape (3, 4, 4) may have its channels first or last"),
        (torch.zeros(3, 64, 3, dtype=torch.uint8), "a tensor of shape (3, 64, 3) may have its channels first or last"),
        (Image.new("F", (4, 4)), "a PIL image of 32 bits a pixel, with no defined range"),
        (Path("/dev/zero"), "/dev/zero: cannot be read (not a regular file)"),
        ("a\0b", "'a\\x00b': cannot be read (embedded null byte)"),
    ]
    for image, message in wrong:
        with pytest.raises(DataError) as caught:
            classifier.predict(image)
        assert one_line(caught).startswith(message)


def test_checkpoints_that_are_none(tiny_run: TinyRun, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, f"{tmp_path}: no valid checkpoint in this run folder"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "step-3", f"{tmp_path / 'step-3'}: no such folder"),
        (tiny_run.config, "no such folder"),
    ):
        with pytest.raises(CheckpointError) as caught:
            OATClassifier.from_checkpoint(path)
        assert message in one_line(caught)


def test_pillow_images_of_16_bits_and_palettes(classifier: OATClassifier, tmp_path: Path) -> None:
    grey = np.arange(0, 64, dtype=np.uint16).reshape(8, 8) * 1000
    palette = Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    for number, image in enumerate((Image.fromarray(grey), palette)):
        path = tmp_path / f"{number}.png"
        image.save(path)
        expected = classifier.predict(path)[1]
        assert torch.equal(classifier.predict(image)[1], expected)
        with Image.open(path) as opened:
            assert torch.equal(classifier.predict(opened)[1], expected)


# The company of an image.


class Wavering(torch.nn.Module):
    """A network whose outputs move with the batch, as fast kernels' do: by 1e-6, here between the two best classes."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        batch = len(images_BCHW)
        row = torch.tensor([0.2, 0.5, 0.5 + 1e-6 * (1 if batch % 2 else -1), 0.1])
        return row.repeat(batch, 1)


@pytest.mark.parametrize("objective", ["oat", "cross_entropy"])
def test_labels_do_not_depend_on_the_company_even_at_a_tie(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    card = {"name": "x", "classes": list("abcd"), "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    card |= {"objective": objective, "center": "probabilities", "floor": 0.0}
    anchor_C = torch.full((4,), 0.25) if objective == "oat" else None
    wavering = OATClassifier(Wavering(), card, anchor_C)
    images = np.zeros((10, 8, 8, 3), np.uint8)
    protocols = ("stored", "single") if objective == "oat" else ("stored",)
    for protocol in protocols:
        for size in (1, 2, 3, 10):
            assert wavering.predict(images, protocol, batch_size=size)[0] == [2] * 10
    monkeypatch.setattr(predict, "_NEAR", 0.0)  # without the second look
    assert wavering.predict(images, batch_size=10)[0] == [1] * 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_as_on_the_cpu(tiny_run: TinyRun, classifier: OATClassifier, files: list[bytes]) -> None:
    """In every company, and within rounding of the CPU."""
    gpu = OATClassifier.from_checkpoint(tiny_run.folder, "cuda")
    cpu = OATClassifier.from_checkpoint(tiny_run.folder, "cpu")
    for protocol in ("stored", "single"):
        labels, probabilities_NC = gpu.predict(files, protocol)
        assert float((probabilities_NC - cpu.predict(files, protocol)[1]).abs().max()) < 1e-5
        for size in (1, 7, 33):
            again, other_NC = gpu.predict(files, protocol, batch_size=size)
            assert again == labels
            assert float((other_NC - probabilities_NC).abs().max()) < 1e-5


def test_top(classifier: OATClassifier, files: list[bytes]) -> None:
    labels, probabilities_1C = classifier.predict(files[5])
    best = classifier.top(files[5], 3)
    assert len(best) == 3
    assert best[0] == (classifier.classes[labels[0]], float(probabilities_1C[0, labels[0]]))
    assert [chance for _, chance in best] == sorted(probabilities_1C[0].tolist(), reverse=True)[:3]
    assert len(classifier.top(files[5], 50)) == 10
    with pytest.raises(DataError, match="answers one image"):
        classifier.top(files)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        classifier.predict(files, batch_size=0)


def test_images_may_come_one_by_one(classifier: OATClassifier, files: list[bytes]) -> None:
    assert classifier.predict((file for file in files), batch_size=7)[0] == classifier.predict(files)[0]


# Another class prior, and a temperature.


@pytest.fixture(scope="module")
def prior_run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, said to be trained with the center "prior", and calibrated under two priors."""
    folder = tmp_path_factory.mktemp("prior")
    step = f"step-{tiny_run.steps[-1]}"
    shutil.copytree(tiny_run.folder / "checkpoints" / step, folder / "checkpoints" / step)
    for name, key, change in (
        ("model.json", ("center",), lambda path: "prior"),
        ("manifest.json", ("files", "model.json"), lambda path: {
            "size": (path.parent / "model.json").stat().st_size, "sha256": sha256_file(path.parent / "model.json"),
        }),
    ):  # fmt: skip
        path = folder / "checkpoints" / step / name
        values = json.loads(path.read_text())
        target = values
        for part in key[:-1]:
            target = target[part]
        target[key[-1]] = change(path)
        path.write_text(json.dumps(values))
    measured = Calibration(0.25, 20, 0.1, (0.1, 0.1), (0.1, 0.1))
    write_temperature(find_checkpoint(folder), "training", "test", measured)
    write_temperature(find_checkpoint(folder), "balanced", "test", dataclasses.replace(measured, temperature=0.5))
    return folder


def test_another_class_prior(prior_run: Path, files: list[bytes], tmp_path: Path) -> None:
    trained = OATClassifier.from_checkpoint(prior_run)
    prepared = np.stack([trained.prepare(file) for file in files])
    lift_BC = trained.answer(prepared).scores_BC / trained.stored_anchor_C.double()  # z + 1
    balanced = OATClassifier.from_checkpoint(prior_run, prior="balanced")
    assert torch.allclose(balanced.answer(prepared).scores_BC, lift_BC / 10, atol=1e-12)
    assert balanced.predict(files)[0] == lift_BC.argmax(dim=1).tolist()
    shares = {name: number + 1 for number, name in enumerate(trained.classes)}
    path = tmp_path / "shares.json"
    path.write_text(json.dumps(shares))
    expected_BC = lift_BC * torch.arange(1, 11, dtype=torch.float64) / 55
    text = ",".join(f"{name}={share}" for name, share in shares.items())
    for prior in (text, str(path), shares, list(shares.values()), np.arange(1, 11)):
        given = OATClassifier.from_checkpoint(prior_run, prior=prior)
        assert torch.allclose(given.answer(prepared).scores_BC, expected_BC, atol=1e-12)
        assert given.prior == (prior if isinstance(prior, str) else "given")
    assert not torch.equal(given.predict(files)[1], trained.predict(files)[1])


def test_priors_that_cannot_be(tiny_run: TinyRun, prior_run: Path, files: list[bytes]) -> None:
    names = OATClassifier.from_checkpoint(prior_run).classes
    for run, prior, message in (
        (tiny_run.folder, "balanced", "trained with anchor.center=probabilities, whose anchor is no class prior"),
        (tiny_run.pretrained, "balanced", "trained with cross-entropy alone"),
        (prior_run, "balance", "--prior balance: must be training, balanced"),
        (prior_run, [1.0, 2.0], "prior: 2 shares for 10 classes"),
        (prior_run, [-1.0] * 10, "prior: shares must be numbers above 0"),
        (prior_run, ["x"] * 10, "prior: must be numbers"),
        (prior_run, dict.fromkeys(names[1:], 1.0), "prior: must name every class once"),
    ):
        with pytest.raises(ConfigError) as caught:
            OATClassifier.from_checkpoint(run, prior=prior)
        assert message in one_line(caught)
    balanced = OATClassifier.from_checkpoint(prior_run, prior="balanced")
    for protocol in ("single", "batch"):
        with pytest.raises(ConfigError, match=f"protocol {protocol} takes its anchor from the images"):
            balanced.predict(files, protocol)


def test_calibrated_probabilities(tiny_run: TinyRun, prior_run: Path, files: list[bytes]) -> None:
    for prior, temperature in (("training", 0.25), ("balanced", 0.5)):
        plain = OATClassifier.from_checkpoint(prior_run, prior=prior)
        calibrated = OATClassifier.from_checkpoint(prior_run, prior=prior, calibrated=True)
        scores_BC = plain.answer(np.stack([plain.prepare(file) for file in files])).scores_BC
        labels, probabilities_BC = calibrated.predict(files)
        assert labels == plain.predict(files)[0]
        tempered_BC = scores_BC.clamp(min=0.01) ** (1 / temperature)
        assert torch.allclose(probabilities_BC, tempered_BC / tempered_BC.sum(dim=1, keepdim=True), atol=1e-6)
    with pytest.raises(CheckpointError, match=r"not calibrated.*--fit-temperature"):
        OATClassifier.from_checkpoint(tiny_run.folder, calibrated=True)
    with pytest.raises(CheckpointError, match="not calibrated under the class prior given"):
        OATClassifier.from_checkpoint(prior_run, prior=[1.0] * 10, calibrated=True)


# The projection.


def nearest_by_search(scores: list[float]) -> list[float]:
    """The nearest point of the simplex: the best of the nearest points of all its faces."""
    best, nearest = float("inf"), scores
    for size in range(1, len(scores) + 1):
        for face in itertools.combinations(range(len(scores)), size):
            shift = (sum(scores[k] for k in face) - 1) / size
            point = [scores[k] - shift if k in face else 0.0 for k in range(len(scores))]
            distance = sum((a - b) ** 2 for a, b in zip(point, scores, strict=True))
            if min(point) >= 0 and distance < best:
                best, nearest = distance, point
    return nearest


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_projection_is_the_nearest_point_of_the_simplex(scores: list[float]) -> None:
    projected_1C = project_to_simplex(torch.tensor([scores], dtype=torch.float64))
    assert projected_1C[0].tolist() == pytest.approx(nearest_by_search(scores), abs=1e-12)
    assert float(projected_1C.sum()) == pytest.approx(1, abs=1e-12)
    assert float((project_to_simplex(projected_1C) - projected_1C).abs().max()) < 1e-14


def test_projection_row_by_row() -> None:
    scores_BC = torch.tensor([[0.2, 0.3, 0.5], [0, 0, 0], [5, 1, -7], [1, 1, -1]], dtype=torch.float64)
    expected = [[0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3], [1, 0, 0], [0.5, 0.5, 0]]
    assert torch.allclose(project_to_simplex(scores_BC), torch.tensor(expected, dtype=torch.float64), atol=1e-15)
    generator = torch.Generator().manual_seed(0)
    random_BC = torch.randn(200, 30, generator=generator, dtype=torch.float64)
    projected_BC = project_to_simplex(random_BC)
    assert torch.equal(projected_BC.argmax(dim=1), random_BC.argmax(dim=1))
    order_BC = random_BC.argsort(dim=1)
    assert bool((projected_BC.gather(1, order_BC).diff(dim=1) >= 0).all())  # the order of classes is kept
