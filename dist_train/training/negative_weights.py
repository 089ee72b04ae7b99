"""Sampling weights of negatives, or of all classes but the plan's anchor, that the user may change
between epochs.

The table of ``plan.weights`` is copied into the run's folder when an epoch begins, so that a
resumed run completes the epoch with the same weights.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from dist_train.checkpoint.format import by_step
from dist_train.checkpoint.superseded import set_aside
from dist_train.config import Config
from dist_train.data.plan.plan import Plan
from dist_train.data.plan.weights import Floats
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import on_main
from dist_train.errors import PlanError
from dist_train.files import read_plain, write_whole
from dist_train.run.data import RunData
from dist_train.system.advice import blame_machine

MOST_BYTES = 2**31
FOLDER = "weights"
COLUMNS = ["filename", "weight"]


def kept_table(run: Path, first_step: int) -> Path:
    """Return the path of the run's copy of the table, for the epoch that begins with a step."""
    return run / FOLDER / f"step-{first_step}.csv"


class EpochWeights:
    """The plan of each epoch, by the table as it was when the epoch began."""

    def __init__(self, config: Config, data: RunData, backend: Backend) -> None:
        self._table, self._run = config.plan.weights, config.out
        self._data, self._backend = data, backend
        # An epoch's plan is needed when it begins, and for each checkpoint.
        self.plan = lru_cache(maxsize=2)(self._plan)

    def set_tables_aside(self) -> None:
        """Move the copies that an earlier run left out of the way. A collective call."""

        def move() -> None:
            # Other files in the folder are the user's.
            for _, path in by_step(self._run / FOLDER, ".csv"):
                set_aside(self._run, path)

        on_main(self._backend, move)

    def _plan(self, first_step: int) -> Plan:
        """Return the plan of the epoch that begins with ``first_step``. A collective call."""
        content = on_main(self._backend, lambda: self._content(first_step))
        names = pd.Series(self._data.store.table.texts("filename"))
        return self._data.plan(read_weights(content, names, self._table))

    def _content(self, first_step: int) -> bytes:
        assert self._table is not None
        kept = kept_table(self._run, first_step)
        try:
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_whole(kept, self._table.read_bytes())
            return read_plain(kept, most_bytes=MOST_BYTES)
        except OSError as error:
            where = error.filename or self._table
            blame_machine(error, where)
            raise PlanError(f"cannot be read ({error.strerror})", where=where) from error


def read_weights(content: bytes, filenames: pd.Series, where: object) -> Floats:
    """Return the weight of each file, float64 [N]; 1 for files that are not in the table.

    Args:
        content: a CSV file with the columns ``filename`` and ``weight``.
        filenames: files of the store's clips, [N].
        where: name of the table in messages.

    Raises:
        PlanError: a column, a file or a weight is wrong.
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
    names = table["filename"]
    twice = names[names.duplicated()]
    if len(twice):
        raise PlanError(f"'{twice.iloc[0]}' has two weights", where=where)
    weights = pd.to_numeric(table["weight"], errors="coerce").to_numpy(np.float64)
    bad = ~np.isfinite(weights) | (weights < 0)
    if bad.any():
        name, weight = table.loc[bad, COLUMNS].iloc[0]
        raise PlanError(
            f"the weight of '{name}' is '{weight}', not a number from 0 on", where=where
        )
    unknown = names[~names.isin(filenames)]
    if len(unknown):
        raise PlanError(
            f"names '{unknown.iloc[0]}', which is no clip of the store ({len(unknown)} such)",
            where=where,
        )
    given = pd.Series(weights, index=names)
    return filenames.map(given).fillna(1.0).to_numpy(np.float64)
