"""What a run says before its first step and after its last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    """Write the report and print what was trained and where to look; or where a stopped run goes on."""
    folder = trainer.folder.path
    if not trainer.finished:
        saved = f"saved as {folder / 'checkpoints' / f'step-{trainer.step}'}" if trainer.step else "nothing to save"
        print(f"\nstopped   at step {trainer.step:,} of {trainer.total_steps:,} ({trainer.pulse.stopping}), {saved}")
        print("next      the same command goes on from there")
        return
    from oat_dist.report import write_report  # with matplotlib: a second that every rank would pay at its start

    report = write_report(folder)
    config = trainer.config
    print(
        f"\ntrained   {config.model.name}, {trainer.step:,} steps "
        f"({trainer.step / trainer.steps_per_epoch:.3g} epochs) on {trainer.world.size} process(es)"
    )
    evaluation = trainer.validation.evaluation
    if evaluation is not None:
        print(f"accuracy  on {config.data.eval_split}, {len(evaluation.labels_N):,} samples, last step:")
        for name, result in evaluation.protocols.items():
            print(f"            {name:<8} {result.accuracy:.2%}")
        left_out = 0 if trainer.data.eval_set is None else trainer.data.eval_set.num_samples - len(evaluation.labels_N)
        if left_out:
            print(f"            {left_out:,} undecodable sample(s) left out")
    best = trainer.validation.best
    if best:
        print(
            f"best      step {best['step']:,}: {best['accuracy']:.2%} ({best['protocol']}, selected on {best['split']})"
        )
    if trainer.bad:
        print(f"skipped   {len(trainer.bad)} undecodable image(s); metrics.jsonl lists them all:")
        for sample_id, reason in sorted(trainer.bad.items())[:10]:
            print(f"            {trainer.data.train_set.describe(sample_id)}: {reason}")
    print(f"weights   {folder / 'checkpoints' / f'step-{trainer.step}' / 'model.safetensors'}")
    print(f"report    {report}")
    print(f"next      python launch/evaluate.py {folder}")
