"""Labels as a score for each output of a model, so that they can be softened and mixed.

Scores are the probability of the class, [B], for two classes; of each class, [B, K], for more; of
y > k, [B, K - 1] ([B] for K = 2), for ordered ones. Several labels, and values of a regression, are
scores already.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dist_train.targets import Kind


def as_scores(labels: Tensor, kind: Kind, logits: Tensor | int) -> Tensor:
    """Labels as scores, float32; scores stay as they are.

    Args:
        labels: classes float32 [B], or scores.
        logits: [B] or [B, outputs], or the number of outputs.
    """
    outputs = logits if isinstance(logits, int) else logits[0].numel()
    if kind not in ("multiclass", "ordinal") or labels.ndim > 1 or outputs == 1:
        return labels
    if kind == "multiclass":
        return one_hot(labels.long(), outputs).to(labels.dtype)
    return (labels[:, None] > torch.arange(outputs, device=labels.device)).to(labels.dtype)


def class_shares(scores: Tensor, kind: Kind) -> Tensor:
    """The probability of each class, [B, K], of scores of two, more, or ordered classes."""
    if kind == "multiclass":
        return scores
    above = scores[:, None] if scores.ndim == 1 else scores
    one = torch.ones_like(above[:, :1])
    # P(y = k) = P(y > k - 1) - P(y > k).
    return torch.cat([one, above], dim=1) - torch.cat([above, 0 * one], dim=1)
