"""What each rank does for test_training.py: whole runs of the real trainer, many of them in one set of processes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from oat_dist.anchor import CENTERS
from oat_dist.commands.evaluate import _evaluate, _forward, add_arguments
from oat_dist.commands.evaluation_subject import Subject
from oat_dist.config import load_config
from oat_dist.distributed import counts
from oat_dist.engine import Engine, start_engine
from oat_dist.errors import OatError
from oat_dist.evaluate import judge
from oat_dist.optimizer_state import load_optimizer, optimizer_tensors
from oat_dist.trainer import Trainer

BASE = """\
output_dir: unset
batch_size: 48
epochs: 3
pretrain_epochs: 1
data: {path: unset, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
optim: {lr: 0.01}
anchor: {scope: global}
checkpoint: {keep: 2}
eval: {every_epochs: 2}
log: {every_steps: 8}
"""
TEN = ("anchor.group_size=4", "pretrain_epochs=0")
STEPS_PER_EPOCH = 30  # 1,438 digits in batches of 48


def fit(engine: Engine, root: Path, data: str, name: str, *overrides: str) -> Trainer:
    if engine.world.is_main:
        (root / "base.yaml").write_text(BASE)
    engine.world.all_agree(True)
    config = load_config(root / "base.yaml", [f"output_dir={root / name}", f"data.path={data}", *overrides])
    trainer = Trainer(config, engine)
    trainer.fit()
    return trainer


def fit_one(root_text: str, data: str, name: str, overrides: list[str]) -> None:
    """One run on the ranks that call it."""
    engine = start_engine(threads=1)
    fit(engine, Path(root_text), data, name, *overrides)
    engine.close()


def fit_in_two(engine: Engine, root: Path, data: str, name: str, stop: int, *overrides: str) -> None:
    """Stop after `stop` steps, then start again with the same command."""
    fit(engine, root, data, name, *overrides, f"max_steps={stop}")
    torch.manual_seed(99)  # the second start must not profit from random numbers left by the first
    fit(engine, root, data, name, *overrides)


def campaign(root_text: str, data: str, url: str) -> dict[str, Any]:
    """Every run that the tests of one world size look at, in folders of `root_text`. `url` serves what is in `data`."""
    root = Path(root_text)
    engine = start_engine(threads=1)
    found: dict[str, Any] = {}
    fit(engine, root, data, "whole")
    for stop in (STEPS_PER_EPOCH, STEPS_PER_EPOCH + 11):  # at the switch to OAT, and inside an epoch
        fit_in_two(engine, root, data, f"resumed-{stop}", stop)
    adamw = (
        *("optim.name=adamw", "optim.lr=0.001", "optim.clip_norm=1.0", "epochs=2"),
        *("data.augment=flip pad_crop trivialaugment", "data.mix=cutmix", "data.decoded_cache=ram"),
    )
    fit(engine, root, data, "adamw", *adamw)
    fit_in_two(engine, root, data, "adamw-resumed", 17, *adamw)
    # BatchNorm, dropout and a rank with an odd share
    norm = (
        "model.name=mobilenet_v3_small",
        "epochs=1",
        "pretrain_epochs=0",
        "data.drop_last=true",
        "batch_size=239",
        "anchor.scope=device",
        "data.eval_split=null",
        "optim.ema=0.99",
    )
    fit(engine, root, data, "norm", *norm)
    fit_in_two(engine, root, data, "norm-resumed", 3, *norm)
    for scope in ("global", "group"):
        fit(
            engine,
            root,
            data,
            f"ten-{scope}",
            f"anchor.scope={scope}",
            "anchor.group_size=4",
            "pretrain_epochs=0",
            "max_steps=10",
            "data.decoded_cache=disk",  # one file, which all ranks fill
            f"data.cache_dir={root / 'cache'}",
        )
    fit(engine, root, data, "ten-ema", *TEN, "max_steps=10", "optim.ema=0.9")
    crops = ("data.crop=random_resized_crop", "data.augment=flip randaugment")
    fit(
        engine, root, data, "ten-mixed", "batch_size=47", "micro_batch_size=8", "max_steps=10", "data.mix=mixup", *crops
    )
    fit(
        engine,
        root,
        data,
        "ten-accumulated",
        "anchor.scope=group",
        "anchor.group_size=4",
        "pretrain_epochs=0",
        "max_steps=10",
        "micro_batch_size=4",
    )
    fit(
        *(engine, root, data, "ten-balanced", "max_steps=10", "micro_batch_size=9"),
        *("loss.class_weights=balanced", "loss.label_smoothing=0.1"),
    )
    running = ("pretrain_epochs=0", "anchor.center=prior", "anchor.momentum=0.9", "max_steps=10")
    fit(engine, root, data, "ten-running", *running)
    fit_in_two(engine, root, data, "running-resumed", 4, *running)
    cache = f"data.cache_dir={root / 'cache'}"
    remote = (f"data.path={url}", "anchor.scope=global", *TEN, "max_steps=10", cache)
    fit(engine, root, data, "ten-remote", *remote)
    fit(engine, root, data, "ten-windows", *remote, "data.shuffle_shards=2")
    found["streamed"] = fit(
        engine,
        root,
        data,
        "streamed",
        "data.mode=stream",
        f"data.stream.urls={data}/train/train-{{000000..000002}}.tar",
        "data.stream.samples=470",
        "epochs=1",
    ).step
    # the last batch of an epoch has one sample: all ranks but one are idle in it
    fit(engine, root, data, "one-left", "batch_size=1437", "epochs=2", "pretrain_epochs=0")
    found["switch"] = switch(engine, root, data)
    # copies of other runs: inside OAT, at the switch to it, and (the control) one that goes on otherwise from there
    fit(
        engine,
        root,
        data,
        "copy-inside",
        f"start_from={root / 'whole' / 'checkpoints' / f'step-{2 * STEPS_PER_EPOCH}'}",
    )
    at_switch = f"start_from={root / 'switch' / 'checkpoints' / f'step-{STEPS_PER_EPOCH}'}"
    fit_in_two(engine, root, data, "copy-at-switch", STEPS_PER_EPOCH + 5, at_switch, "epochs=2")
    fit(engine, root, data, "copy-otherwise", at_switch, "anchor.grad=false", f"max_steps={STEPS_PER_EPOCH + 1}")
    for name, override in (
        ("other order", "seed=1"),
        ("beyond", "anchor.grad=false"),
        ("nothing there", at_switch + "0"),
    ):
        try:
            fit(engine, root, data, "uncopied", f"start_from={root / 'whole'}", override)
        except OatError as error:
            found[name] = str(error)
    found["uncopied"] = sorted(path.name for path in (root / "uncopied" / "checkpoints").glob("step-*"))
    counts.clear()
    trainer = fit(
        engine,
        root,
        data,
        "counted",
        "batch_size=144",
        "epochs=1",
        "pretrain_epochs=0",
        "anchor.scope=device",
        "data.eval_split=null",
        "log.every_steps=100",
    )
    found["collectives device"] = [counts["all_reduce"], trainer.step]
    counts.clear()
    trainer = fit(
        engine,
        root,
        data,
        "counted-global",
        "batch_size=144",
        "epochs=1",
        "pretrain_epochs=0",
        "anchor.scope=global",
        "data.eval_split=null",
        "log.every_steps=100",
    )
    found["collectives global"] = [counts["all_reduce"], trainer.step]
    fit(engine, root, data, "minutes", "checkpoint.every_minutes=1e-9", "checkpoint.keep=9", "max_steps=20")
    try:
        fit(engine, root, data, "diverged", "anchor.center=logits", "optim.lr=1000", "checkpoint.every_steps=5")
    except OatError as error:
        found["diverged"] = str(error)
    # nothing was saved: the folder takes another configuration, as the message advises
    for name, overrides in (
        ("at once", ("anchor.center=logits", "optim.lr=1e9", "pretrain_epochs=0")),
        ("in the last step", ("optim.lr=1e38", "max_steps=1")),
    ):
        try:
            fit(engine, root, data, "fresh", *overrides)
        except OatError as error:
            found[name] = str(error)
    found["saved"] = sorted(path.name for path in (root / "fresh" / "checkpoints").glob("step-*"))
    fit(engine, root, data, "fresh", "max_steps=3")
    # a run stopped by a damaged checkpoint only
    fit(engine, root, data, "hurt", "max_steps=3")
    engine.world.all_agree(True)
    if engine.world.is_main:
        (root / "hurt" / "checkpoints" / "step-3" / "state.json").write_text("{}")
    engine.world.all_agree(True)
    try:
        fit(engine, root, data, "hurt")
    except OatError as error:
        found["hurt"] = str(error)
    # a copy that a user has put there is no checkpoint: the run starts, from its initial weights
    if engine.world.is_main:
        (root / "copied" / "checkpoints" / "step-3-backup").mkdir(parents=True)
    engine.world.all_agree(True)
    found["copied"] = fit(engine, root, data, "copied", "max_steps=3").step
    if engine.world.is_main:
        (root / "copied" / "config.yaml").unlink()
    engine.world.all_agree(True)
    try:
        fit(engine, root, data, "copied", "max_steps=4")
    except OatError as error:
        found["no config"] = str(error)
    # started again with fewer steps than it has done, before any evaluation
    fit(engine, root, data, "short", "max_steps=3", "data.eval_split=null")
    trainer = fit(engine, root, data, "short", "max_steps=2", "data.eval_split=null")
    found["short"] = trainer.step
    try:
        fit(engine, root, data, "whole", "seed=1")
    except OatError as error:
        found["other config"] = str(error)
    engine.close()
    return found


def switch(engine: Engine, root: Path, data: str) -> dict[str, bool]:
    """The first OAT step of a real run, against the same step taken by hand with new and with old momentum."""
    trainer = fit(engine, root, data, "switch", f"max_steps={STEPS_PER_EPOCH}")
    weights_before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    momentum = optimizer_tensors(trainer.replica.optimizer, trainer.network)
    assert any(key.startswith("momentum_buffer/") for key in momentum)
    after = {}
    for name, kept in (("new", {}), ("old", {key: value.clone() for key, value in momentum.items()})):
        trainer.network.load_state_dict(weights_before)
        load_optimizer(trainer.replica.optimizer, trainer.network, kept)
        trainer.train_step(next(trainer.data.loader.windows(STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1)))
        trainer.meter.restart()
        after[name] = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    fit(engine, root, data, "switch", f"max_steps={STEPS_PER_EPOCH + 1}")
    real = weights(root / "switch", STEPS_PER_EPOCH + 1)
    return {name: all(torch.equal(real[key], one[key]) for key in real) for name, one in after.items()}


def ten_until(root_text: str, data: str, name: str, stop: int) -> None:
    """The run `ten-global` of `campaign`, up to `stop` steps: other numbers of ranks go on."""
    engine = start_engine(threads=1)
    fit(engine, Path(root_text), data, name, *TEN, "anchor.scope=global", f"max_steps={stop}")
    engine.close()


def evaluate(run: str) -> dict[str, Any]:
    """Predicted labels by forward batch size, center of the anchors ("": cross-entropy) and protocol; on rank 0."""
    engine = start_engine(threads=1)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args([run])
    subject = Subject.load(arguments.run, None, arguments, engine.world)
    shards = subject.open_split(engine.world)
    prior_C = torch.arange(1, len(subject.classes) + 1, dtype=torch.float64)
    found: dict[str, Any] = {}
    for batch_size in (1, 32, 100, 1000):
        outputs = _forward(subject, shards, batch_size, engine.world)
        for center in (None, *CENTERS) if outputs is not None else ():
            settings = {"stored_anchor_C": subject.stored_anchor_C, "prior_C": prior_C / prior_C.sum()}
            settings |= {"shares_C": prior_C / prior_C.sum(), "adjusted": 0.5}
            evaluation = judge(outputs, center=center, **settings)
            found.setdefault(str(batch_size), {})[center or ""] = {
                name: {"labels": result.predicted_N.tolist(), "ties": result.ties}
                for name, result in evaluation.protocols.items()
            }
    command = _evaluate(arguments, engine.world)  # what a user gets, of the center it was trained with
    if command is not None:
        found["command"] = {name: r.predicted_N.tolist() for name, r in command.evaluation.protocols.items()}
    engine.close()
    return found


def bf16(root_text: str, data: str) -> list[float]:
    """Losses of a short run in bf16."""
    engine = start_engine(threads=1, precision="bf16")
    trainer = fit(engine, Path(root_text), data, "bf16", "engine.precision=bf16", "epochs=1", "pretrain_epochs=0")
    assert next(trainer.network.parameters()).dtype == torch.float32
    engine.close()
    return [float(value.norm()) for value in weights(Path(root_text) / "bf16").values()]


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    name = (run / "checkpoints" / "latest").read_text().strip() if step is None else f"step-{step}"
    return load_file(run / "checkpoints" / name / "model.safetensors")
