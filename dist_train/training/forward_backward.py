"""Forward and backward pass of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from dist_train.distributed.backends.base import Backend
from dist_train.errors import ModelError
from dist_train.training.losses import LOSSES, Loss

#: Logits, [B] or [B, outputs], and the mean loss of a micro-batch, detached.
Outputs = tuple[Tensor, Tensor]
NO_EXTRAS: Mapping[str, Tensor] = {}


class ForwardBackward:
    """Adds a micro-batch's gradients to those of the backend's weights.

    Args:
        outputs: numbers that the model gives for a clip.
        between: called between the passes.
    """

    def __init__(
        self,
        backend: Backend,
        loss: Loss = LOSSES["bce"],
        *,
        outputs: int = 1,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._backend, self._loss, self._between = backend, loss, between
        self._of_clip = () if outputs == 1 else (outputs,)

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
            labels: float32 on the device, [B] or as ``Target`` says.
            weight: factor of the micro-batch's mean loss in the loss of the step.
            extras: further arguments of the loss, on the device.
        """
        logits = self._backend.model(x, frames)
        if logits.shape != (len(labels), *self._of_clip):
            raise ModelError(
                f"the model gives {list(logits.shape)} for {len(labels)} clips",
                where="model.name",
                fix="Give one logit a clip, [B]."
                if not self._of_clip
                else f"Give {self._of_clip[0]} logits a clip, [B, {self._of_clip[0]}].",
            )
        loss = self._loss(logits.float(), labels, **extras)
        self._between()
        self._backend.backward(loss * weight)
        return logits.detach(), loss.detach()
