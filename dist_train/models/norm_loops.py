"""What fused normalisation asks of the loops that compute it, however they are made.

Activations are rows: [F, P, C], the B * D frames, the H * W pixels, and the channels, which in
``channels_last_3d`` is how a batch [B, C, D, H, W] lies in memory.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from dist_train.models.shared_norm import Statistics


class Vectors(NamedTuple):
    """Mean and biased variance [C], how many values they are of [1], and the scale and shift [C]
    that normalise by them."""

    mean: Tensor
    var: Tensor
    number: Tensor
    scale: Tensor
    shift: Tensor


class Loops(Protocol):
    """Readings of rows. ``real`` is bool [F, 1, 1], or None for all: other frames take no part, and
    are zero in what comes out. Rows come and go in one dtype; vectors and sums are in that of
    ``origin``.

    ``to_output`` and ``to_gradients`` are for one process alone, and do in one call what the others
    do in two or three.
    """

    def sums(self, x: Tensor, real: Tensor | None, origin: Tensor) -> Tensor:
        """[2C + 1]: sums around ``origin`` [C], sums of squares around it, and how many values
        they are of."""

    def vectors(
        self, sums: Tensor, origin: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Vectors:
        """Of sums as above, in any float dtype."""

    def output(
        self, x: Tensor, plus: Tensor | None, real: Tensor | None, vectors: Vectors, relu: bool
    ) -> Tensor:
        """Normalised, with ``plus`` added, and rectified."""

    def gradient_sums(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        real: Tensor | None,
        vectors: Vectors,
        eps: float,
        relu: bool,
    ) -> Tensor:
        """[2, C], the gradients of bias and weight: sums of the gradient of what is normalised, and
        of it times the normalised values.

        Args:
            y: the output, where it alone tells what was rectified.
        """

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        real: Tensor | None,
        sums: Tensor,
        vectors: Vectors,
        eps: float,
        relu: bool,
        into_plus: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Of ``x``, by gradient sums in any float dtype; and of ``plus`` if ``into_plus``."""

    def to_output(
        self,
        x: Tensor,
        plus: Tensor | None,
        real: Tensor | None,
        origin: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Vectors]:
        """``sums``, ``vectors`` and ``output``."""

    def to_gradients(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        real: Tensor | None,
        vectors: Vectors,
        eps: float,
        relu: bool,
        into_plus: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``gradient_sums`` and ``gradients``."""

    def move(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        steps: Tensor,
        statistics: Statistics,
        momentum: float,
    ) -> None:
        """``shared_norm.move_running``."""
