"""The focal loss (Lin, Goyal, Girshick, He and Dollar, "Focal loss for dense object detection",
ICCV 2017): clips that are classified well count little.

Labels may be probabilities: the loss is the mean of those of the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot, softplus


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0, reduction: str = "mean") -> Tensor:
    """The sum over y = 0, 1 of P(y) (1 - p_y)^gamma (-log p_y), where p_1 = sigmoid(logit).

    Args:
        logits, labels: of equal shape; labels are the probabilities of 1.
    """
    no, yes = softplus(logits), softplus(-logits)  # -log p_0 and -log p_1
    each = labels * torch.exp(-gamma * no) * yes + (1 - labels) * torch.exp(-gamma * yes) * no
    return each.mean() if reduction == "mean" else each


def categorical_focal(
    logits: Tensor, labels: Tensor, gamma: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """The sum over classes c of P(c) (1 - p_c)^gamma (-log p_c), where p = softmax(logits).

    Args:
        logits: [B, K].
        labels: classes [B], or probabilities [B, K].
    """
    if labels.ndim == 1:
        labels = one_hot(labels.long(), logits.shape[1]).to(logits.dtype)
    log_p = log_softmax(logits, dim=1)
    # The power has no finite gradient at 0 if gamma < 1.
    others = (-torch.expm1(log_p)).clamp(min=torch.finfo(logits.dtype).tiny)
    each = (-labels * others**gamma * log_p).sum(dim=1)
    return each.mean() if reduction == "mean" else each
