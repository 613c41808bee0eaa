"""One export: traced, written aside, run against the original, and only then there."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from oat_dist.errors import OatError
from oat_dist.export.check import BOUND, Agreement, compare
from oat_dist.export.formats import check_packages, write
from oat_dist.export.graph import frozen, trace
from oat_dist.hub import write_page
from oat_dist.portable import new_folder, write_description
from oat_dist.predict import OATClassifier

__all__ = ["export_model"]

_PACKAGES = ("oat_dist", "torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript")


def export_model(
    classifier: OATClassifier,
    output: Path,
    formats: Sequence[str],
    images: Iterable[np.ndarray],
    *,
    images_are: str,
    opset: int | None = None,
    overwrite: bool = False,
    hub_id: str = "USER/NAME",
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Agreement]:
    """Write a model in all `formats` to a new folder; by format, how well each agrees with the original.

    Args:
        classifier: on the CPU.
        formats: of `oat_dist.export.formats.FORMATS`.
        images: prepared, on which the exports are compared with the original.
        images_are: what they are, in words.
        opset: of onnx; None: the one torch recommends.
        overwrite: an exported model that lies at `output` is replaced.
        hub_id: what the page calls the model.
        advance: told how many images have been compared.

    Raises:
        OatError: an export that cannot be made, or does not agree; nothing is written then.
    """
    check_packages(formats)
    with new_folder(output, overwrite=overwrite) as staging, frozen(classifier.network):
        description = classifier.describe()
        program = trace(classifier) if set(formats) != {"portable"} else None
        runners = {form: write(form, staging, classifier, description, program, opset) for form in formats}
        found = compare(classifier, runners, images, advance)
        for form, agreement in found.items():
            if agreement.images == 0:
                raise OatError(
                    f"none of the {images_are} can be decoded, so nothing can be compared; nothing is written"
                )
            if not agreement.holds:
                raise OatError(
                    f"format {form}: the exported model does not agree with the original on {agreement.images:,} "
                    f"images, {images_are}: {agreement} ({BOUND:g} allowed); nothing is written"
                )
        write_page(staging, description, hub_id)
        write_description(
            staging,
            description,
            checked={"images": images_are, **{form: one.to_json() for form, one in found.items()}},
            versions=_versions(),
        )
    return found


def _versions() -> dict[str, Any]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
