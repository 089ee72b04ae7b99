"""Sampling weights that change between epochs, kept beside the run so that it can be resumed."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from dist_train.config import Config
from dist_train.data.files import read_plain, write_whole
from dist_train.data.plan import Plan
from dist_train.data.weight_table import read_weights
from dist_train.engine.backends.base import Backend
from dist_train.engine.superseded import set_aside
from dist_train.engine.together import on_main
from dist_train.errors import PlanError
from dist_train.os_advice import blame_machine
from dist_train.run import RunData

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
