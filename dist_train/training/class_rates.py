"""The shares of the classes among the clips of batches, and among those of the train split."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_train.class_ratio import ClassRatio
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


def class_rates(data: RunData, ratio: ClassRatio) -> ClassRates:
    """The rates of a run whose plan has this ratio."""
    rates = ratio.positive_rate, data.natural_rate()
    return ClassRates(*(np.array([1 - rate, rate]) for rate in rates))
