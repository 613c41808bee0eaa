"""What a run says before its first step and after its last one."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from oat_dist.errors import OatError
from oat_dist.pace import in_words

if TYPE_CHECKING:
    from oat_dist.trainer import Trainer

__all__ = ["describe_layout", "finish_run"]


def describe_layout(trainer: Trainer) -> str:
    """Model, batch layout and steps, for ``dry_run=true``."""
    config, layout = trainer.config, trainer.data.loader.layout
    full = layout.deal(min(config.batch_size, trainer.data.train_set.num_samples))
    lines = [
        str(trainer.network),
        "",
        f"model            {config.model.name}, {trainer.num_parameters:,} parameters, {len(trainer.classes)} classes",
        f"data             {trainer.data.train_set.where}: {trainer.data.train_set.num_samples:,} samples",
        f"processes        {trainer.world.size} on {trainer.world.device.type}, engine {trainer.engine.name}, "
        f"precision {trainer.engine.precision}",
        f"global batch     {config.batch_size}, in {len(full)} micro-batch(es)",
    ]
    for number, parts in enumerate(full):
        shares = ", ".join(str(len(part)) for part in parts)
        lines.append(f"  micro-batch {number}  samples by rank: {shares}")
    short = trainer.data.train_set.num_samples % config.batch_size
    if short:
        fate = "dropped" if config.data.drop_last else "kept"
        lines.append(f"last batch       {short} samples, {fate}")
    oat_steps = max(trainer.total_steps - trainer.pretrain_steps, 0)
    lines += [
        f"steps            {trainer.steps_per_epoch:,} an epoch, {trainer.total_steps:,} in all: "
        f"{trainer.total_steps - oat_steps:,} cross-entropy, then {oat_steps:,} OAT",
        f"anchor           center {config.anchor.center}, scope {config.anchor.scope}, span {config.anchor.span}",
    ]
    return "\n".join(lines)


def finish_run(trainer: Trainer) -> None:
    """Print what was trained and how good it is, write the report, say what to do next; or where a stopped run goes on.

    What is printed stands before the report is written: that takes a moment, and may fail.
    """
    folder = trainer.folder.path
    if not trainer.finished:
        saved = f"saved as {folder / 'checkpoints' / f'step-{trainer.step}'}" if trainer.step else "nothing to save"
        print(f"\nstopped   at step {trainer.step:,} of {trainer.total_steps:,} ({trainer.pulse.stopping}), {saved}")
        print("next      the same command goes on from there")
        return
    print("\n" + "\n".join(_trained(trainer) + _accuracies(trainer) + _best(trainer) + _skipped(trainer)))
    averaged = "" if trainer.average.decay is None else f" (EMA {trainer.average.decay:g})"
    print(f"weights   {folder / 'checkpoints' / f'step-{trainer.step}' / 'model.safetensors'}{averaged}", flush=True)
    from oat_dist.report import write_report  # with matplotlib: a second that every rank would pay at its start

    try:
        print(f"report    {write_report(folder)}")
    except (OatError, OSError) as error:  # the training is whole all the same
        print(f"report    not written ({error}); mend that, then: oat-dist report {shlex.quote(str(folder))}")
    print("\n".join(_next(trainer)))


def _trained(trainer: Trainer) -> list[str]:
    config, engine, epoch = trainer.config, trainer.engine, trainer.steps_per_epoch
    before = min(trainer.step, trainer.pretrain_steps) / epoch
    after = trainer.step / epoch - before
    parts = [f"{count:.3g} of {name}" for count, name in ((before, "cross-entropy"), (after, "OAT")) if count]
    first, lines = trainer.log.pace.first, []
    if first < trainer.step:
        since = f" since step {first:,}" if first else ""
        lines = [f"in {in_words(trainer.log.pace.elapsed())}{since}"]
    precision = "fp32" if engine.precision == "no" else engine.precision
    lines.append(f"engine {engine.name}, {precision}, on {trainer.world.device.type}")
    return [
        f"trained   {config.model.name}, {trainer.step:,} steps ({trainer.step / epoch:.3g} epochs) "
        f"on {trainer.world.size} process(es)",
        f"          {', '.join(parts)}; {'; '.join(lines)}",
        *([f"          begun as a copy of {trainer.start_from}"] if trainer.start_from else []),
    ]


def _accuracies(trainer: Trainer) -> list[str]:
    """Of the last step, by protocol, as evaluation.json has them."""
    if trainer.validation.evaluation is None:
        return []
    found = json.loads((trainer.folder.path / "evaluation.json").read_text())
    lines = [f"accuracy  on {found['split']}, {found['total']:,} samples, last step, with 95 % intervals:"]
    for name, one in found["protocols"].items():
        low, high = one["interval"]
        line = f"            {name:<8} {one['accuracy']:.2%}  ({100 * low:.2f} to {100 * high:.2f})"
        if "seeds" in one:
            seeds = one["seeds"]
            line += f", {100 * seeds['min']:.2f} to {100 * seeds['max']:.2f} over {seeds['count']} seeds"
        lines.append(line)
    if found["undecodable"]:
        lines.append(f"            {found['undecodable']:,} undecodable sample(s) left out")
    return lines


def _best(trainer: Trainer) -> list[str]:
    best = trainer.validation.best
    if not best:
        return []
    chosen, split = best["protocol"], best["split"]
    lines = [f"best      step {best['step']:,}: {best['accuracy']:.2%} ({chosen}, selected on {split})"]
    if best["step"] != trainer.step:  # else they stand above
        others = {name: value for name, value in best.get("accuracies", {}).items() if name != chosen}
        lines += [f"            {name:<8} {value:.2%}" for name, value in others.items()]
    return lines


def _skipped(trainer: Trainer) -> list[str]:
    if not trainer.bad:
        return []
    return [
        f"skipped   {len(trainer.bad)} undecodable image(s); metrics.jsonl lists them all:",
        *(
            f"            {trainer.data.train_set.describe(key)}: {why}"
            for key, why in sorted(trainer.bad.items())[:10]
        ),
    ]


def _next(trainer: Trainer) -> list[str]:
    run = shlex.quote(str(trainer.folder.path))
    other = trainer.validation.best.get("step", trainer.step) != trainer.step
    commands = [
        *([] if trainer.data.eval_set is None else [f"oat-dist evaluate {run}{' --checkpoint best' if other else ''}"]),
        f"oat-dist predict {run} IMAGE...",
        f"oat-dist export {run} FOLDER",
    ]
    return [f"{'' if number else 'next':<10}{command}" for number, command in enumerate(commands)]
