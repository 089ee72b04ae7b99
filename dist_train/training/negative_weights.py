"""Sampling weights that change between epochs, kept beside the run so that it can be resumed."""

from __future__ import annotations

import io
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

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
#: The name of a table, by the first step of the epoch.
FOLDER = "weights"
KEPT = re.compile(r"step-[0-9]+\.csv")


def kept_table(run: Path, first_step: int) -> Path:
    """The table of the epoch that begins with ``first_step``, in the run's folder."""
    return run / FOLDER / f"step-{first_step}.csv"


class EpochWeights:
    """The plan of each epoch, by the table of ``plan.weights`` as it was when the epoch began.

    The table is copied into the run's folder then: a resumed run goes on with what its epoch was
    begun with, whatever the table says by now.
    """

    def __init__(self, config: Config, data: RunData, backend: Backend) -> None:
        self.table = config.plan.weights
        self.folder = config.out / FOLDER
        self.data, self.backend = data, backend
        # An epoch's plan is asked for when it begins, and when it is saved.
        self.plan = lru_cache(maxsize=2)(self._plan)

    def forget(self) -> None:
        """A new run begins: tables that an earlier one left are not its own, and are moved aside.
        Others in a folder of that name are the user's. A collective call."""
        on_main(self.backend, self._set_aside)

    def _set_aside(self) -> None:
        for path in self.folder.glob("step-*.csv"):
            if KEPT.fullmatch(path.name):
                set_aside(self.folder.parent, path)

    def _plan(self, first_step: int) -> Plan:
        """The plan of the epoch that begins with ``first_step``; a collective call.

        Raises:
            PlanError: the table cannot be read.
        """
        content = on_main(self.backend, lambda: self._content(first_step))
        return self.data.plan(read_weights(content, self.data.store.table["filename"], self.table))

    def _content(self, first_step: int) -> bytes:
        assert self.table is not None
        kept = kept_table(self.folder.parent, first_step)
        try:
            if not kept.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(kept, self.table.read_bytes())
            return read_plain(kept, most_bytes=MOST_BYTES)
        except OSError as error:
            where = error.filename or self.table
            blame_machine(error, where)
            raise PlanError(f"cannot be read ({error.strerror})", where=where) from error


# A CSV of sampling weights, as hard-negative mining writes one between epochs.


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
