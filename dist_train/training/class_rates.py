"""The shares of the classes among the clips of batches, and among those of the train split."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_train.run.data import RunData

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


class ClassRates(NamedTuple):
    """Shares of classes 0 to K - 1, float64 [K] each, which add up to 1.

    Attributes:
        batches: in the batches of the plan.
        natural: in the train split.
    """

    batches: Floats
    natural: Floats


def class_rates(data: RunData) -> ClassRates:
    """The rates of a run."""
    quotas = data.quotas()
    natural = np.array([data.count("train", code) for code in data.classes], np.float64)
    natural /= natural.sum()
    if None in quotas:
        return ClassRates(natural, natural)
    batches = np.array([quotas[code] for code in data.classes], np.float64)
    return ClassRates(batches / batches.sum(), natural)
