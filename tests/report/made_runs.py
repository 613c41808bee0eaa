"""Run folders made by hand on a real packed set: every file a training leaves, with numbers that fit each other."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from oat_dist.data.index import ShardSet
from oat_dist.measures import accuracy_intervals, confusion_cells

OAT_PROTOCOLS = ("batch", "single", "dataset", "stored")
STEPS_PER_EPOCH, LOG_EVERY, BATCH = 20, 5, 32


@dataclass(frozen=True)
class Made:
    """What is made: `oat` trains with OAT after `pretrain` epochs; `skill` is the accuracy at its end."""

    oat: bool = True
    seed: int = 0
    epochs: int = 24
    pretrain: int = 4
    skill: float = 0.8
    data: Path | None = None


def make_run(folder: Path, shards: ShardSet, made: Made) -> Path:
    """Write a finished run whose evaluation split is `shards`; the same arguments make the same files."""
    folder.mkdir(parents=True)
    pretrain = made.pretrain if made.oat else made.epochs
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(folder, shards, made, pretrain), sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(_environment(shards)))
    rng = np.random.default_rng([made.seed, made.oat])
    lines = _log(made, pretrain, shards, rng)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _evaluate(folder, shards, made, lines)
    return folder


def answers(shards: ShardSet, made: Made, protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes (N,) and their probabilities: hard samples are hard for every run, neighbours are confused."""
    labels_N = shards.index.label.astype(np.int64)
    classes, samples = len(shards.classes), len(labels_N)
    hard_N = np.random.default_rng(7).random(samples)
    own = np.random.default_rng([made.seed, made.oat, OAT_PROTOCOLS.index(protocol) if made.oat else 9])
    wrong_N = 0.75 * hard_N + 0.25 * own.random(samples) > np.quantile(
        0.75 * hard_N + 0.25 * own.random(samples), made.skill
    )
    shift_N = np.where(own.random(samples) < 0.7, 1, own.integers(1, max(2, classes), samples))
    predicted_N = np.where(wrong_N, (labels_N + shift_N) % classes, labels_N)
    return predicted_N.astype(np.int32), (1 - 0.6 * hard_N).astype(np.float32)


def _config(folder: Path, shards: ShardSet, made: Made, pretrain: int) -> dict[str, Any]:
    data = made.data if made.data is not None else shards.folder.parent
    return {
        "output_dir": f"runs/{folder.name}",
        "batch_size": BATCH,
        "epochs": made.epochs,
        "pretrain_epochs": pretrain,
        "seed": made.seed,
        "model": {"name": "lightweight", "weights": None},
        "data": {"path": str(data), "train_split": "train", "eval_split": shards.folder.name, "augment": "none"},
        "optim": {"lr": 0.01},
        "anchor": {"center": "probabilities", "scope": "global"},
        "eval": {"protocol": "batch", "seed": 0},
    }


def _environment(shards: ShardSet) -> dict[str, Any]:
    return {
        "command": "launch/train.py configs/made.yaml",
        "started": "2026-11-03T10:00:00+00:00",
        "oat_dist": "0.1.0",
        "torch": "2.9.1",
        "device": "cpu",
        "engine": "ddp",
        "precision": "no",
        "world_size": 2,
        "threads": 1,
        "parameters": 62006,
        "eval_samples": shards.num_samples,
        "eval_digest": shards.digest,
        "train_digest": None,
    }


def _log(made: Made, pretrain: int, shards: ShardSet, rng: np.random.Generator) -> list[dict[str, Any]]:
    classes, total = len(shards.classes), shards.num_samples
    began = 1793700000.0
    lines: list[dict[str, Any]] = [{"event": "start", "step": 0, "time": began}]
    for step in range(LOG_EVERY, made.epochs * STEPS_PER_EPOCH + 1, LOG_EVERY):
        oat = step > pretrain * STEPS_PER_EPOCH
        phase = "oat" if oat else "cross_entropy"
        line: dict[str, Any] = {"step": step, "epoch": (step - 1) // STEPS_PER_EPOCH, "phase": phase}
        into = step - pretrain * STEPS_PER_EPOCH if oat else step
        start, end = (7.0, 4.5) if oat else (2.3, 0.6)
        line["loss"] = end + (start - end) * math.exp(-into / 90) + 0.08 * rng.standard_normal()
        line |= {"lr": 0.01, "samples_per_s": 1700 - 90 * oat + 40 * rng.standard_normal()}
        line |= {"data_wait": 0.05 + 0.01 * rng.random(), "seconds": LOG_EVERY * BATCH / line["samples_per_s"]}
        line |= {"memory_gb": 0.61, "fingerprint": f"{(step * 0x9E3779B97F4A7C15 + made.seed) % 2**64:016x}"}
        if oat:
            line |= {"anchor_min": 0.08, "anchor_max": 0.13, "anchor_entropy": 2.28, "grad_norm": 1.5}
        lines.append(line)
        if step % STEPS_PER_EPOCH:
            continue
        epoch = step // STEPS_PER_EPOCH
        if oat:
            anchor_C = 1 + 0.2 * np.sin(np.arange(classes) + epoch / 12)
            lines.append({"step": step, "epoch": epoch, "phase": phase, "anchor": (anchor_C / anchor_C.sum()).tolist()})
        for number, protocol in enumerate(OAT_PROTOCOLS if oat else ("argmax",)):
            share = made.skill * (1 - math.exp(-epoch / 4)) + 0.012 * rng.standard_normal() - 0.002 * number
            correct = round(total * min(1.0, max(0.0, share)))
            counts = {"accuracy": correct / total, "correct": correct, "total": total, "seconds": 1.25}
            where = {"step": step, "epoch": epoch, "phase": phase, "split": shards.folder.name}
            lines.append(where | {"protocol": protocol} | counts)
    last = made.epochs * STEPS_PER_EPOCH
    lines.append({"event": "finished", "step": last, "time": began + 3725.0 + 11 * made.seed})
    return lines


def _evaluate(folder: Path, shards: ShardSet, made: Made, lines: list[dict[str, Any]]) -> None:
    """evaluation.json and evaluation.safetensors of the last step, and its accuracies into the log's last lines."""
    labels_N = shards.index.label.astype(np.int64)
    classes, last = len(shards.classes), made.epochs * STEPS_PER_EPOCH
    facts: dict[str, Any] = {"protocols": {}, "per_class": {}, "confusion": {}}
    tensors = {"ids": np.arange(len(labels_N)), "labels": labels_N.astype(np.int32)}
    total_C = np.bincount(labels_N, minlength=classes)
    for protocol in OAT_PROTOCOLS if made.oat else ("argmax",):
        predicted_N, confidence_N = answers(shards, made, protocol)
        right_C = np.bincount(labels_N[predicted_N == labels_N], minlength=classes)
        share_C = [r / t if t else None for r, t in zip(right_C.tolist(), total_C.tolist(), strict=True)]
        interval, balanced = accuracy_intervals(total_C, right_C)
        accuracy = float(right_C.sum() / total_C.sum())
        facts["protocols"][protocol] = {
            "accuracy": accuracy,
            "interval": interval,
            "correct": int(right_C.sum()),
            "total": len(labels_N),
            "top5": min(1.0, accuracy + 0.15) if classes > 5 else None,
            "balanced_accuracy": float(np.mean([share for share in share_C if share is not None])),
            "balanced_interval": balanced,
            "brier": 0.31,
            "ties": [3] if protocol == "batch" else [],
        }
        facts["per_class"][protocol] = share_C
        facts["confusion"][protocol] = confusion_cells(labels_N, predicted_N, classes)
        tensors |= {f"predicted.{protocol}": predicted_N, f"confidence.{protocol}": confidence_N}
        if protocol == "batch":
            seeds = {"count": 5, "mean": accuracy, "std": 0.0012, "min": accuracy - 0.001, "max": accuracy + 0.002}
            facts["protocols"][protocol]["seeds"] = seeds | {"accuracies": [accuracy] * 5}
    facts |= {
        "checkpoint": f"step-{last}",
        "step": last,
        "epoch": made.epochs,
        "phase": "oat" if made.oat else "cross_entropy",
        "split": shards.folder.name,
        "total": len(labels_N),
        "undecodable": 0,
        "seed": 0,
        "group_size": 32,
        "calibrated": False,
        "class_names": shards.classes,
        "best": {"step": last - STEPS_PER_EPOCH, "split": shards.folder.name, "protocol": "batch", "accuracy": 0.83},
    }
    (folder / "evaluation.json").write_text(json.dumps(facts))
    whose = {"checkpoint": f"step-{last}", "split": shards.folder.name, "eval_digest": shards.digest}
    save_file(tensors, folder / "evaluation.safetensors", metadata=whose)
    # the last validation in training is this evaluation
    text = (folder / "metrics.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        if "protocol" in line and line["step"] == last:
            known = facts["protocols"][line["protocol"]]
            text[number] = json.dumps(line | {"accuracy": known["accuracy"], "correct": known["correct"]})
    (folder / "metrics.jsonl").write_text("\n".join(text) + "\n")
