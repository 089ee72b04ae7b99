"""Checks that random draws have the distribution that they should have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import kstest


def assert_even(values: object, low: float, high: float) -> None:
    """Uniform between two bounds, by the Kolmogorov-Smirnov test."""
    assert kstest(np.asarray(values), "uniform", (low, high - low)).pvalue > 1e-3


def assert_share(hits: Sequence[bool], share: float) -> None:
    """The number of hits agrees with the probability, to four standard deviations."""
    assert abs(np.mean(hits) - share) < 4 * np.sqrt(share * (1 - share) / len(hits))
