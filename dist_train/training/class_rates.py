"""The shares of the classes among the clips of batches, and among those of the train split."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_train.run.data import RunData

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


class ClassRates(NamedTuple):
    """Shares of classes 0 to K - 1, float64 [K] each; of multilabel, the share of clips that has
    each label; of regression empty. Each is between 0 and 1, both excluded: in ``natural`` what no
    clip has counts as half a clip.

    Attributes:
        batches: in the batches of the plan.
        natural: in the train split.
    """

    batches: Floats
    natural: Floats


def class_rates(data: RunData) -> ClassRates:
    """The rates of a run.

    Raises:
        PlanError: ``plan.ratio`` does not name the classes.
    """
    if data.target.kind == "regression":
        return ClassRates(np.empty(0), np.empty(0))
    quotas, clips = data.quotas(), data.count("train")
    # A class or label that all clips have, or none, would have odds that no correction can move.
    most = 1 - 0.5 / clips
    natural = np.clip(np.array(data.counts("train")) / clips, 1 - most, most)
    if None in quotas:
        return ClassRates(natural, natural)
    batches = np.array([quotas[code] for code in data.classes], np.float64)
    return ClassRates(batches / batches.sum(), natural)
