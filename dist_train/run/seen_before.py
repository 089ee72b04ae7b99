"""Held-out clips on which a run's weights were trained before: by another split of the same run, or
in the run that ``model.init`` names."""

from __future__ import annotations

import logging
from pathlib import Path

from dist_train.data.splits import CODES
from dist_train.errors import RunError
from dist_train.run.data import RunData
from dist_train.run.folder import CHECKPOINTS, SNAPSHOTS
from dist_train.run.record import read_record
from dist_train.run.splits import read_splits

log = logging.getLogger(__name__)


def held_out_seen(data: RunData, earlier: Path) -> int | None:
    """Number of held-out clips with the name or pixels of a clip that an earlier run, or session of
    this run, was trained on; None if the earlier run has no table of splits, or if it is of another
    large store. Warns of such clips.

    Args:
        data: clips and splits of the session that begins.
        earlier: the earlier run's folder, or this run's before its table of splits is replaced.
    """
    try:
        record = read_record(earlier)
        splits, content = read_splits(earlier, record["splits"]), record["store"]["content"]
    except (RunError, KeyError):
        return None
    if splits is None:
        return None
    if splits.table is None:
        # Of a large store only the splits are known, in its order.
        if content != data.store.content:
            return None
        both = (splits.codes == CODES["train"]) & (data.splits > CODES["train"])
        seen, total = int(both.sum()), int((data.splits > CODES["train"]).sum())
    else:
        trained, held_out = splits.table[splits.codes == CODES["train"]], data.held_out
        both = held_out["key"].isin(trained["key"]) | held_out["crc32c"].isin(trained["crc32c"])
        seen, total = int(both.sum()), len(held_out)
    if seen:
        log.warning(
            "%d of %d held-out clips have the name or the pixels of clips that these weights were "
            "trained on before (%s): their metrics will be too good",
            seen, total, earlier,
        )  # fmt: skip
    return seen


def held_out_seen_by_init(data: RunData, weights: Path) -> int | None:
    """``held_out_seen`` for the run with the weights of ``model.init``. Warns if its training clips
    are unknown, as for an export.

    Args:
        weights: a snapshot, an export, or the folder of a checkpoint.
    """
    in_run = weights.parent.name in (SNAPSHOTS, CHECKPOINTS)
    seen = held_out_seen(data, weights.parent.parent) if in_run else None
    if seen is None and (data.splits > CODES["train"]).any():
        log.warning(
            "%s does not say which clips it was trained on: if some of them are held out here, "
            "their metrics will be too good",
            weights,
        )
    return seen
