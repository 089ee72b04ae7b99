"""The score that maps explain is the log-odds of the probability that is told of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logit

from dist_train.explain.score import score, scores_by_class
from dist_train.targets import Target

NAMES = ("a", "b", "c", "d")
TARGETS = {
    "binary": Target(),
    "multiclass": Target("multiclass", NAMES),
    "multilabel": Target("multilabel", NAMES),
    "ordinal": Target("ordinal", NAMES),
    "regression": Target("regression", NAMES[:2], (5.0, -1.0), (2.0, 10.0)),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_it_is_the_log_odds_of_the_probability(kind: str) -> None:
    target = TARGETS[kind]
    # Of ordinal they fall, as P(class > k) does.
    logits = np.array([1.3, 0.4, -0.2, -2.0])[: target.outputs]
    scores = scores_by_class(target, logits if target.outputs == 1 else logits[None])[0]
    given = torch.tensor(logits)
    found = [float(score(target, given, of)) for of in range(len(target.classes))]
    if kind == "regression":
        np.testing.assert_allclose(found, [5 + 2 * 1.3, -1 + 10 * 0.4])
        np.testing.assert_allclose(scores, found)
    elif kind == "ordinal":
        # At the ends, where only one edge counts; in between both do.
        np.testing.assert_allclose(found[::3], logit(scores[::3]))
        np.testing.assert_allclose(found[1:3], [1.3 - 0.4, 0.4 + 0.2])
    else:
        np.testing.assert_allclose(found, logit(scores))
