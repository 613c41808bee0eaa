"""`verify-parallel` on real ranks; what it plans and how it judges, number by number."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oat_dist import cli
from oat_dist.config import Config, load_config
from oat_dist.data.index import ShardSet
from oat_dist.errors import ConfigError
from oat_dist.models.heads import Fp32Linear
from oat_dist.parallel_check.job import Job, case_config, check_config, plan_job, read_job, write_job
from oat_dist.parallel_check.network import calibrate, digest, quieten, wake_head
from oat_dist.parallel_check.processes import _environment
from oat_dist.parallel_check.verdict import BOUND, CONTROL, FARTHER, conclude, judge, judge_controls

Capture = pytest.CaptureFixture[str]

CONFIG = """\
output_dir: {folder}/none
batch_size: 16
epochs: 2
pretrain_epochs: 1
data: {{path: {data}, eval_split: null, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}
optim: {{lr: 0.01}}
anchor: {{scope: global}}
engine: {{threads: 1}}
"""


@pytest.fixture
def config_file(digits: dict[str, ShardSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=digits["train"].folder.parent))
    return path


def refusal(capsys: Capture, *arguments: object) -> str:
    """The one error line; nothing on stdout, status 2."""
    capsys.readouterr()
    assert cli.main(["verify-parallel", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = [line for line in captured.err.splitlines() if not line.endswith(" ...")]
    return line.removeprefix("error: ")


# The whole command.


def test_two_engines_agree_with_one_process_and_wrong_ways_are_noticed(
    config_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "check.json"
    options = ["--engines", "ddp,zero2", "--processes", "2", "--cpu", "--steps", "2", "--json", str(file)]
    assert cli.main(["verify-parallel", str(config_file), *options, "optim.name=adamw", "seed=3"]) == 0
    captured = capsys.readouterr()
    found = json.loads(file.read_text())
    assert found["ok"] is True
    assert (found["processes"], found["device"], found["steps"]) == (2, "cpu", 2)
    assert found["overrides"] == ["optim.name=adamw", "seed=3"]
    assert found["rounding"] < BOUND
    assert found["bound"] == max(BOUND, 5 * found["rounding"])
    layouts = [("whole share", 1), ("2 micro-batches, span micro", 2), ("2 micro-batches, span step", 1)]
    expected = [(engine, *layout) for engine in ("ddp", "zero2") for layout in layouts]
    assert [(row["engine"], row["layout"], row["collectives"]) for row in found["rows"]] == expected
    for row in found["rows"]:
        assert row["faults"] == []
        assert row["ids"] is True
        assert row["configured"] is (row["layout"] == "whole share")
        assert 0 < row["parameters"] <= BOUND
        assert max(row["anchors"], row["loss"], row["gradient"]) <= BOUND
    controls = {control["what"]: control for control in found["controls"]}
    assert set(controls) == {"anchor of each rank", "one sample swapped"}
    for control in controls.values():
        assert control["engine"] == "ddp"
        assert control["noticed"] is True
        assert control["parameters"] > CONTROL
    # What a person sees.
    lines = captured.out.splitlines()
    assert lines[0].endswith("2 ranks on cpu against one process, 2 SGD steps of 16 samples, fp32")
    assert any(line.startswith("note: optim.name=adamw: checked with sgd") for line in lines)
    assert any(line.startswith("note: ReLU") for line in lines)
    assert sum(line.endswith("  ok") for line in lines) == 6
    assert sum(line.endswith("  noticed") for line in lines) == 2
    assert lines[-1].startswith("all is well: ")
    assert captured.err.splitlines() == [
        "reference: 1 process, 2 steps on joined batches of 16 ...",
        "ddp: 2 ranks, 3 layout(s) and controls ...",
        "zero2: 2 ranks, 3 layout(s) ...",
    ]


def test_help_says_what_the_columns_mean(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify-parallel", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "oat-dist verify-parallel configs/quickstart.yaml" in text
    for column in ("layout", "ids", "anchors", "loss", "gradient", "parameters", "collectives", "verdict"):
        assert f"\n  {column} " in text
    assert max(map(len, text.splitlines())) <= 120


def test_refusals_before_anything_starts(
    config_file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    say: Callable[..., str] = lambda *more: refusal(capsys, config_file, "--cpu", *more)  # noqa: E731
    assert say("anchor.scop=device").endswith("did you mean anchor.scope?")
    assert "'zero4' is none of ddp, zero1" in say("--engines", "ddp,zero4")
    assert say("--processes", "1") == "one rank is no parallel run; use --processes 2 or more"
    assert say("--steps", "0").startswith("--steps must be at least 1")
    assert "fewer than the 4 ranks" in say("--processes", "4", "batch_size=3")
    assert say("--json", tmp_path / "none" / "x.json").endswith("none/x.json: no such folder to write to")
    assert str(tmp_path / "away") in say(f"data.path={tmp_path / 'away'}")
    (tmp_path / "two.json").write_text('{"zero_optimization": {"stage": 2}}')
    said = say("engine.name=zero1", f"engine.deepspeed={tmp_path / 'two.json'}")
    assert said.startswith("engine.name=zero1, but engine.deepspeed=") and said.endswith("says zero2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert say().startswith("verify-parallel starts its own ranks")


def test_a_rank_says_what_is_wrong_in_its_own_words(config_file: Path, tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "gone.safetensors"
    line = refusal(capsys, config_file, "--cpu", f"model.weights={missing}")
    assert str(missing) in line


def test_time_is_limited(config_file: Path, capsys: Capture) -> None:
    started = time.monotonic()
    line = refusal(capsys, config_file, "--cpu", "--timeout-minutes", "0.001")
    assert line == "reference: 1 process(es) have not finished in time; allow more with --timeout-minutes"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_command(config_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "oat_dist.cli", "verify-parallel", str(config_file), "--cpu"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=Path(cli.__file__).parents[1]) as run:
        child = _soon(lambda: _children(run.pid), 60)[0]
        run.send_signal(number)
        assert run.wait(20) == (143 if number == signal.SIGTERM else -9)
    _soon(lambda: not _alive(child), 20)
    if number == signal.SIGTERM:
        assert list(temporary.iterdir()) == []


def _soon(what: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def _children(parent: int) -> list[int]:
    """Processes of a check that `parent` has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split() if _alive(int(pid))]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and b"oat_dist.parallel_check" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_ranks_inherit_nothing_from_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "x")
    one = _environment(0, 1, 5, cpu=False)
    assert not [name for name in one if name.startswith(("ACCELERATE_", "RANK", "MASTER_"))]
    two = _environment(1, 2, 5, cpu=True)
    assert (two["RANK"], two["WORLD_SIZE"], two["MASTER_PORT"]) == ("1", "2", "5")
    assert (two["ACCELERATE_USE_CPU"], two["CUDA_VISIBLE_DEVICES"]) == ("true", "")
    assert "ACCELERATE_USE_DEEPSPEED" not in two


# The plan.


def planned(config_file: Path, *overrides: str, processes: int = 2, samples: int = 1000) -> tuple[Job, list[str]]:
    config, _ = check_config(load_config(config_file, ["batch_size=8", *overrides]))
    return plan_job(config, samples, processes, 2)


def test_layouts_and_anchor_sets_of_every_scope(config_file: Path) -> None:
    whole, halves = [[[0, 4], [4, 8]]], [[[0, 2], [2, 4]], [[4, 6], [6, 8]]]
    shares = [[[0, 2], [4, 6]], [[2, 4], [6, 8]]]  # span step: each rank cuts its own share

    job, notes = planned(config_file)
    assert notes == []
    assert [case.name for case in job.cases] == [
        "whole share",
        "2 micro-batches, span micro",
        "2 micro-batches, span step",
    ]
    assert [case.micro_batch_size for case in job.cases] == [None, 2, 2]
    assert [case.parts[0] for case in job.cases] == [whole, halves, shares]
    assert [case.sets[0] for case in job.cases] == [
        [[[[0, 8]], [[0, 8]]]],
        [[[[0, 4]], [[0, 4]]], [[[4, 8]], [[4, 8]]]],
        [[[[0, 8]], [[0, 8]]]],
    ]
    assert [case.collectives for case in job.cases] == [[1, 1], [2, 2], [1, 1]]
    assert [case.reference for case in job.cases] == [0, 1, 0]
    assert job.references == [[[[0, 8]]] * 2, [[[0, 4], [4, 8]]] * 2]
    assert (job.objective, job.wrong_scope, job.batches) == ("oat", "device", [[0, 0, 8], [0, 8, 16]])

    job, _ = planned(config_file, "anchor.scope=device")
    assert [case.sets[0] for case in job.cases] == [
        [[[[0, 4]], [[4, 8]]]],
        [[[[0, 2]], [[2, 4]]], [[[4, 6]], [[6, 8]]]],
        [[[[0, 4]], [[4, 8]]]],
    ]
    assert [case.collectives for case in job.cases] == [[0, 0]] * 3
    assert job.wrong_scope == "global"

    job, notes = planned(config_file, "anchor.scope=group", "anchor.group_size=3", "data.on_bad=skip")
    assert [(case.span, case.parts[0]) for case in job.cases] == [
        ("micro", [[[0, 6], [6, 8]]]),
        ("micro", [[[0, 3], [3, 6]], [[6, 8], [8, 8]]]),
        ("step", [[[0, 3], [6, 7]], [[3, 6], [7, 8]]]),
    ]
    assert [case.sets[0] for case in job.cases] == [
        [[[[0, 3], [3, 6]], [[6, 8]]]],
        [[[[0, 3]], [[3, 6]]], [[[6, 8]], []]],
        [[[[0, 3], [3, 6]], [[6, 8]]]],
    ]
    assert [case.collectives for case in job.cases] == [[1, 1]] * 3  # the count of those that could be decoded
    assert len(job.references) == 1


def test_what_cannot_be_accumulated_is_said(config_file: Path) -> None:
    job, [note] = planned(config_file, "anchor.scope=group", "anchor.group_size=4")
    assert [case.name for case in job.cases] == ["whole share", "2 micro-batches, span step"]
    assert note == "span micro: a rank's share of 4 cannot be cut in two, so there is no accumulation"
    job, notes = planned(config_file, processes=8)
    assert len(job.cases) == 1
    assert len(notes) == 2
    with pytest.raises(ConfigError, match="fewer than the 9 ranks"):
        planned(config_file, processes=9)


def test_a_configured_accumulation_is_the_first_layout(config_file: Path) -> None:
    job, _ = planned(config_file, "micro_batch_size=1")
    assert [(case.name, case.micro_batch_size) for case in job.cases] == [
        ("4 micro-batches, span micro", 1),
        ("whole share", None),
        ("4 micro-batches, span step", 1),
    ]
    job, _ = planned(config_file, "anchor.span=step")
    assert [(case.name, case.span) for case in job.cases] == [
        ("whole share", "step"),
        ("2 micro-batches, span step", "step"),
    ]


def test_cross_entropy_has_no_anchors(config_file: Path) -> None:
    job, _ = planned(config_file, "pretrain_epochs=2")
    assert (job.objective, job.wrong_scope, job.references) == ("cross_entropy", None, [[[], []]])
    assert [case.name for case in job.cases] == ["whole share", "2 micro-batches, span micro"]


def test_batches_go_on_into_the_next_epoch(config_file: Path) -> None:
    job, _ = planned(config_file, samples=5)
    assert job.batches == [[0, 0, 5], [1, 0, 5]]
    assert job.cases[0].parts == [[[[0, 3], [3, 5]]]] * 2


def test_a_job_survives_its_file(config_file: Path, tmp_path: Path) -> None:
    job, _ = planned(config_file)
    write_job(tmp_path, job)
    assert read_job(tmp_path) == job


def test_the_checks_own_configuration(config_file: Path) -> None:
    given = load_config(
        config_file, ["engine.precision=bf16", "optim.name=adamw", "engine.name=zero2", "optim.ema=0.9"]
    )
    config, notes = check_config(given)
    assert (config.engine.precision, config.engine.name, config.optim.name, config.optim.ema) == (
        "no",
        None,
        "sgd",
        None,
    )
    assert [note.split(":")[0] for note in notes] == ["engine.precision=bf16", "optim.name=adamw", "optim.ema=0.9"]
    own = replace(config, engine=given.engine, optim=given.optim)
    assert own == given  # nothing else differs
    job, _ = plan_job(config, 1000, 2, 1)
    assert case_config(config, job.cases[2]) == replace(
        config, micro_batch_size=4, anchor=replace(config.anchor, span="step")
    )
    assert check_config(Config())[1] == []


# The network.


def test_what_makes_ranks_differ_is_switched_off() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(36, 5),
    )
    keys = list(network.state_dict())
    before = digest(network)
    notes = quieten(network)
    assert [note.split(":")[0] for note in notes] == ["BatchNorm", "dropout", "ReLU and the like, max-pooling"]
    assert list(network.state_dict()) == keys
    assert digest(network) == before
    images_BCHW = torch.randn(6, 3, 8, 8) * 3 + 1
    network.train()
    joined, parts = network(images_BCHW), torch.cat([network(images_BCHW[:1]), network(images_BCHW[1:])])
    torch.testing.assert_close(parts, joined)  # each sample by itself
    assert digest(network) == before
    calibrate(network, images_BCHW)
    with torch.no_grad():
        normed = network[1](network[0](images_BCHW))
    assert abs(float(normed.mean())) < 1e-5
    assert abs(float(normed.std()) - 1) < 0.05
    assert quieten(network) == []


def test_a_head_of_zeros_is_woken() -> None:
    head = Fp32Linear(8, 3)
    network = nn.Sequential(nn.Linear(4, 8), head)
    assert wake_head(network) == []
    kept = head.weight.detach().clone()
    nn.init.zeros_(head.weight)
    [note] = wake_head(network)
    assert note.startswith("1 starts at zero")
    assert head.weight.all()
    assert not torch.equal(head.weight, kept)


# The verdict.

ANCHORS = {"0-8": [0.25, 0.75], "0-4": [0.5, 0.5], "4-8": [0.125, 0.875]}


@pytest.fixture
def results(config_file: Path) -> tuple[Job, dict[str, Any], list[dict[str, Any]]]:
    """What reference and two ranks would write if all were well, in small numbers."""
    job, _ = planned(config_file)
    ids = [list(range(30, 38)), list(range(50, 58))]
    runs = [
        {"loss": [2.0, 1.5], "norm": [4.0, 3.0], "anchors": [{f"{a}-{b}": ANCHORS[f"{a}-{b}"] for a, b in sets}] * 2}
        for sets in ([[0, 8]], [[0, 4], [4, 8]])
    ]
    reference = {"digest": "d", "ids": ids, "fingerprints": [7, 2**64 - 1], "runs": runs, "rounding": 1e-6}
    ranks = []
    for rank in range(2):
        cases = [
            {
                "ids": [[ids[step][slice(*parts[rank])] for parts in case.parts[step]] for step in range(2)],
                "fingerprints": [(4, 3)[rank], 2**63 + rank - 1],
                "anchors": [[[ANCHORS[f"{a}-{b}"] for a, b in call[rank]] for call in step] for step in case.sets],
                "loss": [2.5 - rank, 1.5],
                "norm": [4.0, 3.0],
                "collectives": case.collectives,
                "parameters": 2e-6 if rank == 0 else None,
            }
            for case in job.cases
        ]
        swapped = {**copy.deepcopy(cases[0]), "parameters": 0.1 if rank == 0 else None}
        wrong = {**copy.deepcopy(swapped), "anchors": [[[[0.3, 0.7]]]] * 2}
        controls = {"anchor of each rank": wrong, "one sample swapped": swapped}
        ranks.append({"digest": "d", "cases": cases, "controls": controls})
    return job, reference, copy.deepcopy(ranks)


def verdict(
    job: Job, reference: dict[str, Any], ranks: list[dict[str, Any]]
) -> tuple[list[str], list[bool], bool, str]:
    rows = judge(job, "ddp", reference, ranks)
    controls = judge_controls(job, "ddp", reference, ranks, rows)
    ok, text = conclude(rows, controls, reference["rounding"])
    return [fault for row in rows for fault in row.faults], [control.noticed for control in controls], ok, text


def test_all_is_well(results: tuple[Job, dict[str, Any], list[dict[str, Any]]]) -> None:
    job, reference, ranks = results
    faults, noticed, ok, text = verdict(*results)
    assert (faults, noticed, ok) == ([], [True, True], True)
    assert text.startswith("all is well")
    first = judge(job, "ddp", reference, ranks)[0]
    assert (first.anchors, first.loss, first.gradient, first.parameters, first.collectives) == (0, 0, 0, 2e-6, 1)


def _drop(record: dict[str, Any]) -> None:
    record["ids"][0][0].pop()


def _twice(record: dict[str, Any]) -> None:
    record["ids"][1][0][0] = record["ids"][1][0][1]


def _turned(record: dict[str, Any]) -> None:
    record["ids"][0][0].reverse()


def _put(key: str, value: Any, step: int | None = 1) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        if step is None:
            record[key] = value
        else:
            record[key][step] = value

    return change


@pytest.mark.parametrize(
    ("tamper", "fault"),
    [
        (_drop, "the sample ids are not those of the plan"),
        (_twice, "the sample ids are not those of the plan"),
        (_turned, "the sample ids are not those of the plan"),
        (_put("fingerprints", 11), "the sample ids are not those of the plan"),
        (_put("parameters", 6e-5, None), "parameters off by 6.0e-05, the bound is 5.0e-05"),
        (_put("parameters", float("nan"), None), "parameters not finite"),
        (_put("norm", 3.001), "gradient off by 3.3e-04, the bound is 5.0e-05"),
        (_put("loss", 1.501), "loss off by 3.3e-04, the bound is 5.0e-05"),
        (_put("loss", float("nan")), "loss not finite"),
        (_put("anchors", [[[0.25, 0.7502]]]), "anchors off by 2.0e-04, the bound is 5.0e-05"),
        (_put("anchors", []), "anchors not finite"),
        (_put("collectives", [1, 2], None), "collectives of the steps: [1, 2] instead of [1, 1]"),
    ],
)
def test_one_wrong_number_of_one_rank_fails(
    results: tuple[Job, dict[str, Any], list[dict[str, Any]]],
    tamper: Callable[[dict[str, Any]], None],
    fault: str,
) -> None:
    job, reference, ranks = results
    tamper(ranks[0]["cases"][0])
    faults, _, ok, text = verdict(job, reference, ranks)
    assert faults == [fault]
    assert not ok
    assert text == f"FAIL: 1 of 3 rows differ from one process; the first, ddp, whole share: {fault}"


def test_other_initial_weights_fail(results: tuple[Job, dict[str, Any], list[dict[str, Any]]]) -> None:
    job, reference, ranks = results
    ranks[1]["digest"] = "e"
    faults, _, ok, _ = verdict(job, reference, ranks)
    assert faults == ["the ranks start from other weights than one process"] * 3
    assert not ok


def test_a_control_that_is_not_noticed_makes_the_check_too_weak(
    results: tuple[Job, dict[str, Any], list[dict[str, Any]]],
) -> None:
    job, reference, ranks = results
    ranks[0]["controls"]["one sample swapped"]["parameters"] = CONTROL
    faults, noticed, ok, text = verdict(job, reference, ranks)
    assert (faults, noticed, ok) == ([], [True, False], False)
    assert text.startswith("too weak: one sample swapped would have gone unnoticed")
    assert text.endswith("raise --steps, or lower batch_size")


def test_controls_must_lie_clearly_farther_than_rows(
    results: tuple[Job, dict[str, Any], list[dict[str, Any]]],
) -> None:
    job, reference, ranks = results
    reference["rounding"] = 2e-3  # kinks: the bound is 1e-2 now
    for case in ranks[0]["cases"]:
        case["parameters"] = 6e-3
    assert verdict(job, reference, ranks)[:2] == ([], [True, False])  # 0.1 is not 20 times 6e-3
    assert "try another optim.lr" in verdict(job, reference, ranks)[3]
    ranks[0]["controls"]["one sample swapped"]["parameters"] = FARTHER * 6e-3 + 1e-6
    assert verdict(job, reference, ranks)[2]


def test_a_wrong_anchor_of_little_effect_is_noticed_by_itself(
    results: tuple[Job, dict[str, Any], list[dict[str, Any]]],
) -> None:
    job, reference, ranks = results
    control = ranks[0]["controls"]["anchor of each rank"]
    control["parameters"] = 1e-4  # as with detached anchors of a new network
    assert verdict(job, reference, ranks)[2]
    wrong_elsewhere = judge(job, "zero2", reference, copy.deepcopy(ranks))
    wrong_elsewhere[0] = replace(wrong_elsewhere[0], anchors=0.003)
    assert not judge_controls(job, "ddp", reference, ranks, wrong_elsewhere)[0].noticed
    for rank in ranks:
        rank["controls"]["anchor of each rank"]["anchors"] = [[[[0.25, 0.75 + 9e-8]]]] * 2  # no more than rounding
    assert verdict(job, reference, ranks)[1] == [False, True]
