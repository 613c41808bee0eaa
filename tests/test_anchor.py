"""The formulas one by one, and the closed-form gradient against autograd on the plain formula (float64)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import plain_anchor, plain_loss

from oat_dist import OATLoss, anchor_targets, batch_anchor, invert
from oat_dist.anchor import CENTERS, FIXED, default_floor, global_loss, segment_sum
from oat_dist.objectives import CrossEntropy

SETTINGS = settings(max_examples=120, deadline=None, derandomize=True)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1e-300))


@SETTINGS
@given(
    center=st.sampled_from(CENTERS),
    attached=st.booleans(),
    floor=st.sampled_from([None, 0.0, 0.01, 0.1]),
    scope=st.sampled_from(["device", "global", "group"]),
    samples=st.integers(1, 13),
    classes=st.integers(2, 7),
    size=st.integers(1, 6),
    masked=st.booleans(),
    num_samples=st.sampled_from([None, 40]),
    seed=st.integers(0, 2**31),
)
def test_closed_form_equals_autograd(
    center: str,
    attached: bool,
    floor: float | None,
    scope: str,
    samples: int,
    classes: int,
    size: int,
    masked: bool,
    num_samples: int | None,
    seed: int,
) -> None:
    if center in FIXED:
        attached, floor = False, None
    generator = torch.Generator().manual_seed(seed)
    logits_BC = (3 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)).requires_grad_()
    labels_B = torch.randint(0, classes, (samples,), generator=generator)
    valid_B = torch.rand(samples, generator=generator) < 0.7 if masked else None
    rows = [row for row in range(samples) if valid_B is None or valid_B[row]]
    width = size if scope == "group" else samples
    sets = [[row for row in rows if first <= row < first + width] for first in range(0, samples, width)]
    count = num_samples or max(len(rows), 1)

    criterion = OATLoss(classes, center, scope, size, attached, floor)
    loss = criterion(logits_BC, labels_B, num_samples, valid_B)
    (gradient_BC,) = torch.autograd.grad(1.7 * loss, logits_BC)
    eps = default_floor(center, classes, floor)
    expected = plain_loss(logits_BC, labels_B, sets, center, attached, eps, count)
    if rows:
        (expected_BC,) = torch.autograd.grad(1.7 * expected, logits_BC)
        assert relative(gradient_BC, expected_BC) < 1e-11
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        anchors_GC = criterion.anchor if scope == "group" else criterion.anchor[None]
        for anchor_C, one in zip(anchors_GC, sets, strict=True):
            if one:
                assert relative(anchor_C, plain_anchor(logits_BC.detach()[one], center, eps)) < 1e-13
        assert global_loss(criterion.statistics, anchors_GC, count).item() == pytest.approx(expected.item(), rel=1e-9)
    else:
        assert loss.item() == 0
        assert not gradient_BC.any()


def test_the_wrong_gradient_would_be_noticed() -> None:
    """The negative control of the test above: detached against attached differs by far more than its bound."""
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(8, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels_B = torch.arange(8) % 4
    attached, detached = (
        torch.autograd.grad(OATLoss(4, anchor_grad=grad)(logits_BC, labels_B), logits_BC)[0] for grad in (True, False)
    )
    assert relative(attached, detached) > 1e-3


def test_steps_by_hand() -> None:
    """Two classes, one sample of outputs (0, ln 3): every number of the method can be checked on paper."""
    logits_BC = torch.tensor([[0.0, torch.tensor(3.0).log()]], dtype=torch.float64)
    assert batch_anchor(logits_BC, "logits").tolist() == pytest.approx([0.25, 0.75])
    assert batch_anchor(logits_BC, "prior", 0.0).tolist() == pytest.approx([0.25, 0.75])
    assert batch_anchor(logits_BC, "prior").tolist() == pytest.approx([0.25 * 0.8 + 0.1, 0.75 * 0.8 + 0.1])
    second = 1 / (1 + torch.tensor(-0.5, dtype=torch.float64).exp())
    assert batch_anchor(logits_BC)[1].item() == pytest.approx(second.item())
    anchor_C = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert anchor_targets(torch.tensor([1]), anchor_C).tolist() == [[-1.0, pytest.approx(1 / 3)]]
    targets = anchor_targets(torch.tensor([0, 1]), anchor_C)
    assert invert(targets, anchor_C).tolist() == [[1.0, 0.0], [0.0, pytest.approx(1.0)]]


def test_inverse_undoes_the_targets_for_any_anchor() -> None:
    generator = torch.Generator().manual_seed(1)
    labels_B = torch.randint(0, 6, (50,), generator=generator)
    anchor_C = torch.rand(6, generator=generator, dtype=torch.float64).add(0.01)
    scores_BC = invert(anchor_targets(labels_B, anchor_C), anchor_C)
    torch.testing.assert_close(scores_BC, torch.eye(6, dtype=torch.float64)[labels_B])


def test_probability_anchors_stay_within_their_bounds() -> None:
    """With two softmaxes every entry lies in [1/(e+C-1), e/(e+C-1)], however large the outputs."""
    logits_BC = 1e3 * torch.eye(4, dtype=torch.float64)[torch.zeros(9, dtype=torch.long)]
    anchor_C = batch_anchor(logits_BC)
    e = torch.e
    assert anchor_C.min().item() >= 1 / (e + 3) - 1e-12
    assert anchor_C.max().item() <= e / (e + 3) + 1e-12


def test_an_underflown_anchor_of_an_absent_class_does_no_harm() -> None:
    """A class without samples contributes nothing, also where its anchor is exactly zero in fp32."""
    logits_BC = torch.zeros(4, 3)
    logits_BC[:, 2] = -200.0
    logits_BC.requires_grad_()
    criterion = OATLoss(3, "logits")
    loss = criterion(logits_BC, torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert criterion.anchor[2] == 0
    assert torch.isfinite(loss) and torch.isfinite(logits_BC.grad).all()


def test_one_hot_is_mean_squared_error_to_one_hot_labels() -> None:
    generator = torch.Generator().manual_seed(3)
    logits_BC = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(0, 5, (12,), generator=generator)
    expected = torch.nn.functional.mse_loss(logits_BC + 1, torch.eye(5, dtype=torch.float64)[labels_B])
    assert OATLoss(5, "one_hot")(logits_BC, labels_B).item() == pytest.approx(expected.item(), rel=1e-14)
    assert OATLoss(5, "uniform")(logits_BC, labels_B).item() != pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("center", FIXED)
def test_a_fixed_anchor_has_neither_gradient_nor_floor_nor_memory(center: str) -> None:
    assert not OATLoss(5, center).anchor_grad
    for wrong in ({"anchor_grad": True}, {"anchor_floor": 0.01}, {"scope": "global", "momentum": 0.9}):
        with pytest.raises(ValueError, match=r"fixed|averaged"):
            OATLoss(5, center, **wrong)


def test_a_running_mean_anchor_by_its_definition() -> None:
    """Every step back counts `momentum` times as much; steps without samples, and eval mode, change nothing."""
    generator = torch.Generator().manual_seed(4)
    criterion = OATLoss(4, "prior", "global", momentum=0.8)
    anchors: list[torch.Tensor] = []
    for step in range(6):
        plain_BC = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        logits_BC = plain_BC.clone().requires_grad_()
        labels_B = torch.randint(0, 4, (9,), generator=generator)
        anchors.append(batch_anchor(plain_BC, "prior"))
        weights = [0.8**age for age in range(len(anchors))][::-1]
        mean_C = sum(w * a for w, a in zip(weights, anchors, strict=True)) / sum(weights)
        loss = criterion(logits_BC, labels_B)
        targets_BC = anchor_targets(labels_B, mean_C)
        assert relative(criterion.anchor, mean_C) < 1e-14
        assert loss.item() == pytest.approx(float((plain_BC - targets_BC).square().mean()), rel=1e-13)
        (gradient_BC,) = torch.autograd.grad(loss, logits_BC)
        assert relative(gradient_BC, 2 * (plain_BC - targets_BC) / plain_BC.numel()) < 1e-13
        if step == 3:  # nobody there, and an evaluation
            assert criterion(logits_BC, labels_B, None, torch.zeros(9, dtype=torch.bool)).item() == 0
            assert relative(criterion.anchor, mean_C) < 1e-14
            criterion.eval()
            criterion(logits_BC, labels_B)
            criterion.train()
    assert relative(criterion.anchor, anchors[-1]) > 1e-2  # the control: the last batch's own anchor
    for wrong in ({"scope": "device"}, {"scope": "global", "anchor_grad": True}):
        with pytest.raises(ValueError, match="running-mean"):
            OATLoss(4, "prior", momentum=0.8, **wrong)
    with pytest.raises(ValueError, match="momentum must"):
        OATLoss(4, "prior", "global", momentum=1.0)


def test_cross_entropy_counts_a_sample_the_same_wherever_it_is_dealt() -> None:
    """Smoothed, adjusted, weighted: parts with the true N add up to the whole, by torch's own formula."""
    generator = torch.Generator().manual_seed(5)
    logits_BC = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    labels_B = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    share_C = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    objective = CrossEntropy(0.1, 0.5 * share_C.log(), 1 / (3 * share_C))
    torch_own = torch.nn.functional.cross_entropy(
        logits_BC + 0.5 * share_C.log(), labels_B, 1 / (3 * share_C), reduction="none", label_smoothing=0.1
    )
    whole = objective.loss(logits_BC, labels_B, 10, None)
    assert whole.item() == pytest.approx(float(torch_own.sum() / 10), rel=1e-14)
    parts = [objective.loss(logits_BC[rows], labels_B[rows], 10, None) for rows in (slice(0, 7), slice(7, 10))]
    assert float(sum(parts)) == pytest.approx(whole.item(), rel=1e-14)
    masked = objective.loss(logits_BC, labels_B, 10, torch.arange(10) < 7)
    assert masked.item() == pytest.approx(parts[0].item(), rel=1e-14)
    for other in (CrossEntropy(), CrossEntropy(0.1), CrossEntropy(0.1, None, 1 / (3 * share_C))):  # controls
        assert abs(other.loss(logits_BC, labels_B, 10, None) - whole) > 1e-3


@pytest.mark.parametrize("center", CENTERS)
def test_bf16_autocast_computes_in_fp32(center: str) -> None:
    generator = torch.Generator().manual_seed(2)
    logits_BC = torch.randn(16, 10, generator=generator)
    labels_B = torch.randint(0, 10, (16,), generator=generator)
    expected = OATLoss(10, center)(logits_BC, labels_B)
    for outputs in (logits_BC, logits_BC.bfloat16()):
        given_BC = outputs.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            criterion = OATLoss(10, center)
            loss = criterion(given_BC, labels_B)
        loss.backward()
        assert loss.dtype == criterion.anchor.dtype == torch.float32
        assert given_BC.grad.dtype == given_BC.dtype
    exact = OATLoss(10, center)(logits_BC.bfloat16().float(), labels_B)
    assert loss.item() == exact.item()
    assert exact.item() != expected.item()  # the control: bf16 inputs do differ


def test_float64_logits_stay_float64() -> None:
    criterion = OATLoss(3)
    assert criterion(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])).dtype == torch.float64


@pytest.mark.parametrize("scope", ["device", "global", "group"])
def test_no_samples_give_zero_loss_and_an_empty_gradient(scope: str) -> None:
    logits_BC = torch.zeros(0, 3, requires_grad=True)
    loss = OATLoss(3, scope=scope)(logits_BC, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and logits_BC.grad.shape == (0, 3)


def test_anchor_grad_defaults_to_attached_but_detached_for_prior() -> None:
    assert OATLoss(3).anchor_grad and OATLoss(3, "logits").anchor_grad
    assert not OATLoss(3, "prior").anchor_grad
    assert OATLoss(3, "prior", anchor_grad=True).anchor_grad
    assert OATLoss(4, "prior").anchor_floor == 0.05 and OATLoss(4).anchor_floor == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"center": "logit"}, "center must be one of"),
        ({"scope": "gobal"}, "scope must be one of"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"anchor_floor": 0.5}, "anchor floor must lie in"),
        ({"anchor_floor": -0.1}, "anchor floor must lie in"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        OATLoss(2, **arguments)


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), r"logits must have shape \(B, 3\)"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), r"logits must have shape \(B, 3\)"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"labels must have shape \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2), "labels must be class indices"),
    ],
)
def test_wrong_tensors_are_refused(logits: torch.Tensor, labels: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        OATLoss(3)(logits, labels)


def test_segment_sum_keeps_the_short_last_run() -> None:
    assert segment_sum(torch.arange(5.0)[:, None], 2).flatten().tolist() == [1.0, 5.0, 4.0]
    assert segment_sum(torch.zeros(0, 3), 2).shape == (0, 3)


def test_cross_entropy_masks_and_divides_by_the_given_count() -> None:
    generator = torch.Generator().manual_seed(4)
    logits_BC = torch.randn(6, 3, generator=generator).requires_grad_()
    labels_B = torch.tensor([0, 1, 2, 0, 1, 2])
    valid_B = torch.tensor([True, True, False, True, False, True])
    loss = CrossEntropy().loss(logits_BC, labels_B, 10, valid_B)
    expected = torch.nn.functional.cross_entropy(logits_BC[valid_B], labels_B[valid_B], reduction="sum") / 10
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert not logits_BC.grad[~valid_B].any()
