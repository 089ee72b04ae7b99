"""Forward and backward pass of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from dist_train.distributed.backends.base import Backend
from dist_train.errors import ModelError
from dist_train.training.losses import LOSSES, Loss

#: Logits [B] and the mean loss of a micro-batch, detached.
Outputs = tuple[Tensor, Tensor]
NO_EXTRAS: Mapping[str, Tensor] = {}


class ForwardBackward:
    """Adds a micro-batch's gradients to those of the backend's weights.

    Args:
        between: called between the passes.
    """

    def __init__(
        self,
        backend: Backend,
        loss: Loss = LOSSES["bce"],
        *,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._backend, self._loss, self._between = backend, loss, between

    def __call__(
        self,
        x: Tensor,
        frames: Tensor | None,
        labels: Tensor,
        weight: float | Tensor,
        extras: Mapping[str, Tensor] = NO_EXTRAS,
    ) -> Outputs:
        """Run both passes.

        Args:
            x: float32 [B, C, D, H, W] on the device.
            frames: int64 [B], the true depths, best on the host; None if no clip is padded.
            labels: float32 [B] on the device.
            weight: factor of the micro-batch's mean loss in the loss of the step.
            extras: further arguments of the loss, on the device.
        """
        logits = self._backend.model(x, frames)
        if logits.shape != labels.shape:
            raise ModelError(
                f"the model gives {list(logits.shape)} for {len(labels)} clips",
                where="model.name",
                fix="Give one logit a clip, [B].",
            )
        loss = self._loss(logits.float(), labels, **extras)
        self._between()
        self._backend.backward(loss * weight)
        return logits.detach(), loss.detach()
