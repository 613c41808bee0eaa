"""OATClassifier: any kind of image in, an answer that does not depend on its company out."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_run import TinyRun, image_files, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_evaluate import evaluate_run

from oat_dist import OATClassifier
from oat_dist.data.images.decode import decode_rgb
from oat_dist.errors import CheckpointError, DataError
from oat_dist.predict import project_to_simplex

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
    kinds = [path, str(path), data, Image.open(io.BytesIO(data)), array, torch.from_numpy(array.copy())]
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
        ([np.zeros((4, 4), np.uint8)], "an image array must be uint8 of shape (H, W, 3), not uint8 (4, 4)"),
        (np.zeros((3, 4, 4), np.uint8), "an image array must be uint8 of shape (H, W, 3), not uint8 (3, 4, 4)"),
        (np.zeros((0, 4, 3), np.uint8), "an image array must be uint8 of shape (H, W, 3), not uint8 (0, 4, 3)"),
        (torch.zeros(4, 4, 3), "an image array must be uint8 of shape (H, W, 3), not float32 (4, 4, 3)"),
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
