"""Probabilities from scores, class priors, and temperatures, each against its definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oat_dist import OATLoss
from oat_dist.answers import AnswerHead, project_to_simplex
from oat_dist.calibration import calibrate, fit_temperature, prior_key, read_temperature, write_temperature
from oat_dist.checkpoint import Checkpoint
from oat_dist.errors import CheckpointError, ConfigError, DataError
from oat_dist.priors import class_prior

CLASSES = ["ant", "bee", "cow = moo"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_classifier(samples: int = 3000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores (N, 5) and labels (N,) that are really drawn from softmax(scores / 0.3)."""
    scores_NC = normal(samples, 5, seed=seed)
    chances_NC = (scores_NC / 0.3).softmax(dim=1)
    labels_N = torch.multinomial(chances_NC, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return scores_NC, labels_N


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    scores_BC = 2 * normal(50, 6)
    projected_BC = project_to_simplex(scores_BC)
    torch.testing.assert_close(projected_BC.sum(dim=1), torch.ones(50).double())
    assert bool((projected_BC >= 0).all())
    assert torch.equal(projected_BC.argmax(dim=1), scores_BC.argmax(dim=1))
    # Nearest: no other point p of the simplex lies on the near side, <s - p*, p - p*> <= 0 (it is convex).
    others_XC = normal(200, 6, seed=1).softmax(dim=1)
    gap_BC = scores_BC - projected_BC
    assert float((gap_BC @ others_XC.T - (gap_BC * projected_BC).sum(dim=1, keepdim=True)).max()) < 1e-12
    assert torch.allclose(project_to_simplex(others_XC), others_XC)  # where it is one already


def test_projecting_never_worsens_the_brier_score() -> None:
    scores_BC, onehot_BC = normal(200, 4), torch.eye(4).double()[torch.arange(200) % 4]
    before_B = (scores_BC - onehot_BC).square().sum(dim=1)
    after_B = (project_to_simplex(scores_BC) - onehot_BC).square().sum(dim=1)
    assert bool((after_B <= before_B + 1e-12).all())


def test_with_a_fixed_detached_anchor_the_scores_are_the_probabilities() -> None:
    """METHOD's claim, measured: a table of logits trained by OAT's loss to its optimum, whatever the anchor."""
    truth_XC = 2 * torch.eye(4).double()[:3] + 0.5
    truth_XC /= truth_XC.sum(dim=1, keepdim=True)
    anchor_C = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
    # sum over labels of p(y|x) * sum_k (z_k - onehot_k / a_k + 1)^2 is least at z + 1 = p / a
    logits_XC = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits_XC], max_iter=100)
    targets_YC = torch.eye(4).double() / anchor_C - 1

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (truth_XC[:, :, None] * (logits_XC[:, None] - targets_YC[None]).square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scores_XC, probabilities_XC = AnswerHead(anchor_C)(logits_XC.detach())
    torch.testing.assert_close(scores_XC, truth_XC, rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities_XC, truth_XC, rtol=0, atol=1e-6)
    wrong_XC = AnswerHead(torch.full((4,), 0.25))(logits_XC.detach())[0]  # the control
    assert float((wrong_XC - truth_XC).abs().max()) > 0.1


@pytest.mark.parametrize("center", ["probabilities", "logits", "prior"])
def test_trained_scores_are_probabilities_where_the_anchor_is_detached(center: str) -> None:
    """Measured: a table of logits for three inputs, 100 labels each, trained by OATLoss until nothing moves."""
    counts_XC = torch.tensor([[70, 10, 12, 8], [5, 50, 35, 10], [25, 24, 26, 25]])
    truth_XC = counts_XC.double() / 100
    inputs_N = torch.arange(3).repeat_interleave(100)
    labels_N = torch.cat([torch.arange(4).repeat_interleave(counts_C) for counts_C in counts_XC])
    bias = {}
    for attached in (False, True):
        table_XC = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        criterion = OATLoss(4, center, anchor_grad=attached)
        optimizer = torch.optim.Adam([table_XC], lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
        for _ in range(1500):
            optimizer.zero_grad()
            criterion(table_XC[inputs_N], labels_N).backward()
            optimizer.step()
            schedule.step()
        bias[attached] = float((AnswerHead(criterion.anchor)(table_XC.detach())[1] - truth_XC).abs().max())
    assert bias[False] < 1e-3
    assert bias[True] > 0.01  # docs/answers.md says by how much


def test_the_head_keeps_the_precision_of_the_logits() -> None:
    head = AnswerHead(torch.tensor([0.2, 0.3, 0.5]))
    for dtype in (torch.float32, torch.float64):
        assert [tensor.dtype for tensor in head(normal(4, 3).to(dtype))] == [dtype, dtype]
    logits_BC = normal(4, 3)
    assert torch.equal(AnswerHead(None)(logits_BC)[1], logits_BC.softmax(dim=1))
    assert torch.equal(AnswerHead(None, 2.0)(logits_BC)[1], (logits_BC / 2).softmax(dim=1))
    scores_BC = torch.tensor([[0.6, 0.3, -0.1]], dtype=torch.float64)
    powers_BC = torch.tensor([[0.36, 0.09, (0.1 / 3) ** 2]], dtype=torch.float64)  # a tenth of an even share at least
    even = AnswerHead(torch.ones(3), 0.5)
    torch.testing.assert_close(even(scores_BC - 1)[1], powers_BC / powers_BC.sum())
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            AnswerHead(None, temperature)


def test_class_priors(tmp_path: Path) -> None:
    stored_C = torch.tensor([0.5, 0.3, 0.2])
    assert torch.equal(class_prior("training", CLASSES, stored_C), stored_C.double())
    assert class_prior("balanced", CLASSES, stored_C).tolist() == [1 / 3] * 3
    assert class_prior("cow = moo=6,ant=3, bee=1", CLASSES, stored_C).tolist() == pytest.approx([0.3, 0.1, 0.6])
    path = tmp_path / "prior.json"
    for values in ({"ant": 30, "bee": 10, "cow = moo": 60}, [0.3, 0.1, 0.6]):
        path.write_text(json.dumps(values))
        assert class_prior(str(path), CLASSES, stored_C).tolist() == pytest.approx([0.3, 0.1, 0.6])
    wrong = {
        "even": "must be training, balanced",
        "ant=1,bee=1": "lacks cow = moo",
        "ant=1,bee=1,cow = moo=1,dog=1": "names dog, no class",
        "ant=1,bee=1,cow = moo=many": "must be training",
        "ant=1,bee=1,cow = moo=1,ant=2": "names a class twice",
        "ant=1,bee=-1,cow = moo=1": "above 0",
        "ant=0,bee=1,cow = moo=1": "above 0",
        "ant=nan,bee=1,cow = moo=1": "above 0",
        str(tmp_path / "no.json"): "cannot be read",
    }
    for asked, problem in wrong.items():
        with pytest.raises(ConfigError, match=problem):
            class_prior(asked, CLASSES, stored_C)
    path.write_text("[1e308, 1e308, 1e308]")
    assert class_prior(str(path), CLASSES, stored_C).tolist() == pytest.approx([1 / 3] * 3)
    for text in ("[1, 2]", "3", "[", '{"ant": [1]}', f"[1, 1, 1{'0' * 400}]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=str(path)):
            class_prior(str(path), CLASSES, stored_C)


def test_the_temperature_is_the_one_of_least_log_loss() -> None:
    scores_NC, labels_N = some_classifier()
    found = fit_temperature(scores_NC, labels_N)
    assert found == pytest.approx(0.3, rel=0.1)  # the one the labels were drawn with

    def log_loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores_NC / temperature, labels_N))

    assert log_loss(found) <= min(log_loss(found * factor) for factor in (0.99, 0.999, 1.001, 1.01))
    assert fit_temperature(1000 * scores_NC + 7, labels_N) == pytest.approx(1000 * found, rel=1e-6)


def test_no_temperature_where_none_fits() -> None:
    scores_NC, _ = some_classifier(100)
    with pytest.raises(DataError, match="every sample right"):
        fit_temperature(scores_NC, scores_NC.argmax(dim=1))
    with pytest.raises(DataError, match="say nothing about the labels"):
        fit_temperature(scores_NC, scores_NC.argmin(dim=1))
    with pytest.raises(DataError, match="too few"):
        calibrate(scores_NC[:10], scores_NC[:10].softmax(dim=1), torch.zeros(10))


def test_calibration_is_measured_on_samples_that_did_not_choose_the_temperature() -> None:
    scores_NC, labels_N = some_classifier()
    found = calibrate(scores_NC, scores_NC.softmax(dim=1), labels_N)  # T = 1: far too unsure
    assert found.samples == 3000
    assert found.brier[1] < found.brier[0] - 0.05
    assert found.ece[1] < 0.05 < 0.2 < found.ece[0]
    own = float(torch.nn.functional.cross_entropy(scores_NC / found.temperature, labels_N))
    assert own < found.nll < own + 0.01  # a little worse than on the samples that chose it, never better


def test_given_shares_are_told_apart_by_what_they_are() -> None:
    shares_C = torch.tensor([0.2, 0.3, 0.5]).double()
    assert prior_key("a.json", shares_C) == prior_key("x=2,y=3,z=5", shares_C.clone())
    assert prior_key("a.json", shares_C) != prior_key("a.json", torch.tensor([0.3, 0.2, 0.5]).double())
    assert [prior_key(name, shares_C) for name in ("training", "balanced")] == ["training", "balanced"]


def some_checkpoint(tmp_path: Path, sha256: str = "ab") -> Checkpoint:
    folder = tmp_path / "run" / "checkpoints" / "step-3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"sha256": sha256}}}))
    return Checkpoint(folder)


def test_temperatures_are_kept_by_weights_and_prior(tmp_path: Path) -> None:
    scores_NC, labels_N = some_classifier(200)
    checkpoint = some_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"not calibrated; fit a temperature first: oat-dist evaluate .*step-3"):
        read_temperature(checkpoint)
    found = calibrate(scores_NC, scores_NC.softmax(dim=1), labels_N)
    path = write_temperature(checkpoint, "training", "val", found)
    assert read_temperature(checkpoint) == found.temperature
    with pytest.raises(CheckpointError, match=r"under the class prior balanced.* --prior balanced"):
        read_temperature(checkpoint, "balanced")
    write_temperature(checkpoint, "balanced", "val", found)
    assert read_temperature(checkpoint, "balanced") == read_temperature(checkpoint) == found.temperature
    other = some_checkpoint(tmp_path, "cd")  # the same step, trained anew
    with pytest.raises(CheckpointError, match="other weights"):
        read_temperature(other)
    write_temperature(other, "training", "val", found)
    with pytest.raises(CheckpointError, match="balanced"):
        read_temperature(other, "balanced")  # it was of the other weights
    good = json.loads(path.read_text())
    assert read_temperature(other) == found.temperature
    older = {key: value for key, value in good.items() if key != "form"}  # a temperature of something else
    endless = json.loads(path.read_text())
    endless["priors"]["training"]["temperature"] = float("inf")
    damaged = [json.dumps(older), json.dumps(endless), json.dumps(good | {"priors": {"training": {"temperature": 1}}})]
    for text in ("", "[]", '{"weights_sha256": "cd"}', *damaged):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="damaged, or of another version; remove it"):
            read_temperature(other)
