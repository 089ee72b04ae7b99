"""What a model predicts of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["binary", "multiclass", "multilabel", "ordinal", "regression"]


@dataclass(frozen=True)
class Target:
    """What a model predicts.

    Attributes:
        classes: (negative, positive) of binary; the names of codes 0 to K - 1; or of the values of
            a regression.
    """

    kind: Kind
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Number of outputs of the model."""
        match self.kind:
            case "binary":
                return 1
            case "ordinal":
                return len(self.classes) - 1
            case _:
                return len(self.classes)
