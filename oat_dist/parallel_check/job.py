"""What is compared with what: layouts, their anchor sets, and which of them share a reference."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from oat_dist.config import Config
from oat_dist.data.plan import Layout, Part
from oat_dist.errors import ConfigError

__all__ = ["Case", "Job", "case_config", "check_config", "plan_job", "read_job", "write_job"]

_FILE = "job.json"

# [start, stop) in a global batch; lists rather than tuples because they travel as JSON.
Rows = list[int]


@dataclass(frozen=True)
class Case:
    """One layout of the same global batches.

    Attributes:
        parts: [step][micro-batch][rank].
        sets: [step][evaluation of the objective][rank][anchor set]; empty for cross-entropy.
        collectives: ours in every step.
        reference: number of the reference that has the same anchor sets.
    """

    name: str
    micro_batch_size: int | None
    span: str
    parts: list[list[list[Rows]]]
    sets: list[list[list[list[Rows]]]]
    collectives: list[int]
    reference: int


@dataclass(frozen=True)
class Job:
    """Everything that reference and ranks are to do.

    Attributes:
        objective: "oat" or "cross_entropy".
        batches: [step]: (epoch, first position, end) of each global batch.
        cases: the first is the layout as configured.
        references: [reference][step][anchor set].
        wrong_scope: the scope that the first control puts in place of the configured one; None: no anchors.
    """

    processes: int
    objective: str
    batches: list[list[int]]
    cases: list[Case]
    references: list[list[list[Rows]]]
    wrong_scope: str | None


def check_config(config: Config) -> tuple[Config, list[str]]:
    """The configuration under which exactness can be expected, and a note on each thing that differs.

    Raises:
        ConfigError: data that no two runs see alike.
    """
    notes = []
    if config.data.mode == "stream":
        raise ConfigError("data.mode=stream draws other samples in every run; use data.mode=shards (oat-dist index)")
    if config.data.mix != "none":
        notes.append(f"data.mix={config.data.mix}: left out of the check")
    if config.engine.precision == "bf16":
        notes.append("engine.precision=bf16: checked in fp32, where a difference shows")
    if config.optim.name != "sgd":
        notes.append(
            f"optim.name={config.optim.name}: checked with sgd, whose steps are as exact as its gradients; "
            f"{config.optim.name} makes whole steps of rounding errors where a gradient is zero"
        )
    if config.optim.ema is not None:
        notes.append(f"optim.ema={config.optim.ema}: left out of the check; it is a function of the weights alone")
    if config.model.compile:
        notes.append("model.compile: left out of the check")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, compile=False),
        data=dataclasses.replace(config.data, eval_split=None, mix="none"),
        optim=dataclasses.replace(config.optim, name="sgd", ema=None),
        engine=dataclasses.replace(config.engine, name=None, deepspeed=None, precision="no", processes=None),
    ), notes


def plan_job(config: Config, num_samples: int, processes: int, steps: int) -> tuple[Job, list[str]]:
    """List the layouts to compare, and say which are impossible here.

    Raises:
        ConfigError: the configured layout is impossible on so many ranks.
    """
    notes: list[str] = []
    layouts = _layouts(config, processes, notes)
    objective = "oat" if config.pretrain_epochs < config.epochs else "cross_entropy"
    first = layouts[0][1]
    per_epoch = first.steps(num_samples)
    batches = [[step // per_epoch, *first.batch_range(step % per_epoch, num_samples)] for step in range(steps)]
    references: list[list[list[Rows]]] = []
    cases = []
    for name, layout, span in layouts:
        parts = [[[_rows(part) for part in micro] for micro in layout.deal(stop - start)] for _, start, stop in batches]
        sets = [_sets(dealt, config, span) if objective == "oat" else [] for dealt in parts]
        reference = [_distinct(step) for step in sets]
        if reference not in references:
            references.append(reference)
        ours = [len(step) if config.anchor.scope == "global" else 0 for step in sets]
        counted = int(config.data.on_bad == "skip")  # N is then summed over the ranks
        cases.append(
            Case(
                name=name,
                micro_batch_size=layout.micro_batch_size,
                span=span,
                parts=parts,
                sets=sets,
                collectives=[number + counted for number in ours],
                reference=references.index(reference),
            )
        )
    wrong = None if objective != "oat" else "device" if config.anchor.scope == "global" else "global"
    return Job(processes, objective, batches, cases, references, wrong), notes


def case_config(config: Config, case: Case) -> Config:
    anchor = dataclasses.replace(config.anchor, span=case.span)
    return dataclasses.replace(config, micro_batch_size=case.micro_batch_size, anchor=anchor)


def write_job(folder: Path, job: Job) -> None:
    (folder / _FILE).write_text(json.dumps(dataclasses.asdict(job)))


def read_job(folder: Path) -> Job:
    values = json.loads((folder / _FILE).read_text())
    return Job(**{**values, "cases": [Case(**case) for case in values["cases"]]})


def _layouts(config: Config, processes: int, notes: list[str]) -> list[tuple[str, Layout, str]]:
    """(name, layout, span): the configured layout, then whole shares and micro-batches under either span."""
    unit = config.anchor.group_size if config.anchor.scope == "group" else 1

    def layout(micro_batch_size: int | None, span: str) -> Layout:
        return Layout(
            config.batch_size,
            processes,
            micro_batch_size,
            unit=unit,
            drop_last=config.data.drop_last,
            whole_shares=span == "step",
        )

    configured = (config.micro_batch_size, config.anchor.span)
    whole = (None, config.anchor.span)
    share = layout(*whole).largest_part
    accumulates = len(layout(*configured).deal(config.batch_size)) > 1
    wanted = [configured, whole] if accumulates else [configured]
    oat = config.pretrain_epochs < config.epochs
    for span in dict.fromkeys((config.anchor.span, "step") if oat else (config.anchor.span,)):
        half = -(-share // 2)
        if span == "micro":
            half = -(-half // unit) * unit
        micro_batch_size = config.micro_batch_size if accumulates else half
        if not accumulates and half >= share:
            notes.append(f"span {span}: a rank's share of {share} cannot be cut in two, so there is no accumulation")
        elif (micro_batch_size, span) not in wanted:
            wanted.append((micro_batch_size, span))
    found = []
    for micro_batch_size, span in wanted:
        number = len(layout(micro_batch_size, span).deal(config.batch_size))
        name = "whole share" if number == 1 else f"{number} micro-batches, span {span}"
        found.append((name, layout(micro_batch_size, span), span))
    return found


def _sets(dealt: list[list[Rows]], config: Config, span: str) -> list[list[list[Rows]]]:
    """The anchor sets [evaluation of the objective][rank] of one global batch."""
    if span == "step":  # each rank's share as a whole
        dealt = [[[parts[0][0], parts[-1][1]] for parts in zip(*dealt, strict=True)]]
    calls = []
    for parts in dealt:
        if config.anchor.scope == "global":
            calls.append([[[parts[0][0], parts[-1][1]]] for _ in parts])
        elif config.anchor.scope == "device":
            calls.append([[part] if part[0] < part[1] else [] for part in parts])
        else:
            size = config.anchor.group_size
            calls.append(
                [[[first, min(first + size, stop)] for first in range(start, stop, size)] for start, stop in parts]
            )
    return calls


def _distinct(calls: list[list[list[Rows]]]) -> list[Rows]:
    """Every anchor set of one global batch once, in order."""
    return [list(rows) for rows in sorted({(start, stop) for call in calls for own in call for start, stop in own})]


def _rows(part: Part) -> Rows:
    return [part.start, part.stop]
