"""The whole way from pixels to answers as one network, and its trace with a free batch size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from oat_dist.errors import OatError
from oat_dist.predict import OATClassifier

__all__ = ["INPUT", "OUTPUTS", "ServingGraph", "frozen", "trace"]

INPUT, OUTPUTS = "images", ("scores", "probabilities", "labels")


class ServingGraph(nn.Module):
    """``images`` uint8 (B, S, S, 3) RGB, already cut and resized, to ``scores`` and ``probabilities`` (B, C) float32
    and ``labels`` (B,) int64. Normalisation, network, the inverse of OAT with its anchor and temperature are inside.
    """

    scale_311: Tensor
    shift_311: Tensor

    def __init__(self, classifier: OATClassifier) -> None:
        super().__init__()
        self.network, self.head = classifier.network, classifier.head
        self.register_buffer("scale_311", classifier.normalise.scale_311)
        self.register_buffer("shift_311", classifier.normalise.shift_311)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images_BCHW = images.permute(0, 3, 1, 2).to(torch.float32) * self.scale_311 + self.shift_311
        scores_BC, probabilities_BC = self.head(self.network(images_BCHW).float())
        return scores_BC, probabilities_BC, scores_BC.argmax(dim=1)


def trace(classifier: OATClassifier) -> torch.export.ExportedProgram:
    """The serving graph of a model on the CPU, for any batch size.

    Raises:
        OatError: torch.export does not get through the network.
    """
    graph = ServingGraph(classifier).eval()
    size = classifier.card["image_size"]
    images = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with _no_fast_path():
            program = torch.export.export(
                graph, (images,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}}
            )
    except Exception as error:  # whatever comes up while a network of others is traced
        name = classifier.card["name"]
        raise OatError(f"{name}: torch.export cannot trace this network ({first_line(error)})") from error
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine, which are nobody's business
    return program


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within the block no parameter wants a gradient: a trace shares them, and its users shall not need `no_grad`."""
    trainable = [value for value in network.parameters() if value.requires_grad]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for value in trainable:
            value.requires_grad_()


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without the fused kernels of attention: they are made for one batch size, and ONNX has no word for them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
