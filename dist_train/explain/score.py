"""The number that a map explains: how much a model's outputs speak for one class, label or value.

It is a logit, not a probability, because a sure probability hardly changes with the clip.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_train.targets import Target, by_class


def score(target: Target, logits: Tensor, of: int) -> Tensor:
    """The score [] of one of ``target.classes``.

    - binary, multiclass: the log-odds of the class against all others;
    - ordinal: the logit of being above the class below it, less that of being above it;
    - multilabel: the logit of the label;
    - regression: the value, in its own unit.

    Args:
        logits: of one clip, [1] or [1, outputs].
    """
    each = logits.reshape(-1)
    if target.kind == "binary":
        return each[0] if of == 1 else -each[0]
    if target.kind == "multiclass":
        others = torch.cat([each[:of], each[of + 1 :]])
        return each[of] - others.logsumexp(0)
    if target.kind == "ordinal":
        above = each[of - 1] if of > 0 else each.new_zeros(())
        return above - each[of] if of < len(each) else above
    if target.kind == "regression":
        return each[of] * target.scale[of] + target.center[of]
    return each[of]


def scores_by_class(target: Target, logits: np.ndarray) -> np.ndarray:
    """Probabilities, or values of regression, float64 [N, classes].

    Args:
        logits: [N] or [N, outputs].
    """
    scores = target.scores(logits.astype(np.float64))
    return by_class(scores) if target.kind == "binary" else scores
