"""What a model predicts: the kind of target, how many outputs it needs, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

Kind = Literal["binary", "multiclass", "multilabel", "ordinal", "regression"]
#: Kinds of which a clip has one class, by its code.
CODED: tuple[Kind, ...] = ("binary", "multiclass", "ordinal")
#: The loss that "auto" takes.
NATURAL_LOSS: dict[Kind, str] = {
    "binary": "bce",
    "multiclass": "ce",
    "multilabel": "bce",
    "ordinal": "ordinal",
    "regression": "huber",
}

Array = NDArray[Any]


@dataclass(frozen=True)
class Target:
    """What a run predicts of a clip.

    Labels of clips, as losses take them, are float32: class codes [N] of a kind of ``CODED``; 0 or
    1 for each class, [N, K], of multilabel; ``(value - center) / scale``, [N, V], of regression. A
    single value has labels [N].

    Attributes:
        classes: (negative, positive) of binary, names of codes 0 to K-1 otherwise; of regression
            the names of the values.
        center, scale: of each value of regression.
    """

    kind: Kind = "binary"
    classes: tuple[str, ...] = ("negative", "positive")
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    @property
    def is_coded(self) -> bool:
        """Whether a clip has one class."""
        return self.kind in CODED

    @property
    def outputs(self) -> int:
        """Numbers that the model gives for a clip. Those of ordinal are cumulative: output k is the
        logit of P(class > k)."""
        if self.kind == "binary":
            return 1
        return len(self.classes) - (self.kind == "ordinal")

    @property
    def label_shape(self) -> tuple[int, ...]:
        """The shape of one clip's label."""
        return () if self.is_coded or self.outputs == 1 else (self.outputs,)

    @property
    def logit_shape(self) -> tuple[int, ...]:
        """The shape of one clip's logits."""
        return () if self.outputs == 1 else (self.outputs,)

    def scores(self, logits: Array) -> Array:
        """What logits, [N] or [N, outputs], say.

        Returns:
            The probability of the positive class [N] (binary); of each class [N, K], which sum to 1
            unless the kind is multilabel; or values [N, V] in their own unit (regression).
        """
        if self.kind == "multiclass":
            return np.asarray(softmax(logits, axis=1))
        if self.kind == "ordinal":
            return _of_cumulative(expit(logits))
        if self.kind == "regression":
            return self._unscaled(logits)
        return np.asarray(expit(logits))

    def truth(self, labels: Array) -> Array:
        """Labels as metrics take them: int64 codes [N], or 0 or 1 [N, K]; values [N, V] in their
        own unit."""
        return self._unscaled(labels) if self.kind == "regression" else labels.astype(np.int64)

    def _unscaled(self, values: Array) -> Array:
        each = np.asarray(values, np.float64).reshape(len(values), len(self.classes))
        whole: Array = each * np.asarray(self.scale or 1.0) + np.asarray(self.center or 0.0)
        return whole


def by_class(scores: Array) -> Array:
    """Probabilities of each class: [N, 2] of those of the positive one, [N]; [N, K] stay."""
    return np.stack([1 - scores, scores], axis=1) if scores.ndim == 1 else scores


def _of_cumulative(above: Array) -> Array:
    """Probabilities of K classes [N, K] from P(class > k), [N, K-1], as Frank and Hall, "A simple
    approach to ordinal classification" (ECML 2001). Where the latter rise with k, which the
    outputs of a model may, they are held at the least before."""
    falling = np.minimum.accumulate(above, axis=1)
    edges = np.pad(falling, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0)))
    return np.asarray(edges[:, :-1] - edges[:, 1:])
