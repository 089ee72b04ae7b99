"""The table of a submission: a row for each clip that was asked for, also for rejected ones."""

from __future__ import annotations

import io

import pandas as pd

from dist_train.data.job import MANIFEST
from dist_train.data.plain import read_plain
from dist_train.data.store import REJECTED, Store
from dist_train.errors import StoreError

MOST_BYTES = 2**31


def complete_submission(
    called: pd.DataFrame, store: Store, *, split: str | None, rejected_as: int
) -> tuple[pd.DataFrame, int]:
    """Add the clips that the store rejected, and put the rows in the order of its manifest.

    Args:
        called: ``filename`` and ``stalled`` of the predicted clips.
        split: the split that was asked for; None is all clips. Rejected clips are of a split only
            if the manifest gave it.
        rejected_as: their ``stalled``, 0 or 1.

    Returns:
        The table, and how many of its rows are of rejected clips.

    Raises:
        StoreError: the store's list of rejected clips, or of all clips, cannot be used.
    """
    number = sum(store.info["rejected"].values())
    rejected = _read(store, REJECTED)["file"].tolist() if number else []
    if len(rejected) != number:
        raise _unusable(store, REJECTED, "it does not list as many clips as were rejected")
    if not (store.folder / MANIFEST).exists() and not rejected:
        return called, 0
    manifest = _read(store, MANIFEST)
    asked = manifest["filename"][manifest["filename"].isin(rejected)]
    if split is not None:
        asked = asked[manifest["split"] == split]
    rows = pd.concat([called, pd.DataFrame({"filename": asked, "stalled": rejected_as})])
    place = pd.Series(range(len(manifest)), index=manifest["filename"])
    order = rows["filename"].map(place).argsort(kind="stable")
    return rows.iloc[order].reset_index(drop=True), len(asked)


def _read(store: Store, name: str) -> pd.DataFrame:
    try:
        content = read_plain(store.folder / name, most=MOST_BYTES)
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        wanted = {"file"} if name == REJECTED else {"filename", "split"}
        if not wanted <= set(table.columns) or table[sorted(wanted)[0]].duplicated().any():
            raise ValueError("it is no such table")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _unusable(store, name, str(reason)) from None
    return table


def _unusable(store: Store, name: str, reason: str) -> StoreError:
    return StoreError(
        f"rows of rejected clips are missing from the submission ({reason})",
        where=store.folder / name,
        fix="Run 'dist-train verify' with --repair.",
    )
