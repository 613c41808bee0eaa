"""Writing a traced model to a file, and running that file as its users will."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oat_dist.errors import ConfigError, OatError
from oat_dist.export.graph import INPUT, OUTPUTS, first_line
from oat_dist.portable import Description, write_portable
from oat_dist.predict import OATClassifier

__all__ = ["FORMATS", "Runner", "check_packages", "parse_formats", "run_onnx", "run_portable", "run_torch", "write"]

FORMATS = ("onnx", "torch", "portable")
_FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_ONE_FILE = 1_800_000_000  # bytes: a protobuf ends at 2 GiB

# images (B, S, S, 3) uint8 -> scores (B, C), probabilities (B, C), labels (B,)
Runner = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def parse_formats(text: str) -> tuple[str, ...]:
    """Read ``--format``: names of `FORMATS` with commas between them, in their order.

    Raises:
        ConfigError: an unknown name, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--format {text}: {name!r} is unknown; use any of {', '.join(FORMATS)}")
    if not names:
        raise ConfigError(f"--format is empty; use any of {', '.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in names)


def check_packages(formats: Sequence[str]) -> None:
    """Raises:
    OatError: packages that a format needs are not installed.
    """
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise OatError(
            f"format onnx needs {', '.join(missing)}: pip install 'oat_dist[onnx]', or leave it out: "
            "--format torch,portable"
        )


def write(
    form: str,
    folder: Path,
    classifier: OATClassifier,
    description: Description,
    program: torch.export.ExportedProgram | None,
    opset: int | None = None,
) -> Runner:
    """Write one format into `folder`; returns what runs the written files.

    Args:
        program: the trace, for onnx and torch.
        opset: of onnx; None: the one torch recommends.

    Raises:
        OatError: it cannot be written in this format.
    """
    if form == "portable":
        write_portable(folder, classifier.network, description)
        return run_portable(folder)
    assert program is not None
    path = folder / _FILES[form]
    text = json.dumps(description.to_json())
    if form == "torch":
        torch.export.save(program, path, extra_files={"model.json": text})
        return run_torch(path)
    _write_onnx(program, path, text, opset)
    return run_onnx(path)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, text: str, opset: int | None) -> None:
    import onnx

    size = sum(value.nbytes for value in program.state_dict.values())
    try:
        with _hushed():
            written = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
                opset_version=opset,
                verbose=False,
            )
        assert written is not None
        written.model.metadata_props["oat_dist"] = text
        written.save(path, external_data=size > _ONE_FILE)
    except Exception as error:  # of the exporter, of onnxscript, of protobuf
        raise OatError(f"the network cannot be written as ONNX ({first_line(error)})") from error
    found = opset_of(onnx.load(path, load_external_data=False))
    if opset is not None and found != opset:
        raise OatError(
            f"--opset {opset}: the network can be written with opset {found} only; give that, or leave it out"
        )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without the exporter's warnings about versions of operators, with tracebacks in them: we look what came of it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def opset_of(model: Any) -> int:
    """The version of ONNX's own operators that a loaded model uses."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def run_onnx(path: Path) -> Runner:
    """An ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Its idle threads would turn on every core meanwhile, in the way of the original that it is compared with.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise OatError(f"{path.name}: onnxruntime cannot load it ({first_line(error)})") from error

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores, probabilities, labels = session.run(list(OUTPUTS), {INPUT: images})
        return scores, probabilities, labels

    return run


def run_torch(path: Path) -> Runner:
    """A file of torch.export. Such a file can hold code: load only what you trust."""
    network = torch.export.load(path).module()

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with torch.no_grad():
            scores, probabilities, labels = network(torch.from_numpy(images))
        return scores.numpy(), probabilities.numpy(), labels.numpy()

    return run


def run_portable(folder: Path) -> Runner:
    """A portable folder in `OATClassifier`."""
    classifier = OATClassifier.from_pretrained(folder, "cpu")

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        answers = classifier.answer(images)
        return answers.scores_BC.numpy(), answers.probabilities_BC.numpy(), answers.labels_B.numpy()

    return run
