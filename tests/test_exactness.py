"""N processes give the loss, the gradients and the parameters of one process given the same anchor sets.

The measure is |theta_N - theta_1| / |theta_1 - theta_0| after ten SGD-momentum steps: at most 5e-5 in fp32 and 1e-10
in float64, while each wrong way must exceed 1e-3 (METHOD: exactness to aim at).
"""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from reference import distance, parameters_of, plain_anchor, plain_loss, small_net

from oat_dist import OATLoss
from oat_dist.anchor import default_floor

BOUND = {"float64": 1e-10, "float32": 5e-5}


@pytest.fixture(scope="module", params=[1, 2, 3])
def world(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def distances(world: int) -> list[dict[str, float]]:
    return run_ranks(world, "exactness_checks:matrix")


def test_every_setting_holds_the_bound(distances: list[dict[str, float]]) -> None:
    assert len(distances[0]) == 2 * 3 * 3 * 2 * 3
    for rank, found in enumerate(distances):
        assert found == distances[0], f"rank {rank} ended with other parameters than rank 0"
    beyond = {key: value for key, value in distances[0].items() if not value <= BOUND[key.split("/")[0]]}
    assert beyond == {}


def test_wrong_ways_break_the_bound() -> None:
    found = run_ranks(2, "exactness_checks:controls")[0]
    assert found.pop("right") <= BOUND["float64"]
    assert set(found) == {"bare all-reduce", "per-rank anchor", "swapped sample"}
    assert {key: value for key, value in found.items() if not value > 1e-3} == {}


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_call_on_unequal_ranks(ranks: int) -> None:
    results = run_ranks(ranks, "exactness_checks:one_call")
    counts = [found["count"] for found in results]
    assert counts == ([5, 4] if ranks == 2 else [5, 4, 0])
    for found in results:
        rows = found["count"]
        assert found["global/summed"]["collectives"] == 1
        assert found["global/given"]["collectives"] == 1
        for scope in ("device", "group"):
            assert found[f"{scope}/summed"]["collectives"] == 1  # the count
            assert found[f"{scope}/given"]["collectives"] == 0
        for scope in ("device", "global", "group"):
            assert found[f"{scope}/eval collectives"] == 0
            for given in ("given", "summed"):
                one = found[f"{scope}/{given}"]
                assert one["in backward"] == 0
                assert one["gradient shape"] == [rows, 5]
                assert one["finite"]
                assert one["loss"] == pytest.approx(found[f"{scope}/summed"]["loss"], rel=1e-14)
        assert found["group/given"]["anchor shape"] == [-(-rows // 4), 5]
        assert found["device/given"]["anchor shape"] == found["global/given"]["anchor shape"] == [5]
        assert found["global anchor"] == pytest.approx(found["expected anchor"], rel=1e-14)
        assert found["global loss"] == pytest.approx(found["global/given"]["loss"], rel=1e-12)
        assert found["cross entropy"] == pytest.approx(found["expected cross entropy"], rel=1e-14)


@pytest.mark.parametrize("center", ["probabilities", "logits", "prior"])
@pytest.mark.parametrize("attached", [True, False])
def test_device_scope_on_one_rank_is_the_plain_formula_for_fifty_steps(center: str, attached: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    ours, plain = (small_net(6, 5, torch.float64) for _ in range(2))
    start = parameters_of(ours)
    criterion = OATLoss(5, center, anchor_grad=attached)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (ours, plain)]
    for step in range(50):
        size = 32 if step % 7 else 3
        inputs_BX = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        labels_B = torch.randint(0, 5, (size,), generator=generator)
        loss = criterion(ours(inputs_BX), labels_B)
        logits_BC = plain(inputs_BX)
        floor = default_floor(center, 5, None)
        expected = plain_loss(logits_BC, labels_B, [list(range(size))], center, attached, floor, size)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert criterion.anchor.tolist() == pytest.approx(
            plain_anchor(logits_BC.detach(), center, floor).tolist(), rel=1e-10
        )
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(parameters_of(ours), parameters_of(plain), start) < 1e-10
