"""Protocols against METHOD's formulas written as loops, and that nothing depends on how samples were batched."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fixtures_run import TinyRun, tiny_run
from torch import Tensor

from oat_dist.answers import project_to_simplex
from oat_dist.batch import Batch
from oat_dist.checkpoint import find_checkpoint
from oat_dist.data.builder import BatchBuilder
from oat_dist.data.images.pipeline import ImagePipeline
from oat_dist.data.images.transforms import Normalise
from oat_dist.data.loader import evaluation_batches
from oat_dist.data.plan import EpochOrder
from oat_dist.distributed import World
from oat_dist.errors import DataError
from oat_dist.evaluate import PROTOCOLS, TIE, Outputs, collect, judge
from oat_dist.model_card import judging
from oat_dist.objectives import oat_scores
from oat_dist.predict import load_network
from oat_dist.results import Evaluation
from oat_dist.validation import evaluate_network

__all__ = ["tiny_run"]


def random_outputs(num_samples: int, num_classes: int, seed: int = 0, spread: float = 2.0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(
        spread * torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64),
        torch.randint(num_classes, (num_samples,), generator=generator),
        torch.ones(num_samples, dtype=torch.bool),
    )


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def plain_anchor(rows: list[list[float]], center: str, floor: float) -> list[float]:
    """The anchor of one test batch as METHOD writes it, without a tensor."""
    num_classes = len(rows[0])
    mapped = rows if center == "logits" else [softmax(row) for row in rows]
    mean = [sum(row[k] for row in mapped) / len(rows) for k in range(num_classes)]
    anchor = mean if center == "prior" else softmax(mean)
    return [(1 - num_classes * floor) * a + floor for a in anchor]


def plain_predictions(
    outputs: Outputs, protocol: str, center: str, floor: float, stored: list[float], group: int, seed: int
) -> list[int]:
    """Predicted class of each valid sample, in order of their ids."""
    rows, count = outputs.logits_NC.tolist(), len(outputs.logits_NC)
    valid = [i for i in range(count) if outputs.valid_N[i]]
    if protocol == "batch":
        order = [i for i in EpochOrder(count, seed, 0).ids(0, count).tolist() if outputs.valid_N[i]]
        sets = [order[start : start + group] for start in range(0, len(order), group)]
    elif protocol == "single":
        sets = [[i] for i in valid]
    else:
        sets = [valid]
    predicted = {}
    for members in sets:
        anchor = (
            stored if protocol in ("stored", "balanced") else plain_anchor([rows[i] for i in members], center, floor)
        )
        for i in members:
            scores = [a * (z + 1) for a, z in zip(anchor, rows[i], strict=True)]
            predicted[i] = scores.index(max(scores))
    return [predicted[i] for i in valid]


@pytest.mark.parametrize("floor", [0.0, 0.01])
@pytest.mark.parametrize("center", ["probabilities", "logits", "prior"])
def test_every_protocol_is_the_plain_formula(center: str, floor: float) -> None:
    outputs = random_outputs(107, 5)  # 107 = 10 groups of 10 and a short one
    outputs.valid_N[[3, 50, 106]] = False
    stored = [0.1, 0.3, 0.2, 0.25, 0.15]
    result = judge(outputs, center=center, floor=floor, stored_anchor_C=torch.tensor(stored), group_size=10, seed=3)
    assert list(result.protocols) == [*PROTOCOLS, *(["balanced"] if center == "prior" else [])]
    valid = [i for i in range(107) if i not in (3, 50, 106)]
    assert result.ids_N.tolist() == valid
    labels = outputs.labels_N[valid].tolist()
    assert result.labels_N.tolist() == labels
    answers = []
    for protocol, got in result.protocols.items():
        stored = [1 / 5] * 5 if protocol == "balanced" else [0.1, 0.3, 0.2, 0.25, 0.15]
        expected = plain_predictions(outputs, protocol, center, floor, stored, 10, 3)
        assert got.predicted_N.tolist() == expected, protocol
        assert got.correct == sum(a == b for a, b in zip(expected, labels, strict=True))
        assert (got.total, got.ties) == (104, [])
        assert got.accuracy == got.correct / 104
        answers.append(expected)
    # The example is able to tell the protocols apart.
    apart = answers[: len(PROTOCOLS)]
    assert all(a != b for i, a in enumerate(apart) for b in apart[:i])


@pytest.mark.parametrize("center", ["probabilities", "logits", "prior"])
def test_scores_are_the_plain_formula(center: str) -> None:
    logits_NC = random_outputs(11, 4).logits_NC
    for group, sets in ((4, [range(4), range(4, 8), range(8, 11)]), (1, [range(i, i + 1) for i in range(11)])):
        scores_NC = oat_scores(logits_NC, center, 0.02, group)
        for members in sets:
            rows = [logits_NC[i].tolist() for i in members]
            anchor = plain_anchor(rows, center, 0.02)
            for i, row in zip(members, rows, strict=True):
                expected = [a * (z + 1) for a, z in zip(anchor, row, strict=True)]
                assert scores_NC[i].tolist() == pytest.approx(expected, abs=1e-14)
    assert torch.equal(oat_scores(logits_NC, center, 0.0), oat_scores(logits_NC, center, 0.0, 11))
    assert torch.equal(oat_scores(logits_NC, center, 0.0), oat_scores(logits_NC, center, 0.0, 500))
    assert oat_scores(logits_NC[:0], center, 0.0).shape == (0, 4)


def test_groups_follow_the_seed() -> None:
    outputs = random_outputs(200, 6)
    by_seed = [judge(outputs, center="logits", seed=seed).protocols["batch"].predicted_N for seed in (0, 0, 1)]
    assert torch.equal(by_seed[0], by_seed[1])
    assert not torch.equal(by_seed[0], by_seed[2])


@pytest.mark.parametrize("center", ["probabilities", "logits"])
def test_a_set_sorted_by_class_leaks_nothing(center: str) -> None:
    """A weak classifier on a class-sorted set: groups in stored order would give it the labels away."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(10).repeat_interleave(128)
    logits_NC = torch.randn(1280, 10, generator=generator, dtype=torch.float64)
    logits_NC[torch.arange(1280), labels_N] += 1.7
    outputs = Outputs(logits_NC, labels_N, torch.ones(1280, dtype=torch.bool))
    argmax = judge(outputs, center=None).protocols["argmax"].accuracy
    batch = judge(outputs, center=center).protocols["batch"].accuracy
    leaked = float((oat_scores(logits_NC, center, 0.0, 32).argmax(dim=1) == labels_N).double().mean())
    assert 0.5 < argmax < 0.7
    assert leaked > argmax + 0.08  # the danger is real
    assert batch < argmax + 0.02


def test_a_bad_sample_does_not_move_the_others() -> None:
    """The permutation is of all ids: with groups of one size the samples before the bad one keep their companions."""
    outputs = random_outputs(96, 4)
    order = EpochOrder(96, 0, 0).ids(0, 96).tolist()
    whole = judge(outputs, center="logits").protocols["batch"].predicted_N
    damaged = Outputs(outputs.logits_NC, outputs.labels_N, outputs.valid_N.clone())
    damaged.valid_N[order[80]] = False
    result = judge(damaged, center="logits")
    by_id = dict(zip(result.ids_N.tolist(), result.protocols["batch"].predicted_N.tolist(), strict=True))
    assert order[80] not in by_id
    assert [by_id[i] for i in order[:64]] == whole[order[:64]].tolist()


def test_what_an_undecodable_sample_holds_does_not_matter() -> None:
    outputs = random_outputs(40, 3)
    outputs.valid_N[7] = False
    before = judge(outputs, center="probabilities", stored_anchor_C=torch.full((3,), 1 / 3))
    outputs.logits_NC[7] = float("nan")
    outputs.labels_N[7] = 0
    after = judge(outputs, center="probabilities", stored_anchor_C=torch.full((3,), 1 / 3))
    for protocol in PROTOCOLS:
        assert torch.equal(before.protocols[protocol].predicted_N, after.protocols[protocol].predicted_N)
    outputs.valid_N[:] = False
    with pytest.raises(DataError, match="no sample of the evaluation split can be decoded"):
        judge(outputs, center="probabilities")


def test_ties_are_listed_by_id() -> None:
    logits_NC = torch.zeros(5, 3, dtype=torch.float64)
    logits_NC[0] = torch.tensor([1.0, 1.0 - 0.99 * TIE, 0.0])
    logits_NC[1] = torch.tensor([1.0, 1.0 - 1.01 * TIE, 0.0])
    logits_NC[2] = torch.tensor([5.0, 5.0, 5.0])  # invalid: not listed
    logits_NC[3] = torch.tensor([0.0, 0.0, 1.0])  # a tie for the second place is none
    logits_NC[4] = torch.tensor([0.0, 2.0, 2.0])
    valid_N = torch.tensor([True, True, False, True, True])
    result = judge(Outputs(logits_NC, torch.zeros(5, dtype=torch.int64), valid_N), center=None)
    assert TIE == 1e-5
    assert result.protocols["argmax"].ties == [0, 4]
    assert result.protocols["argmax"].predicted_N.tolist() == [0, 0, 2, 1]


def test_one_sample_and_one_class() -> None:
    one = Outputs(torch.tensor([[0.5, 2.0]], dtype=torch.float64), torch.tensor([1]), torch.tensor([True]))
    result = judge(one, center="probabilities", stored_anchor_C=torch.tensor([0.5, 0.5]))
    assert {name: r.accuracy for name, r in result.protocols.items()} == dict.fromkeys(PROTOCOLS, 1.0)
    single = Outputs(torch.randn(5, 1, dtype=torch.float64), torch.zeros(5, dtype=torch.int64), torch.ones(5).bool())
    for center in ("probabilities", "logits", "prior"):
        result = judge(single, center=center, stored_anchor_C=torch.ones(1))
        assert all((r.accuracy, r.ties) == (1.0, []) for r in result.protocols.values())


def test_a_given_class_prior_takes_the_place_of_the_anchor() -> None:
    outputs, prior_C = random_outputs(80, 4), torch.tensor([0.7, 0.1, 0.1, 0.1])
    protocols = judge(outputs, center="prior", stored_anchor_C=torch.full((4,), 0.25), prior_C=prior_C).protocols
    assert protocols["given"].predicted_N.tolist() == (prior_C * (outputs.logits_NC + 1)).argmax(dim=1).tolist()
    assert torch.equal(protocols["balanced"].predicted_N, outputs.logits_NC.argmax(dim=1))  # METHOD: argmax of z
    assert not torch.equal(protocols["given"].predicted_N, protocols["balanced"].predicted_N)
    assert "balanced" not in judge(outputs, center="probabilities", prior_C=prior_C).protocols


def test_uneven_classes_can_be_asked_as_even_ones() -> None:
    """`balanced` and `ordinary` by hand: exact posteriors of two classes of which one is three times as frequent."""
    shares_C = torch.tensor([0.75, 0.25], dtype=torch.float64)
    likelihood_N2 = torch.tensor([[0.3, 0.7], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    posterior_N2 = likelihood_N2 * shares_C
    posterior_N2 /= posterior_N2.sum(dim=1, keepdim=True)
    even_N, as_trained_N = [1, 1, 0], [0, 1, 0]
    labels_N, valid_N = torch.tensor([1, 1, 0]), torch.ones(3, dtype=torch.bool)

    def answers(logits_N2: torch.Tensor, **settings: Any) -> dict[str, list[int]]:
        found = judge(Outputs(logits_N2, labels_N, valid_N), shares_C=shares_C, **settings)
        return {name: result.predicted_N.tolist() for name, result in found.protocols.items()}

    plain = answers(posterior_N2.log(), center=None)
    assert plain == {"argmax": as_trained_N, "balanced": even_N}
    adjusted = answers(posterior_N2.log() - shares_C.log(), center=None, adjusted=1.0)
    assert adjusted == {"argmax": even_N, "ordinary": as_trained_N, "balanced": even_N}
    half = answers(posterior_N2.log() - 0.5 * shares_C.log(), center=None, adjusted=0.5)
    assert (half["ordinary"], half["balanced"]) == (as_trained_N, even_N)
    anchor_C = torch.tensor([0.5, 0.5])  # scores a (z + 1) are the posterior
    fixed = answers(posterior_N2 / 0.5 - 1, center="uniform", stored_anchor_C=anchor_C)
    assert fixed["balanced"] == even_N
    assert all(fixed[name] == as_trained_N for name in ("batch", "single", "dataset", "stored"))
    assert "balanced" not in judge(Outputs(posterior_N2, labels_N, valid_N), center=None).protocols


def test_details_are_the_plain_measures() -> None:
    outputs = random_outputs(60, 7, spread=0.4)
    stored_C = torch.tensor([0.1, 0.2, 0.1, 0.15, 0.15, 0.2, 0.1])
    settings = {"center": "logits", "stored_anchor_C": stored_C, "group_size": 10, "seed": 4}
    plain, detailed = judge(outputs, **settings), judge(outputs, **settings, num_seeds=3)
    for name, result in detailed.protocols.items():
        assert plain.protocols[name].details is None
        assert torch.equal(plain.protocols[name].predicted_N, result.predicted_N)
    seeds = [judge(outputs, **settings | {"seed": seed}).protocols["batch"].accuracy for seed in (4, 5, 6)]
    assert detailed.protocols["batch"].details.seeds == tuple(seeds)
    assert len(set(seeds)) > 1
    scores_NC = stored_C.double() * (outputs.logits_NC + 1)
    chances, labels = project_to_simplex(scores_NC).tolist(), outputs.labels_N.tolist()
    brier = [sum((p - (k == y)) ** 2 for k, p in enumerate(row)) for row, y in zip(chances, labels, strict=True)]
    details = detailed.protocols["stored"].details
    assert details.brier == pytest.approx(sum(brier) / 60, abs=1e-12)
    assert details.confidence_N.tolist() == pytest.approx([max(row) for row in chances], abs=1e-6)
    order = [sorted(range(7), key=lambda k: -row[k])[:5] for row in scores_NC.tolist()]
    assert details.top5_correct == sum(y in best for y, best in zip(labels, order, strict=True))
    warm = judge(outputs, **settings, num_seeds=1, temperatures={"stored": 0.5}).protocols
    tempered = [[max(s, 0.1 / 7) ** 2 for s in row] for row in scores_NC.tolist()]
    confident = [max(row) / sum(row) for row in tempered]
    assert warm["stored"].details.confidence_N.tolist() == pytest.approx(confident, abs=1e-6)
    assert warm["single"].details.brier == detailed.protocols["single"].details.brier


def test_summary() -> None:
    logits_NC = torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 0]], dtype=torch.float64)
    labels_N = torch.tensor([0, 1, 1, 0])
    outputs = Outputs(logits_NC, labels_N, torch.tensor([True, True, True, False]))
    summary = judge(outputs, center=None).summary(["a", "b", "c"])
    argmax = summary["protocols"].pop("argmax")
    assert summary == {
        "class_names": ["a", "b", "c"],
        "total": 3,
        "undecodable": 1,
        "protocols": {},
        "per_class": {"argmax": [1.0, 0.5, None]},
        "confusion": {"argmax": [[0, 0, 1], [1, 0, 1], [1, 1, 1]]},
    }
    intervals = {key: argmax.pop(key) for key in ("interval", "balanced_interval")}
    assert argmax == {"accuracy": 2 / 3, "correct": 2, "total": 3, "balanced_accuracy": 0.75, "ties": []}
    assert all(0 <= low <= 2 / 3 <= high <= 1 for low, high in intervals.values())
    detailed = judge(outputs, center=None, num_seeds=2)
    argmax = detailed.summary(["a", "b", "c"])["protocols"]["argmax"]
    assert argmax["top5"] is None  # of three classes all are among the five best
    assert 0 < argmax["brier"] < 1
    assert "seeds" not in argmax
    answers = detailed.answers()
    assert {name: tensor.tolist() for name, tensor in answers.items() if name != "confidence.argmax"} == {
        "ids": [0, 1, 2],
        "labels": [0, 1, 1],
        "predicted.argmax": [0, 0, 1],
    }
    assert json.loads(json.dumps(summary)) == summary


# With real batches.


def label_of(batch: Batch) -> Tensor:
    """A stand-in for a network whose outputs show which sample they are of: (B, 10)."""
    return batch.ids_B[:, None] * 100.0 + torch.arange(10)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_collect_orders_by_id(tiny_run: TinyRun, batch_size: int) -> None:
    shards = tiny_run.test_split
    builder = BatchBuilder(shards, ImagePipeline(8))
    batches = list(evaluation_batches(builder, 0, 1, batch_size, workers=1))
    outputs = collect(label_of, reversed(batches), shards.num_samples, World())
    assert outputs is not None
    assert outputs.logits_NC.dtype == torch.float64
    assert torch.equal(outputs.logits_NC[:, 0], torch.arange(shards.num_samples) * 100.0)
    assert outputs.labels_N.tolist() == shards.index.label.tolist()
    assert bool(outputs.valid_N.all())
    builder.close()


def test_collect_insists_on_every_sample_once(tiny_run: TinyRun) -> None:
    shards = tiny_run.test_split
    builder = BatchBuilder(shards, ImagePipeline(8))
    batches = list(evaluation_batches(builder, 0, 1, 50, workers=1))
    count = shards.num_samples
    assert collect(label_of, batches, count, World()) is not None
    wrong: dict[str, list[Batch]] = {
        "missing": batches[1:],
        "twice": [*batches, batches[2]],
        "one for another": [*batches[:-2], batches[0], batches[-1]],
    }
    for name, seen in wrong.items():
        with pytest.raises(DataError, match=f"of {count}, or some of them twice"):
            pytest.fail(f"{name}: {collect(label_of, seen, count, World())}")
    builder.close()


def test_collect_of_parts_of_several_ranks(tiny_run: TinyRun) -> None:
    """The parts of 3 ranks, with their stand-ins, cover the split; played into one process one after another."""
    shards = tiny_run.test_split
    builder = BatchBuilder(shards, ImagePipeline(8))

    def parts(world: int) -> Iterator[Batch]:
        for rank in range(world):
            yield from evaluation_batches(builder, rank, world, 64, workers=1)

    outputs = collect(label_of, parts(3), shards.num_samples, World())
    assert outputs is not None
    assert outputs.labels_N.tolist() == shards.index.label.tolist()
    builder.close()


def evaluate_run(run: TinyRun, batch_size: int) -> Evaluation:
    network, card, stored_C = load_network(find_checkpoint(run.folder))
    evaluation = evaluate_network(
        network,
        run.test_split,
        Normalise(card["mean"], card["std"], torch.device("cpu")),
        World(),
        judged={**judging(card), "stored_anchor_C": stored_C},
        pipeline=ImagePipeline(32),
        batch_size=batch_size,
        workers=1,
    )
    assert evaluation is not None
    return evaluation


def test_labels_do_not_depend_on_the_forward_batch_size(tiny_run: TinyRun) -> None:
    reference = evaluate_run(tiny_run, 256)
    assert reference.protocols["batch"].total == tiny_run.test_split.num_samples
    assert reference.protocols["stored"].accuracy > 0.5  # it has learned: this is no comparison of constants
    for batch_size in (1, 7):
        other = evaluate_run(tiny_run, batch_size)
        for protocol, result in reference.protocols.items():
            different = reference.ids_N[result.predicted_N != other.protocols[protocol].predicted_N].tolist()
            assert set(different) <= set(result.ties) & set(other.protocols[protocol].ties), protocol


def test_a_network_comes_back_in_the_mode_it_was_in(tiny_run: TinyRun) -> None:
    network, card, _ = load_network(find_checkpoint(tiny_run.pretrained))
    for training in (True, False):
        network.train(training)
        evaluation = evaluate_network(
            network,
            tiny_run.test_split,
            Normalise(card["mean"], card["std"], torch.device("cpu")),
            World(),
            judged={"center": None},
            pipeline=ImagePipeline(32),
        )
        assert network.training is training
        assert evaluation is not None
        assert list(evaluation.protocols) == ["argmax"]
