"""A CSV of sampling weights, as hard-negative mining writes one between epochs."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd

from dist_train.data.weights import Floats
from dist_train.errors import PlanError

COLUMNS = ["filename", "weight"]


def read_weights(content: bytes, filenames: pd.Series, where: object) -> Floats:
    """The weight of each file, float64 [count]; 1 for those that the table does not name.

    Args:
        content: of a CSV with the columns ``filename`` and ``weight``.
        filenames: of the clips that weights are wanted for.
        where: how messages name the table.

    Raises:
        PlanError: it is no such table, a file is named twice or is none of the clips, or a weight
            is no finite number from 0 on.
    """
    try:
        table = pd.read_csv(io.BytesIO(content), dtype={"filename": str}, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise PlanError(f"is no CSV file ({error})", where=where) from None
    if sorted(table.columns) != COLUMNS:
        raise PlanError(
            f"its columns are {', '.join(map(str, table.columns))}",
            where=where,
            fix="It needs filename and weight.",
        )
    twice = table["filename"][table["filename"].duplicated()]
    if len(twice):
        raise PlanError(f"'{twice.iloc[0]}' has two weights", where=where)
    weights = pd.to_numeric(table["weight"], errors="coerce").to_numpy(np.float64)
    bad = ~np.isfinite(weights) | (weights < 0)
    if bad.any():
        row = table[bad].iloc[0]
        raise PlanError(
            f"the weight of '{row['filename']}' is '{row['weight']}', not a number from 0 on",
            where=where,
        )
    given = pd.Series(weights, index=table["filename"])
    strangers = given.index.difference(pd.Index(filenames))
    if len(strangers):
        raise PlanError(
            f"names '{strangers[0]}', which is no clip of the store ({len(strangers)} such)",
            where=where,
        )
    return filenames.map(given).fillna(1.0).to_numpy(np.float64)
