"""Forward and backward of one optimizer step: the micro-batches of a window under one objective.

Span "micro": every anchor set lies within a micro-batch, so each goes forward and backward by itself.

Span "step": an anchor set may span the window, so no sample's gradient is known before all have been forwarded.
1. Forward every micro-batch without gradients, noting the state of the random numbers before each.
2. The loss of all those logits together gives dL/dlogits of every sample: closed form, one collective if global.
3. Forward each micro-batch again from the same random numbers and send its dL/dlogits backward.
That is exact, also through the anchor and with dropout; a single pass cannot be. (GradCache, arXiv 2101.06983, does
the same for contrastive losses.) It costs one more forward pass, and keeps the logits of the window, not activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oat_dist.batch import Batch
from oat_dist.engine import Replica
from oat_dist.models import norms_frozen, statistics_untouched
from oat_dist.objectives import Objective
from oat_dist.profiling import span
from oat_dist.randomness import random_state, set_random_state

__all__ = ["SPANS", "WindowStep"]

SPANS = ("micro", "step")


@dataclass(frozen=True)
class WindowStep:
    """How the gradient of a window is computed on this rank.

    Args:
        replica: the prepared network.
        images_of: a batch's images (B, 3, H, W) on the device, normalised.
        span: what an anchor may span, one of `SPANS`.
        on_loss: called with this rank's part of the loss, times W, after each evaluation of the objective, while its
            anchors are the last ones.
    """

    replica: Replica
    images_of: Callable[[Batch], Tensor]
    span: str
    on_loss: Callable[[Tensor], None]

    def run(self, objective: Objective, batches: Sequence[Batch], num_samples: int | Tensor) -> None:
        """Leave the gradient of the mean loss over `num_samples` in the replica, averaged over the ranks.

        Args:
            batches: this rank's micro-batches; all ranks have equally many.
            num_samples: N, the samples of the window over all ranks that count.
        """
        if self.span == "step" and len(batches) > 1 and objective.couples_samples:
            self._two_passes(objective, batches, num_samples)
            return
        for number, batch in enumerate(batches):
            with (
                self.replica.micro_step(last=number == len(batches) - 1),
                norms_frozen(self.replica.network, batch.empty),
            ):
                with span("forward"):
                    logits_BC = self.replica.model(self.images_of(batch))
                with span("loss"):
                    loss = self._loss(objective, logits_BC, batch, num_samples)
                with span("backward"):
                    self.replica.backward(loss)
            self.on_loss(loss)

    def _loss(self, objective: Objective, logits_BC: Tensor, batch: Batch, num_samples: int | Tensor) -> Tensor:
        """Of one micro-batch; mixed samples have a share of their own label and the rest of their partner's."""
        labels_B, valid_B = self._to_device(batch.labels_B), self._valid(batch)
        loss = objective.loss(logits_BC, labels_B, num_samples, valid_B)
        if batch.mix is None:
            return loss
        assert not objective.couples_samples, "labels are mixed under cross-entropy only"
        other_B = labels_B[self._to_device(batch.mix.partner_B)]
        other = objective.loss(logits_BC, other_B, num_samples, valid_B)
        return batch.mix.share * loss + (1 - batch.mix.share) * other

    def _two_passes(self, objective: Objective, batches: Sequence[Batch], num_samples: int | Tensor) -> None:
        network, device = self.replica.network, self.replica.world.device
        states, outputs = [], []
        with torch.no_grad(), statistics_untouched(network):
            for batch in batches:
                states.append(random_state(device))
                with norms_frozen(network, batch.empty), span("forward without gradients"):
                    outputs.append(self.replica.forward_only(self.images_of(batch)))
        with span("loss"):
            gradients = self._logit_gradients(objective, batches, outputs, num_samples)
        for number, (batch, state) in enumerate(zip(batches, states, strict=True)):
            with self.replica.micro_step(last=number == len(batches) - 1), norms_frozen(network, batch.empty):
                set_random_state(state, device)
                with span("forward"):
                    logits_BC = self.replica.model(self.images_of(batch))
                # A loss whose gradient with respect to the logits is the one already known.
                with span("backward"):
                    self.replica.backward((logits_BC * gradients[number]).sum())

    def _logit_gradients(
        self, objective: Objective, batches: Sequence[Batch], outputs: list[Tensor], num_samples: int | Tensor
    ) -> list[Tensor]:
        """dL/dlogits of every micro-batch (B, C). Stand-ins take no part: they would shift the groups."""
        real = [number for number, batch in enumerate(batches) if not batch.empty]
        empty_0C = outputs[0].new_zeros((0, outputs[0].shape[1]))
        joined_NC = torch.cat([empty_0C, *(outputs[number] for number in real)]).requires_grad_()
        nothing_0 = batches[0].labels_B[:0]
        labels_N = self._to_device(torch.cat([nothing_0, *(batches[number].labels_B for number in real)]))
        valid_N = None
        if any(batches[number].valid_B is not None for number in real):
            valid_N = self._to_device(torch.cat([batches[number].every_valid() for number in real]))
        loss = objective.loss(joined_NC, labels_N, num_samples, valid_N)
        (gradient_NC,) = torch.autograd.grad(loss, joined_NC)
        self.on_loss(loss)
        gradients = [torch.zeros_like(output) for output in outputs]
        parts = gradient_NC.split([len(batches[number]) for number in real]) if real else ()
        for number, part in zip(real, parts, strict=True):
            gradients[number] = part
        return gradients

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.replica.world.device, non_blocking=True)

    def _valid(self, batch: Batch) -> Tensor | None:
        return None if batch.valid_B is None else self._to_device(batch.valid_B)
