"""A temperature fitted on held-out data, and where it is kept: ``RUN/calibration/step-<n>.json``.

Probabilities are then ``softmax(v / T)``, v being the logarithm of the scores of protocol "stored" (for a network
trained with cross-entropy alone its logits; `answers.temperable`), with the T that minimises their negative
log-likelihood on the held-out samples. The labels stay.
How good they are is measured on samples that did not choose T: each half of the split is judged under the temperature
of the other half.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oat_dist.checkpoint import Checkpoint
from oat_dist.data.plan import EpochOrder
from oat_dist.errors import CheckpointError, DataError, OatError
from oat_dist.files import sha256_bytes, write_atomic
from oat_dist.measures import calibration_error

__all__ = [
    "Calibration",
    "calibrate",
    "fit_temperature",
    "prior_key",
    "read_calibration",
    "read_temperature",
    "write_temperature",
]

_FORM = "max(s, 0.1 / C)^(1 / T), of cross-entropy softmax(z / T)"  # what a kept temperature is one of
_STEPS = 100  # of Newton's method, safeguarded by bisection
_LEAST, _MOST = 1e-6, 1e6  # of 1/T


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature. Of each measure: with the uncalibrated probabilities, and cross-fitted with a temperature.

    Attributes:
        nll: mean negative log-likelihood, cross-fitted; it has no "before": uncalibrated probabilities may be 0.
        brier, ece: before and after.
    """

    temperature: float
    samples: int
    nll: float
    brier: tuple[float, float]
    ece: tuple[float, float]


def fit_temperature(values_NC: Tensor, labels_N: Tensor) -> float:
    """The T that minimises the mean negative log-likelihood of ``softmax(v / T)``; values (N, C) in float64.

    In 1/T that is convex, with the derivative mean(E_p[v] - v_label) and the second derivative mean(Var_p[v]).

    Raises:
        DataError: no finite T is best: every sample is right, or the values say nothing about the labels.
    """
    low, high, inverse = _LEAST, _MOST, 1 / max(float(values_NC.std()), 1e-3)
    own_N = values_NC.gather(1, labels_N[:, None].long())[:, 0]
    for _ in range(_STEPS):
        chance_NC = (values_NC * inverse).softmax(dim=1)
        mean_N = (chance_NC * values_NC).sum(dim=1)
        slope = float((mean_N - own_N).mean())
        bend = float((chance_NC * (values_NC - mean_N[:, None]).square()).sum(dim=1).mean())
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / bend if bend > 0 else 0.0
        before, inverse = inverse, step if low < step < high else (low * high) ** 0.5
        if abs(inverse - before) <= 1e-12 * before:
            break
    if not 10 * _LEAST < inverse < _MOST / 10:
        why = "the model has every sample right" if inverse > 1 else "its scores say nothing about the labels"
        raise DataError(f"no temperature fits these {len(labels_N):,} samples ({why}); use another or a larger split")
    return 1 / inverse


def calibrate(values_NC: Tensor, probabilities_NC: Tensor, labels_N: Tensor, seed: int = 0) -> Calibration:
    """Fit on all samples, measure by halves.

    Args:
        values_NC: what the temperature divides, see `answers.temperable`; float64.
        probabilities_NC: uncalibrated.

    Raises:
        DataError: as `fit_temperature`, or fewer than 20 samples.
    """
    samples = len(labels_N)
    if samples < 20:
        raise DataError(f"{samples} samples are too few to fit a temperature and to check it; use a larger split")
    labels_N = labels_N.long()
    order_N = torch.from_numpy(EpochOrder(samples, seed, 1).ids(0, samples).copy())
    halves = (order_N[: samples // 2], order_N[samples // 2 :])
    after_NC = torch.empty_like(probabilities_NC)
    for own, other in (halves, halves[::-1]):
        after_NC[own] = (values_NC[own] / fit_temperature(values_NC[other], labels_N[other])).softmax(dim=1)
    own_N = after_NC.gather(1, labels_N[:, None])[:, 0]
    return Calibration(
        fit_temperature(values_NC, labels_N),
        samples,
        float(-own_N.clamp(min=1e-300).log().mean()),
        (_brier(probabilities_NC, labels_N), _brier(after_NC, labels_N)),
        (_ece(probabilities_NC, labels_N), _ece(after_NC, labels_N)),
    )


def _brier(probabilities_NC: Tensor, labels_N: Tensor) -> float:
    own_N = probabilities_NC.gather(1, labels_N[:, None])[:, 0]
    return float((probabilities_NC.square().sum(dim=1) - 2 * own_N + 1).mean())


def _ece(probabilities_NC: Tensor, labels_N: Tensor) -> float:
    confidence_N, predicted_N = probabilities_NC.max(dim=1)
    return calibration_error(confidence_N.numpy(), (predicted_N == labels_N).numpy())


def prior_key(name: str, prior_C: Tensor | None) -> str:
    """Under which a temperature is kept: "training", "balanced", or what tells given shares (C,) apart."""
    if name in ("training", "balanced") or prior_C is None:
        return name
    shares = ",".join(f"{share:.9g}" for share in prior_C.tolist())
    return f"given {sha256_bytes(shares.encode())[:16]}"


def _place(checkpoint: Checkpoint) -> Path:
    return checkpoint.folder.parent.parent / "calibration" / f"{checkpoint.folder.name}.json"


def _weights(checkpoint: Checkpoint) -> str:
    return str(checkpoint.json("manifest.json")["files"]["model.safetensors"]["sha256"])


def write_temperature(checkpoint: Checkpoint, prior: str, split: str, found: Calibration) -> Path:
    """Keep `found` for this checkpoint under the class prior that the scores had; returns the file."""
    path = _place(checkpoint)
    try:
        entries = _read(path) if path.exists() else {}
        if entries.get("weights_sha256") != _weights(checkpoint):
            entries = {"form": _FORM, "weights_sha256": _weights(checkpoint), "priors": {}}
        entries["priors"][prior] = {"split": split, **asdict(found)}
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise OatError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def read_temperature(checkpoint: Checkpoint, prior: str = "training") -> float:
    """The temperature that was fitted for this checkpoint under this class prior; raises as `read_calibration`."""
    return float(read_calibration(checkpoint, prior)["temperature"])


def read_calibration(checkpoint: Checkpoint, prior: str = "training") -> dict[str, Any]:
    """What was fitted for this checkpoint under this class prior: its temperature, on which split, and the measures.

    Raises:
        CheckpointError: there is none, or it belongs to other weights.
    """
    path = _place(checkpoint)
    command = f"oat-dist evaluate {checkpoint.folder} --split VALIDATION --fit-temperature"
    command += {"training": "", "balanced": " --prior balanced"}.get(prior, " --prior (the same shares)")
    if not path.exists():
        raise CheckpointError(f"{path}: this checkpoint is not calibrated; fit a temperature first: {command}")
    entries = _read(path)
    if entries["weights_sha256"] != _weights(checkpoint):
        raise CheckpointError(f"{path}: belongs to other weights; fit a temperature anew: {command}")
    if prior not in entries["priors"]:
        raise CheckpointError(
            f"{path}: not calibrated under the class prior {prior}; fit a temperature first: {command}"
        )
    return dict(entries["priors"][prior])


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text())
        kept = entries["priors"].values()
        whole = all(0 < float(one["temperature"]) < math.inf and isinstance(one["split"], str) for one in kept)
        if whole and isinstance(entries["weights_sha256"], str) and entries["form"] == _FORM:
            return entries
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        pass
    raise CheckpointError(f"{path}: damaged, or of another version; remove it and fit a temperature anew")
