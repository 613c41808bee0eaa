"""``export RUN OUTPUT``: a trained model as ONNX, torch.export or two portable files, checked on the spot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from oat_dist.commands.arguments import positive
from oat_dist.commands.predict import add_answer_arguments, load_classifier
from oat_dist.data.index import ShardSet
from oat_dist.data.progress import show_progress
from oat_dist.data_parts import open_location
from oat_dist.errors import OatError, run_command
from oat_dist.export.check import noise, split_images
from oat_dist.export.formats import FORMATS, check_packages, parse_formats
from oat_dist.export.write import export_model
from oat_dist.hub import check_login, push
from oat_dist.portable import is_portable
from oat_dist.predict import OATClassifier
from oat_dist.run_folder import read_config

__all__ = ["add_arguments", "main", "run"]

_DESCRIPTION = """\
Write a trained model to a new folder, for use elsewhere:

  onnx      model.onnx         images in, scores, probabilities and labels out; any batch size
  torch     model.pt2          the same graph for torch.export.load
  portable  model.safetensors  for OATClassifier.from_pretrained, here or from the Hugging Face hub

and model.json, which says how an image is prepared and what the outputs mean. Normalisation, the inverse of OAT and the
stored anchor are inside the graphs. Each of them is run against the original, on images of the run's evaluation split
one at a time, and refused if a label differs, or a score by more than 1e-4.

examples:
  oat-dist export runs/quickstart exported/digits
  oat-dist export runs/quickstart exported/digits --format onnx --check 1000
  oat-dist export runs/longtail exported/balanced --prior balanced --push-to-hub user/name
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "run",
        metavar="RUN",
        type=Path,
        help="run folder, one of its checkpoints/step-<n> folders, or a portable export",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to make")
    parser.add_argument("--format", default=",".join(FORMATS), help=f"default: {','.join(FORMATS)}")
    parser.add_argument("--checkpoint", metavar="NAME", help="latest (default), best, or step-<n>")
    add_answer_arguments(parser)
    parser.add_argument("--opset", metavar="N", type=positive, help="of ONNX; default: what torch recommends")
    parser.add_argument("--check", metavar="N", type=positive, default=64, help="images to compare on (default 64)")
    parser.add_argument("--data", help="packed data set with these images; default: the one the run trained on")
    parser.add_argument("--split", help="its split; default: the run's data.eval_split")
    parser.add_argument("--overwrite", action="store_true", help="replace an exported model that lies at OUTPUT")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="then upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make the repository on the hub a private one")


def run(arguments: argparse.Namespace) -> int:
    formats, hub_id = parse_formats(arguments.format), arguments.push_to_hub
    if arguments.output.resolve() == arguments.run.resolve():
        raise OatError(f"{arguments.output}: is the model that is to be exported; choose another folder")
    check_packages(formats)
    if hub_id is not None:
        if "portable" not in formats:
            raise OatError("--push-to-hub needs the format portable, which from_pretrained reads")
        check_login(hub_id)
    classifier = load_classifier(arguments, "cpu")
    if classifier.prior == "training":
        classifier.source |= _evaluated(arguments.run, classifier)
    images, count, images_are = _images(arguments, classifier)
    with show_progress("comparing", count, enabled=True, vanish=True) as advance:
        found = export_model(
            classifier,
            arguments.output,
            formats,
            images,
            images_are=images_are,
            opset=arguments.opset,
            overwrite=arguments.overwrite,
            hub_id=hub_id or "USER/NAME",
            advance=advance,
        )
    print(f"exported  {arguments.output}: {', '.join(sorted(path.name for path in arguments.output.iterdir()))}")
    compared = next(iter(found.values())).images
    print(f"compared  with the original on {compared:,} images, one at a time: {images_are}")
    for form, agreement in found.items():
        print(f"  {form:<9} {agreement}")
    if hub_id is not None:
        print(f"pushed    {push(arguments.output, hub_id, private=arguments.private)}")
    return 0


def _evaluated(run: Path, classifier: OATClassifier) -> dict[str, str]:
    """What the run's own evaluation says of this checkpoint, for the page of the model; nothing where it says none.

    It is a remark: a file that is missing or of another kind is no reason against the export.
    """
    protocol = "stored" if classifier.card["objective"] == "oat" else "argmax"
    try:
        found = json.loads((run / "evaluation.json").read_text())
        if found["checkpoint"] != classifier.source.get("checkpoint"):
            return {}
        text = f"{found['protocols'][protocol]['accuracy']:.2%} of {found['total']:,} samples of {found['split']}"
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"accuracy": f"{text} ({protocol})"}


def _images(arguments: argparse.Namespace, classifier: OATClassifier) -> tuple[Iterable[np.ndarray], int, str]:
    """What to compare on: images of a split, or noise where none can be had; how many, and what they are."""
    try:
        shards, name = _split(arguments, classifier)
    except OatError as error:
        if arguments.data is not None or arguments.split is not None:
            raise
        print(f"note: no evaluation split to compare on ({error}); random images instead", file=sys.stderr)
        size = classifier.card["image_size"]
        return noise(size, arguments.check), arguments.check, "random pixels, seed 0"
    count = min(arguments.check, shards.num_samples)
    return split_images(classifier, shards, count), count, f"images of the split {name}, drawn by seed 0"


def _split(arguments: argparse.Namespace, classifier: OATClassifier) -> tuple[ShardSet, str]:
    data, split, cache = arguments.data, arguments.split, {}
    if data is None or split is None:
        if is_portable(arguments.run):
            raise OatError(f"{arguments.run} is an exported model and names no data; give --data and --split")
        path = arguments.run
        config = read_config(path if (path / "config.yaml").exists() else path.absolute().parent.parent)
        data, split = data or config["data"]["path"], split or config["data"]["eval_split"]
        if not isinstance(data, str) or not isinstance(split, str | None):
            raise OatError(f"{arguments.run}: its config.yaml is damaged; give --data and --split")
        cache = {key: config["data"].get(key) for key in ("cache_dir", "cache_gb")}
    if split is None:
        raise OatError("the run has no data.eval_split; name one with --split")
    shards = open_location(data, split, **cache)
    if shards.classes != classifier.classes:
        raise OatError(f"{shards.where}: its classes are not those of the model")
    return shards, split


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="export.py")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))
