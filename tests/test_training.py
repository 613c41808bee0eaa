"""The trainer as a whole, on 1, 2 and 3 real ranks: exact, resumable bit by bit, and the same data for everyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from shard_server import ShardServer
from training_checks import STEPS_PER_EPOCH, weights

from oat_dist.anchor import CENTERS
from oat_dist.data.index import ShardSet
from oat_dist.models import build_model

WORLDS = (1, 2, 3)
TENS = tuple(
    f"ten-{name}" for name in ["global", "group", "mixed", "windows", "accumulated", "balanced", "running", "ema"]
)


def packed(noisy_digits: dict[str, ShardSet]) -> str:
    return str(noisy_digits["train"].folder.parent)


@pytest.fixture(scope="module")
def campaigns(
    tmp_path_factory: pytest.TempPathFactory, noisy_digits: dict[str, ShardSet]
) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    """By world size: the folder of its runs, and what each rank found."""
    found = {}
    for world in WORLDS:
        root = tmp_path_factory.mktemp(f"world-{world}")
        with ShardServer(Path(packed(noisy_digits))) as server:
            found[world] = (
                root,
                run_ranks(world, "training_checks:campaign", str(root), packed(noisy_digits), server.url),
            )
            # 3 shards of each split, once each, whatever the number of ranks and runs
            assert {name: count for name, count in server.requests.items() if name.endswith(".tar")} == {
                f"{split}-{number:06d}.tar": 1
                for split in ("train", "test")
                for number in range(len(noisy_digits[split].manifest.shards))
            }
    return found


@pytest.fixture(params=WORLDS)
def runs(request: pytest.FixtureRequest, campaigns: dict[int, tuple[Path, list[dict[str, Any]]]]) -> Path:
    return campaigns[request.param][0]


def records(run: Path, *, timeless: bool = True) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "event" not in line]
    if timeless:
        for line in lines:
            for name in ("samples_per_s", "data_wait", "seconds", "memory_gb"):
                line.pop(name, None)
    return lines


def final_files(run: Path, step: int | None = None) -> dict[str, bytes]:
    name = (run / "checkpoints" / "latest").read_text().strip() if step is None else f"step-{step}"
    folder = run / "checkpoints" / name
    return {
        path.name: path.read_bytes()
        for path in folder.glob("*.safetensors")  # weights, optimizer, stored anchor, and what each rank keeps
    }


def initial_weights() -> torch.Tensor:
    """Those of seed 0, the default, in the order of their names."""
    torch.manual_seed(0)
    return _by_name(build_model("lightweight", 10).state_dict())


def _by_name(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values[name].double().flatten() for name in sorted(values)])


def _last_fingerprint(run: Path) -> tuple[int, str]:
    return [(line["step"], line["fingerprint"]) for line in records(run) if "fingerprint" in line][-1]


def flat(run: Path) -> torch.Tensor:
    return _by_name(weights(run))


@pytest.mark.parametrize(
    ("undisturbed", "resumed"),
    [
        ("whole", f"resumed-{STEPS_PER_EPOCH}"),
        ("whole", f"resumed-{STEPS_PER_EPOCH + 11}"),
        ("adamw", "adamw-resumed"),
        ("norm", "norm-resumed"),
        ("ten-running", "running-resumed"),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one_bit_by_bit(runs: Path, undisturbed: str, resumed: str) -> None:
    expected, found = final_files(runs / undisturbed), final_files(runs / resumed)
    assert found.keys() == expected.keys() and "optimizer.safetensors" in found
    assert ("raw.safetensors" in found) == undisturbed.startswith("norm")  # with optim.ema
    assert [name for name in expected if found[name] != expected[name]] == []
    before, after = (
        [line for line in records(runs / name) if "protocol" in line or "anchor" in line]
        for name in (undisturbed, resumed)
    )
    # the interruption itself adds an evaluation, nothing else
    assert [line for line in after if line in before] == before
    # (losses of a line are averages since the line before, and the interruption has added one)
    assert _last_fingerprint(runs / undisturbed) == _last_fingerprint(runs / resumed)


def test_a_copy_of_a_run_is_the_run_that_never_stopped(runs: Path) -> None:
    for name, start, interrupted in (
        ("copy-inside", 2 * STEPS_PER_EPOCH, 0),
        ("copy-at-switch", STEPS_PER_EPOCH, 8),  # losses of the line that it was interrupted in are averages since then
    ):
        end = start + STEPS_PER_EPOCH
        assert final_files(runs / name, end) == final_files(runs / "whole", end)
        expected = [line for line in records(runs / "whole") if start + interrupted < line["step"] <= end]
        assert [line for line in records(runs / name) if line in expected] == expected
        first = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[0])
        assert (first["event"], first["step"]) == ("start", start) and first["start_from"].endswith(f"step-{start}")
        found, whole = (
            json.loads((runs / run / "checkpoints" / f"step-{end}" / "state.json").read_text())
            for run in (name, "whole")
        )
        assert found["start_from"] == first["start_from"] and found["best"] == whole["best"]
    # the control: the same beginning, and then another step
    copied, own = runs / "copy-otherwise", runs / "switch"
    for step, same in ((STEPS_PER_EPOCH, True), (STEPS_PER_EPOCH + 1, False)):
        found, expected = (final_files(run, step)["model.safetensors"] for run in (copied, own))
        assert (found == expected) == same


def test_a_copy_that_would_not_go_on_is_refused_on_all_ranks(campaigns: dict[int, tuple[Path, Any]]) -> None:
    for _, ranks in campaigns.values():
        for found in ranks:
            assert "seed=0 there, 1 here; set it as there, or give another start_from" in found["other order"]
            assert "is at step 90, beyond the cross-entropy epochs, and anchor.grad=None there" in found["beyond"]
            assert "step-300: no such folder; train that run first" in found["nothing there"]
            assert found["uncopied"] == []


def test_remote_shards_train_the_network_of_local_ones(runs: Path) -> None:
    assert final_files(runs / "ten-remote") == final_files(runs / "ten-global")
    assert final_files(runs / "ten-windows") != final_files(runs / "ten-global")  # another order


def test_a_stream_trains_to_the_end(campaigns: dict[int, tuple[Path, list[dict[str, Any]]]]) -> None:
    for world, (root, found) in campaigns.items():
        assert [of_rank["streamed"] for of_rank in found] == [10] * world  # 470 samples in batches of 48
        assert [line["protocol"] for line in records(root / "streamed") if "protocol" in line]


def test_another_seed_is_not_bitwise_equal(runs: Path) -> None:
    """The control: files of different runs do differ."""
    assert final_files(runs / "ten-global")["model.safetensors"] != final_files(runs / "ten-group")["model.safetensors"]


def test_the_order_is_the_same_on_any_number_of_ranks(campaigns: dict[int, tuple[Path, Any]]) -> None:
    by_world = {
        world: [(line["step"], line["fingerprint"]) for line in records(root / "whole") if "fingerprint" in line]
        for world, (root, _) in campaigns.items()
    }
    assert len(by_world[1]) >= 3 * STEPS_PER_EPOCH // 8
    assert len({fingerprint for _, fingerprint in by_world[1]}) == len(by_world[1])
    assert by_world[1] == by_world[2] == by_world[3]


@pytest.mark.parametrize("name", [*TENS, "one-left"])
def test_n_ranks_train_the_network_of_one(campaigns: dict[int, tuple[Path, Any]], name: str) -> None:
    """fp32, no BatchNorm, no dropout: METHOD's bound after ten steps, through loader, trainer and DDP."""
    start = initial_weights()
    one = flat(campaigns[1][0] / name)
    assert (one - start).norm() > 0.01
    for world in (2, 3):
        root = campaigns[world][0]
        assert float((flat(root / name) - one).norm() / (one - start).norm()) <= 5e-5
        for line, expected in zip(records(root / name), records(campaigns[1][0] / name), strict=True):
            if "loss" in line:
                assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    # control: another anchor scope leads elsewhere
    other = flat(campaigns[2][0] / ("ten-group" if name in ("ten-global", "ten-ema", "one-left") else "ten-global"))
    assert float((other - one).norm() / (one - start).norm()) > 1e-3


def test_a_balanced_network_says_what_it_was_balanced_against(runs: Path) -> None:
    """Its card has what the protocols `ordinary` and `balanced` need; that of nearly even classes does not."""

    def card(name: str) -> dict[str, Any]:
        step = (runs / name / "checkpoints" / "latest").read_text().strip()
        return json.loads((runs / name / "checkpoints" / step / "model.json").read_text())

    found = card("ten-balanced")
    assert (
        found["adjusted"] == 1.0 and sum(found["class_shares"]) == pytest.approx(1) and len(found["class_shares"]) == 10
    )
    assert not {"adjusted", "class_shares"} & card("whole").keys()


def test_groups_do_not_depend_on_accumulation(campaigns: dict[int, tuple[Path, Any]]) -> None:
    """The same anchor sets in one forward pass or in several: the same training."""
    start = initial_weights()
    for root, _ in campaigns.values():
        whole, split = flat(root / "ten-group"), flat(root / "ten-accumulated")
        assert float((whole - split).norm() / (whole - start).norm()) <= 5e-5


def test_phases_and_learning_rate_in_the_log(runs: Path) -> None:
    lines = records(runs / "whole")
    for line in (line for line in lines if "loss" in line):
        assert line["phase"] == ("cross_entropy" if line["step"] <= STEPS_PER_EPOCH else "oat")
        assert line["lr"] == 0.01
        assert line["epoch"] == (line["step"] - 1) // STEPS_PER_EPOCH
        assert ("anchor_min" in line) == (line["phase"] == "oat")
    evaluated = {(line["step"], line["protocol"]) for line in lines if "protocol" in line}
    assert evaluated == {(step, name) for step in (60, 90) for name in ("batch", "single", "dataset", "stored")}
    final = json.loads((runs / "whole" / "evaluation.json").read_text())
    assert final["protocols"]["batch"]["accuracy"] > 0.8  # it has learned to read digits
    assert final["total"] == 359


def test_momentum_starts_anew_at_the_switch(campaigns: dict[int, tuple[Path, Any]]) -> None:
    """The first OAT step is the one with new momentum, and not (the control) the one that carries it over."""
    for _, ranks in campaigns.values():
        assert [found["switch"] for found in ranks] == [{"new": True, "old": False}] * len(ranks)


@pytest.mark.parametrize("world", WORLDS)
def test_collectives_are_as_few_as_promised(campaigns: dict[int, tuple[Path, Any]], world: int) -> None:
    """`device` adds none to DDP's own; `global` one a step. The rest: start, log lines, one epoch end, one save."""
    found = campaigns[world][1][0]
    device, steps = found["collectives device"]
    with_global, same_steps = found["collectives global"]
    assert steps == same_steps == 10
    assert with_global - device == (steps if world > 1 else 0)


def test_a_loss_that_is_not_finite_stops_all_ranks_and_saves_nothing_after(
    campaigns: dict[int, tuple[Path, Any]],
) -> None:
    for world, (root, found) in campaigns.items():
        assert len({ranks["diverged"] for ranks in found}) == 1
        message = found[0]["diverged"]
        assert "not finite at step" in message and "optim.lr" in message
        assert ("phase oat" in message) or ("phase cross_entropy" in message)
        step = int(message.split("at step ")[1].split(" ")[0].replace(",", ""))
        saved = [int(path.name.split("-")[1]) for path in (root / "diverged/checkpoints").glob("step-*")]
        assert all(number < step for number in saved), (world, saved, step)


def test_saving_by_the_clock(runs: Path) -> None:
    """At every log line, once the time has passed, on all ranks alike; and at the end."""
    saved = {path.name for path in (runs / "minutes" / "checkpoints").glob("step-*")}
    assert saved == {"step-8", "step-16", "step-20"}


def test_nothing_ruined_is_saved_and_the_folder_stays_free(campaigns: dict[int, tuple[Path, Any]]) -> None:
    for root, ranks in campaigns.values():
        for found in ranks:
            assert "not finite at step" in found["at once"]
            assert "not finite" in found["in the last step"]
            assert found["saved"] == []
        assert (root / "fresh" / "checkpoints" / "latest").read_text() == "step-3\n"


def test_damaged_checkpoints_are_never_overwritten_by_a_new_start(campaigns: dict[int, tuple[Path, Any]]) -> None:
    for root, ranks in campaigns.values():
        for found in ranks:
            assert "every checkpoint is damaged" in found["hurt"] and "state.json" in found["hurt"]
        assert (root / "hurt" / "checkpoints" / "step-3" / "model.safetensors").is_file()
        assert len([line for line in records(root / "hurt") if "loss" in line]) == 1


def test_what_makes_a_folder_a_run(campaigns: dict[int, tuple[Path, Any]]) -> None:
    for _, ranks in campaigns.values():
        for found in ranks:
            assert found["copied"] == 3
            assert "config.yaml: is missing, but there are checkpoints; restore it" in found["no config"]


def test_a_run_that_is_further_than_asked_stays_as_it_is(campaigns: dict[int, tuple[Path, Any]]) -> None:
    for root, ranks in campaigns.values():
        assert [found["short"] for found in ranks] == [3] * len(ranks)
        assert (root / "short" / "checkpoints" / "latest").read_text() == "step-3\n"


def test_a_folder_of_another_configuration_is_refused(campaigns: dict[int, tuple[Path, Any]]) -> None:
    for _, found in campaigns.values():
        for rank in found:
            assert "belongs to another configuration: seed=0 became 1" in rank["other config"]


def test_another_number_of_ranks_continues_the_same_run(
    campaigns: dict[int, tuple[Path, Any]], tmp_path: Path, noisy_digits: dict[str, ShardSet]
) -> None:
    """2 ranks, then 3, then 1: the order of an undisturbed run, and its weights to rounding."""
    for world, stop in ((2, 4), (3, 7), (1, 10)):
        run_ranks(world, "training_checks:ten_until", str(tmp_path), packed(noisy_digits), "moved", stop)
    moved, whole = tmp_path / "moved", campaigns[1][0] / "ten-global"
    assert _last_fingerprint(moved) == _last_fingerprint(whole)
    start = initial_weights()
    assert float((flat(moved) - flat(whole)).norm() / (flat(whole) - start).norm()) <= 5e-5


def test_predicted_labels_do_not_depend_on_ranks_or_forward_batch(campaigns: dict[int, tuple[Path, Any]]) -> None:
    """Every protocol of every center, on 1, 2 and 3 ranks, with forward batches of 1, 32, 100 and 1000."""
    run = str(campaigns[1][0] / "whole")
    own = ["batch", "single", "dataset", "stored", "balanced"]
    expected = {"": ["argmax", "ordinary", "balanced"], **dict.fromkeys(CENTERS, own), "prior": [*own, "given"]}
    reference = None
    for world in WORLDS:
        found = run_ranks(world, "training_checks:evaluate", run)[0]
        command = found.pop("command")
        assert found.keys() == {"1", "32", "100", "1000"}
        reference = reference or found["32"]
        for centers in found.values():
            assert {center: list(protocols) for center, protocols in centers.items()} == expected
            for center, protocols in centers.items():
                for name, result in protocols.items():
                    _same_labels(result, reference[center][name], (world, center, name))
        assert {name: found["32"]["probabilities"][name]["labels"] for name in own[:4]} == command
    # The protocols are not all the same answer, so each of them has something to lose.
    assert reference is not None
    answers = {center: [one["labels"] for one in protocols.values()] for center, protocols in reference.items()}
    assert all(answers["logits"][0] != other for other in answers["logits"][1:])


def _same_labels(result: dict[str, Any], expected: dict[str, Any], where: tuple[Any, ...]) -> None:
    """METHOD's tie rule: labels may differ where both list the sample as too close to call."""
    pairs = zip(result["labels"], expected["labels"], strict=True)
    different = {number for number, pair in enumerate(pairs) if len({*pair}) > 1}
    assert different <= set(result["ties"]) & set(expected["ties"]), where


def test_bf16_trains_on_two_ranks(tmp_path: Path, noisy_digits: dict[str, ShardSet]) -> None:
    results = run_ranks(2, "training_checks:bf16", str(tmp_path), packed(noisy_digits))
    assert results[0] == results[1]
    assert records(tmp_path / "bf16")[-1]["accuracy"] > 0.3
