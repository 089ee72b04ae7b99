"""Groups and splits that are brighter, darker, or of other contrast than all others."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from dist_train.data.check.result import Shift

#: Standardised difference (Cohen 1988), from "medium" on.
LEAST_DIFFERENCE = 0.5
#: Standard errors that the difference must exceed, as many groups are compared.
CERTAIN = 4.0
FEWEST = 5


def find_shifts(grey: pd.DataFrame, groups: pd.Series, splits: pd.Series) -> list[Shift]:
    """Compare the clips of each group, and of each split, with all others.

    Args:
        grey: one row per clip: mean and spread of the grey values, of each channel.
        groups, splits: names, "" if none.

    Returns:
        Differences of ``LEAST_DIFFERENCE`` pooled standard deviations at least, by value.
    """
    shifts = []
    for statistic in grey:
        values = grey[statistic].to_numpy(np.float64)
        kinds: tuple[tuple[Literal["group", "split"], pd.Series], ...]
        kinds = ("group", groups), ("split", splits)
        for of, names in kinds:
            codes, distinct = pd.factorize(names.to_numpy())
            counts, sums, squares = (
                np.bincount(codes, weights=weight) for weight in (None, values, values**2)
            )
            for code, name in enumerate(distinct):
                n, others = int(counts[code]), len(values) - int(counts[code])
                if name == "" or min(n, others) < FEWEST:
                    continue
                mean, mean_of_others = sums[code] / n, (sums.sum() - sums[code]) / others
                within = squares.sum() - n * mean**2 - others * mean_of_others**2
                deviation = max(np.sqrt(max(within, 0) / (n + others - 2)), 1e-3)
                difference = (mean - mean_of_others) / deviation
                certain = abs(difference) * np.sqrt(n * others / (n + others)) >= CERTAIN
                if abs(difference) >= LEAST_DIFFERENCE and certain:
                    shifts.append(
                        Shift(
                            of=of,
                            name=str(name),
                            statistic=str(statistic),
                            clips=n,
                            value=float(mean),
                            others=float(mean_of_others),
                            difference=float(difference),
                        )
                    )
    return sorted(shifts, key=lambda shift: -abs(shift.difference))
