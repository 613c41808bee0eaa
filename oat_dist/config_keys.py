"""Every key of a run's configuration: its type, its default, and the `help` text that ``--help`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from oat_dist.anchor import CENTERS
from oat_dist.data.decoded_cache import DECODED_CACHES
from oat_dist.data.images.pipeline import EVAL_CROPS, TRAIN_CROPS
from oat_dist.data.images.transforms import AUGMENTATIONS
from oat_dist.data.mixing import MIXES
from oat_dist.engine.launcher import ENGINES
from oat_dist.engine.trackers import TRACKERS
from oat_dist.evaluate import PROTOCOLS
from oat_dist.oat_loss import SCOPES
from oat_dist.objectives import CLASS_WEIGHTS
from oat_dist.optim import OPTIMIZERS, SCHEDULES

__all__ = ["Config", "DataConfig", "JobConfig", "ModelConfig"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _key(default: Any, text: str) -> Any:
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelConfig:
    name: str = _key("lightweight", "lightweight, wrn_28_10 (32x32 input), or any classifier of torchvision or timm")
    weights: str | None = _key(None, "to start from: a safetensors or state-dict file, or pretrained (download)")
    freeze: str | None = _key(None, "parameters not to train: names with wildcards, by spaces; body: all but the head")
    gradient_checkpointing: bool = _key(False, "recompute activations in backward: less memory, more time (ViT, timm)")
    channels_last: bool = _key(False, "memory format of convolutions; faster on GPUs with bf16")
    compile: bool = _key(False, "torch.compile the network (not with zero3)")
    sync_batchnorm: bool = _key(True, "BatchNorm over all ranks' micro-batch; on GPUs only")


@dataclass(frozen=True)
class StreamConfig:
    urls: str = _key("", "tars as webdataset takes them: braces, URLs, pipe: and a command (which is run)")
    samples: int = _key(0, "samples that count as an epoch (required with data.mode=stream)")
    classes: int = _key(0, "number of classes; 0: those of data.eval_split")
    image_key: str | None = _key(None, "extension of the image in a sample; null: any usual one")
    label_key: str = _key("cls", "extension of the label, a whole number; json:a.b for a value inside a JSON member")
    shuffle: int = _key(1000, "samples in each rank's shuffle buffer")


@dataclass(frozen=True)
class DataConfig:
    path: str = _key("", "packed data set: the OUTPUT folder given to shards/pack.py, or its URL (required)")
    mode: str = _key("shards", "shards: indexed, in exact order; stream: a webdataset pipeline, nothing exact")
    train_split: str = _key("train", "split to train on")
    eval_split: str | None = _key("test", "split to evaluate on; null: none")
    image_size: int = _key(32, "images come to this many pixels a side")
    crop: str = _key("squash", f"how, in training: one of {', '.join(TRAIN_CROPS)} (the paper: squash)")
    crop_scale: list[float] = _key((0.08, 1.0), "random_resized_crop: share of the image's area, from and to")
    crop_ratio: list[float] = _key((0.75, 1.3333), "random_resized_crop: width over height, from and to")
    eval_crop: str = _key("squash", f"how, in evaluation: one of {', '.join(EVAL_CROPS)}")
    crop_fraction: float = _key(0.875, "center_crop: side of the square over the short side of the image")
    mean: list[float] = _key(IMAGENET_MEAN, "subtracted, per channel of 0..1")
    std: list[float] = _key(IMAGENET_STD, "divided by, per channel")
    augment: str = _key("none", f"none, or by spaces any of {', '.join(AUGMENTATIONS)} (the paper: none)")
    mix: str = _key("none", f"one of {', '.join(MIXES)}; in the cross-entropy epochs only")
    mix_alpha: float = _key(1.0, "mixup, cutmix: the share of an image is drawn from Beta(alpha, alpha)")
    drop_last: bool = _key(False, "drop the last, partial batch of an epoch (the paper keeps it)")
    on_bad: str = _key("stop", "an undecodable image: stop, or skip (it keeps its slot, masked)")
    max_bad: int = _key(100, "with on_bad=skip: stop after this many different bad images on a rank")
    workers: int = _key(2, "decoding threads of each process")
    prefetch: int = _key(8, "micro-batches decoded ahead of need")
    decoded_cache: str = _key(
        "none", f"{', '.join(DECODED_CACHES)}: keep decoded images in each process, or in cache_dir"
    )
    cache_dir: str | None = _key(
        None, "of decoded_cache=disk and remote shards; null: $OAT_DIST_CACHE, ~/.cache/oat_dist"
    )
    cache_gb: float | None = _key(None, "limit of remote shards (not of decoded images) in cache_dir; null: none")
    shuffle_shards: int | None = _key(None, "shuffle within windows of so many shards; null: the whole set at once")
    stream: StreamConfig = field(default_factory=StreamConfig)


@dataclass(frozen=True)
class OptimConfig:
    name: str = _key("sgd", f"one of {', '.join(OPTIMIZERS)}")
    lr: float = _key(0.001, "learning rate after warm-up")
    momentum: float = _key(0.9, "of sgd; starts anew at the switch to OAT")
    weight_decay: float = _key(0.0, "not applied to norms and biases")
    beta1: float = _key(0.9, "of adamw")
    beta2: float = _key(0.999, "of adamw")
    schedule: str = _key("constant", f"one of {', '.join(SCHEDULES)}; a function of the global step")
    warmup_epochs: float = _key(0.0, "linear warm-up from 0")
    step_epochs: float = _key(30.0, "schedule step: multiply by step_gamma every so many epochs")
    step_gamma: float = _key(0.1, "factor of schedule step")
    final_lr: float = _key(0.0, "schedule cosine ends here")
    clip_norm: float | None = _key(None, "clip the global gradient norm to this")
    ema: float | None = _key(
        None, "decay, such as 0.999, of a moving average of the weights: evaluated, saved as model"
    )
    oat_lr_scale: float = _key(1.0, "the OAT epochs learn at this many times the learning rate")
    head_lr_scale: float = _key(1.0, "the last layer learns at this many times the learning rate")


@dataclass(frozen=True)
class LossConfig:
    label_smoothing: float = _key(0.0, "share of a label that all classes get equally")
    logit_adjustment: float = _key(0.0, "times the log of a class's share is added to its logit (long-tailed sets: 1)")
    class_weights: str = _key("none", f"one of {', '.join(CLASS_WEIGHTS)}; balanced: inverse to the class's share")


@dataclass(frozen=True)
class AnchorConfig:
    center: str = _key("probabilities", f"what is averaged: {', '.join(CENTERS)} (the last two: fixed, as controls)")
    scope: str = _key("device", f"whose batch the anchor is of: one of {', '.join(SCOPES)}")
    span: str = _key("micro", "micro: an anchor within a micro-batch; step: over the accumulation window (two passes)")
    group_size: int = _key(32, "samples an anchor set has with scope group")
    grad: bool | None = _key(
        None,
        "gradient through the anchor; null: yes, but no for prior, controls, running means; false is better for logits",
    )
    floor: float | None = _key(
        None, "eps of the anchor floor; null: 0, but 0.2/C for center prior. logits: needs one, such as 0.2/C"
    )
    momentum: float = _key(0.0, "of a running-mean anchor (scope global, no gradient); 0: the batch's own anchor")


@dataclass(frozen=True)
class EngineConfig:
    name: str | None = _key(None, f"one of {', '.join(ENGINES)}; null: what accelerate launch says, else ddp")
    deepspeed: str | None = _key(None, "DeepSpeed JSON file with further settings (configs/deepspeed/)")
    precision: str | None = _key(None, "no (fp32) or bf16; null: what accelerate launch says, else no")
    processes: int | None = _key(None, "refuse to start with another number of processes; null: any")
    threads: int | None = _key(None, "CPU threads of each process; null: its share of the machine's cores")
    timeout_minutes: float = _key(30.0, "no step for so long is a hang: every rank prints its stack and stops")


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: int = _key(1, "save after every so many epochs; 0: only at the end")
    every_steps: int = _key(0, "save every so many steps; 0: never")
    every_minutes: float = _key(0.0, "save when so much time has passed since the last one; 0: never")
    keep: int = _key(2, "newest checkpoints to keep; the best one is kept besides")


@dataclass(frozen=True)
class JobConfig:
    stop_signals: list[str] = _key(("USR1", "TERM", "INT"), "on one of these, to any rank: save, and end with status 0")
    stop_file: str | None = _key(None, "the same once this file appears (the SLURM scripts touch it)")
    check_seconds: float = _key(1.0, "how often the ranks agree whether to stop")
    outcome_file: str | None = _key(None, "rank 0 writes here how the run ended: finished, stopped, refused or failed")
    take_over: bool = _key(False, "fence off an older start of this run that still lives, instead of being refused")


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: int = _key(1, "evaluate after every so many epochs; 0: only at the end")
    batch_size: int = _key(256, "forward batch of each process; changes speed only, never the answer")
    group_size: int = _key(32, "protocol batch: samples that share an anchor")
    seed: int = _key(0, "protocol batch: seed of the permutation that forms the groups")
    protocol: str = _key(
        "batch", f"chooses the best checkpoint of OAT: {', '.join(PROTOCOLS)}; center prior: also balanced"
    )


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = _key(50, "steps between lines of metrics.jsonl")
    trackers: str = _key("none", f"none, all (those installed), or by spaces any of {', '.join(TRACKERS)}")
    project: str = _key("oat_dist", "trackers list the run under this name")
    profile_steps: str | None = _key(None, "first and last step to profile, such as 10-15: a trace in RUN/profile")
    profile_all_ranks: bool = _key(False, "profile every rank, not rank 0 alone")


@dataclass(frozen=True)
class Config:
    output_dir: str = _key("", "run folder (required); training resumes from its newest valid checkpoint")
    start_from: str | None = _key(
        None, "begin as a copy of another run: its folder (newest checkpoint) or one checkpoint"
    )
    batch_size: int = _key(32, "global batch: samples of one optimizer step over all processes")
    micro_batch_size: int | None = _key(None, "most samples a process holds at once; null: its whole share")
    epochs: int = _key(100, "total epochs, pre-training included")
    pretrain_epochs: int = _key(10, "first epochs, with cross-entropy; equal to epochs: no OAT at all")
    max_steps: int | None = _key(None, "stop after this many steps; null: after all epochs")
    seed: int = _key(0, "of initialisation, order and augmentation")
    deterministic: bool = _key(False, "deterministic kernels on GPUs (slower); CPU runs always are")
    resume: bool = _key(True, "false: refuse a run folder that holds a run instead of resuming it")
    dry_run: bool = _key(False, "print model, batch layout and steps, and stop")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    job: JobConfig = field(default_factory=JobConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
