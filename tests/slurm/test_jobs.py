"""The scripts of launch/slurm/ on a real Slurm, with everything that a cluster does to a job.

All scenarios run at the same time; each has its own nodes, or shares those on which nothing bad happens.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import MiniCluster
from jobs import Campaign, Desk, Scenario
from PIL import Image
from ranks import run_ranks

from oat_dist.data.index import ShardSet
from oat_dist.experiments.plan import Options, make_plan
from oat_dist.experiments.run_state import trained_state
from oat_dist.experiments.tables import read_table

SCOPES = ("device", "global")


def a_sweep_is_stopped_preempted_moved_and_ends_as_if_it_had_not_been(desk: Desk) -> None:
    """Four attempts of two runs; in the end bit by bit the weights and losses of undisturbed runs."""
    cluster, runs = desk.cluster, ("sweep/1", "sweep/2")
    lines = desk.folder / "scopes.txt"
    lines.write_text("".join(f"anchor.scope={scope} 'data.augment=flip pad_crop'\n" for scope in SCOPES))
    # the data comes through the node's own disk
    desk.say(f"export DATA={desk.data} OAT_SCRATCH={desk.folder}/scratch")
    array = desk.submit(
        *("sweep", str(lines), str(desk.config), f"output_dir={desk.folder}/sweep"), options=("--array=1-2",)
    )
    tasks = [f"{array}_{number}" for number in (1, 2)]

    for run in runs:
        desk.wait_steps(run, 15)
    for task in tasks:
        cluster.signal(task)
    for run in runs:
        desk.wait_steps(run, 10, starts=2)

    high = cluster.submit(
        Path(__file__).parent / "busy.sh",
        options=(
            "--partition=high",
            "--exclusive",
            f"--nodelist={','.join(desk.nodes)}",
            "--nodes=2",
            "--output=/dev/null",
        ),
    )
    cluster.wait_state(high, "RUNNING")
    cluster.cancel(high)
    for run in runs:
        desk.wait_steps(run, 10, starts=3)

    cluster.node_down(desk.nodes[1])
    for task in tasks:
        cluster.wait_state(task, "PENDING")
        cluster.until(
            lambda task=task: not cluster.ranks(cluster.show(task)["JobId"]), f"no ranks of {task}", pause=0.3
        )
    end = max(desk.step(run) for run in runs) + 15
    desk.end_at(end)
    cluster.node_up(desk.nodes[1])
    for task in tasks:
        assert cluster.wait_state(task, "COMPLETED", "FAILED") == "COMPLETED"
        first, second, *_, last = desk.decisions(task)
        assert "attempt 1: stopped at step" in first and first.endswith("; requeued")
        assert "attempt 2: stopped at step" in second and second.endswith("; requeued")
        # four; five where Slurm, taking the node back, has ended what had just begun there
        assert re.fullmatch(f"attempt [45]: finished at step {end} of {end}", last)
        assert desk.log(task).count("asked to stop (SIGUSR1)") == 2
    assert [path.name for path in (desk.folder / "jobs").iterdir()] == []
    assert len(list((desk.folder / "scratch").glob("*/train/manifest.json"))) == 1  # once for all jobs and attempts

    trainings = {
        scope: [f"data.path={desk.data}", f"anchor.scope={scope}", "data.augment=flip pad_crop"] for scope in SCOPES
    }
    trainings["other seed"] = [*trainings["device"], "seed=1"]
    run_ranks(2, "slurm.undisturbed:run", str(desk.config), str(desk.folder), trainings)
    for run, scope in zip(runs, SCOPES, strict=True):
        assert desk.weights(run) == desk.weights(scope)
        assert desk.losses(run) == desk.losses(scope)
        assert len(desk.losses(run)) == end
        assert desk.weights(run) != desk.weights("other seed")
    assert desk.weights(runs[0]) != desk.weights(runs[1])


def the_time_limit_and_a_killed_rank_cost_an_attempt_each(desk: Desk) -> None:
    job = desk.submit(
        *("train", str(desk.config), f"data.path={desk.data}", f"output_dir={desk.folder}/run"),
        options=("--time=60", "--signal=B:USR1@15"),
    )
    desk.wait_steps("run", 1)
    # The next full minute in which Slurm, which looks twice a minute, still has time for the signal.
    desk.cluster.time_limit(job, (desk.cluster.seconds_run(job) + 45) // 60 + 1)
    desk.underway.set()
    desk.wait_log(job, "attempt 1: stopped at step .*; requeued")
    assert "asked to stop (SIGUSR1)" in desk.log(job)  # nobody has sent it but Slurm
    desk.cluster.time_limit(job, 60)
    desk.wait_steps("run", 15, starts=2)
    os.kill(desk.cluster.ranks(job)[1], signal.SIGKILL)
    desk.wait_log(job, "attempt 2: failed after step .*; requeued")
    desk.end_at(desk.step("run") + 10)
    assert desk.cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert len(desk.decisions(job)) == 3

    evaluation = desk.submit("evaluate", str(desk.folder / "run"), "--json")
    assert desk.cluster.wait_state(evaluation, "COMPLETED", "FAILED") == "COMPLETED"
    found, _ = json.JSONDecoder().raw_decode(desk.log(evaluation).partition("\n")[2])
    expected = json.loads((desk.folder / "run" / "evaluation.json").read_text())
    assert {name: one["correct"] for name, one in found["protocols"].items()} == {
        name: one["correct"] for name, one in expected["protocols"].items()
    }


def what_never_gets_anywhere_is_given_up(desk: Desk) -> None:
    desk.say("ulimit -v 1000000")  # a node without the memory that it takes to import PyTorch
    job = desk.submit("train", str(desk.config), f"data.path={desk.data}", f"output_dir={desk.folder}/run", nodes=1)
    assert desk.cluster.wait_state(job, "COMPLETED", "FAILED") == "FAILED"
    first, second, third = desk.decisions(job)
    assert first.startswith("attempt 1: failed") and first.endswith("; requeued")
    assert second.startswith("attempt 2: failed") and second.endswith("; requeued")
    assert third.startswith("attempt 3: failed") and third.endswith(
        "given up after 3 attempt(s) in a row without progress"
    )


def what_is_always_stopped_before_it_begins_is_given_up(desk: Desk) -> None:
    desk.say('export MAX_FAILURES=1; touch "$STOP_FILE"')
    job = desk.submit("train", str(desk.config), f"data.path={desk.data}", f"output_dir={desk.folder}/run", nodes=1)
    assert desk.cluster.wait_state(job, "COMPLETED", "FAILED") == "FAILED"
    first, second = desk.decisions(job)
    assert first.startswith("attempt 1: stopped at step 0 of") and first.endswith("; requeued")
    assert second.startswith("attempt 2: stopped at step 0 of") and "given up" in second


def what_cannot_work_is_tried_once(desk: Desk) -> None:
    job = desk.submit("train", str(desk.config), "optim.lr=-1", f"output_dir={desk.folder}/run", nodes=1)
    assert desk.cluster.wait_state(job, "COMPLETED", "FAILED") == "FAILED"
    assert "error: optim.lr must be" in desk.log(job)
    (decision,) = desk.decisions(job)
    assert decision.startswith("attempt 1: refused")


def a_cancelled_job_saves_and_stays_cancelled(desk: Desk) -> None:
    job = desk.submit("train", str(desk.config), f"data.path={desk.data}", f"output_dir={desk.folder}/run", nodes=1)
    desk.wait_steps("run", 5)
    desk.cluster.cancel(job)
    desk.wait_log(job, "attempt 1: stopped at step .*; cancelled")
    assert desk.cluster.wait_state(job, "CANCELLED", "PENDING", "RUNNING") == "CANCELLED"
    assert desk.weights("run")


def accelerate_launch_on_every_node_stops_and_resumes(desk: Desk) -> None:
    """Its data comes from where it lies first, then from the nodes' own disks."""
    desk.say(f"export LAUNCHER=accelerate DATA={desk.data}")
    job = desk.submit("train", str(desk.config), f"output_dir={desk.folder}/run")
    desk.wait_steps("run", 5)
    desk.cluster.signal(job)
    desk.wait_log(job, "attempt 1: stopped at step .*; requeued")
    desk.say(f"export OAT_SCRATCH={desk.folder}/scratch")
    desk.end_at(desk.step("run") + 5)
    assert desk.cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert len(desk.decisions(job)) == 2
    assert json.loads((desk.folder / "run" / "environment.json").read_text())["world_size"] == 2
    assert f"path: {desk.folder}/scratch/" in (desk.folder / "run" / "config.yaml").read_text()


def the_doctor_finds_nothing_wrong(desk: Desk) -> None:
    job = desk.submit("doctor", str(desk.config), f"data.path={desk.data}", f"output_dir={desk.folder}/run")
    assert desk.cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert "USR1 to the batch script made job.stop_file appear" in desk.log(job)


def images_are_packed(desk: Desk) -> None:
    table = desk.folder / "images.csv"
    table.write_text("path,label\n")
    for colour in ("red", "green"):
        Image.new("RGB", (8, 8), colour).save(desk.folder / f"{colour}.png")
        with table.open("a") as file:
            file.write(f"{colour}.png,{colour}\n")
    job = desk.submit("pack", "table", str(table), str(desk.folder / "packed"), nodes=1)
    assert desk.cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert json.loads((desk.folder / "packed" / "train" / "manifest.json").read_text())["num_samples"] == 2


def the_runs_of_a_table_are_submitted(desk: Desk) -> None:
    """What the arms share first, and they once it is trained; then there is nothing left to train."""
    table = desk.folder / "tiny.yaml"
    table.write_text(
        "title: Tiny\nconfig: configs/quickstart.yaml\nset: [epochs=2, pretrain_epochs=1, job.check_seconds=0.2]\n"
        "arms: {base: {title: base, phases: pretrain}, oat: {title: OAT}}\nbaseline: base\n"
        "cells: {digits: {title: 'of numbers'}}\n"
    )
    options = f"--output={desk.folder}/%x-%A_%a.log --cpus-per-task=1 --nodelist={desk.nodes[0]}"
    done = desk.command(
        *("reproduce", str(table), "--arms", "oat", "--seeds", "1", "--slurm", f"--slurm-options={options}"),
        *("--data", str(desk.data), "--output", str(desk.folder / "results")),
    )
    first, second = re.findall(r"^submitted job (\d+): 1 run", done, re.M)
    desk.submitted += [first, second]
    for job in (first, second):
        assert desk.cluster.wait_state(f"{job}_1", "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    sharing = Options(seeds=1, data={"": str(desk.data)})
    plan = make_plan(read_table(table), desk.folder / "results" / "tiny", sharing)
    assert all(trained_state(run) is not None for run in plan.chosen(["digits"], ["oat"]))
    assert json.loads((plan.folder / "digits/oat/0/metrics.jsonl").read_text().splitlines()[0])["start_from"]


def a_script_without_arguments_says_what_it_wants(desk: Desk) -> None:
    for script, wanted in (("train", "CONFIG"), ("sweep", "FILE CONFIG"), ("evaluate", "RUN"), ("pack", "SOURCE")):
        job = desk.submit(script, nodes=1)
        assert desk.cluster.wait_state(job, "COMPLETED", "FAILED") == "FAILED"
        assert f"launch/slurm/{script}.sbatch {wanted}" in desk.log(job).partition("usage: sbatch ")[2]


# Those at whose nodes something happens have these to themselves.
SCENARIOS: dict[Scenario, tuple[int, int]] = {
    the_time_limit_and_a_killed_rank_cost_an_attempt_each: (2, 3),
    a_sweep_is_stopped_preempted_moved_and_ends_as_if_it_had_not_been: (0, 1),
    accelerate_launch_on_every_node_stops_and_resumes: (3, 2),
    what_never_gets_anywhere_is_given_up: (3, 2),
    a_cancelled_job_saves_and_stays_cancelled: (3, 2),
    what_is_always_stopped_before_it_begins_is_given_up: (3, 2),
    what_cannot_work_is_tried_once: (3, 2),
    the_doctor_finds_nothing_wrong: (3, 2),
    images_are_packed: (3, 2),
    the_runs_of_a_table_are_submitted: (3, 2),
    a_script_without_arguments_says_what_it_wants: (3, 2),
}


@pytest.fixture(scope="module")
def campaign(
    request: pytest.FixtureRequest,
    cluster: MiniCluster,
    digits: dict[str, ShardSet],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Campaign]:
    """The scenarios whose tests were selected."""
    selected = [item.callspec.params.get("scenario") for item in request.session.items if hasattr(item, "callspec")]
    campaign = Campaign(
        cluster,
        tmp_path_factory.mktemp("jobs"),
        digits["train"].folder.parent,
        {
            scenario: tuple(cluster.nodes[number] for number in numbers)
            for scenario, numbers in SCENARIOS.items()
            if scenario in selected
        },
    )
    yield campaign
    cluster.stop()  # ends what a failed scenario may be waiting for
    campaign.close()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_jobs(campaign: Campaign, scenario: Scenario) -> None:
    campaign.result(scenario)
