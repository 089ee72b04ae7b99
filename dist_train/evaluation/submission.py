"""The table of a submission: a row for each clip that was asked for, also for rejected ones."""

from __future__ import annotations

import io

import pandas as pd

from dist_train.data.store.reader import MANIFEST, Store
from dist_train.errors import FileError, StoreError
from dist_train.files import read_plain

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
        StoreError: the store's list of all clips cannot be used.
    """
    manifest = _read_manifest(store)
    rejected = ~manifest["filename"].isin(store.table["filename"])
    if rejected.sum() != sum(store.info["rejected"].values()):
        raise _unusable(store, "it does not list as many other clips as were rejected")
    asked = manifest["filename"][rejected]
    if split is not None:
        asked = asked[manifest["split"] == split]
    rows = pd.concat([called, pd.DataFrame({"filename": asked, "stalled": rejected_as})])
    place = pd.Series(range(len(manifest)), index=manifest["filename"])
    order = rows["filename"].map(place).argsort(kind="stable")
    return rows.iloc[order].reset_index(drop=True), len(asked)


def _read_manifest(store: Store) -> pd.DataFrame:
    try:
        content = read_plain(store.folder / MANIFEST, most_bytes=MOST_BYTES)
        # A name may hold a carriage return.
        table = pd.read_csv(
            io.BytesIO(content), dtype=str, keep_default_na=False, lineterminator="\n"
        )
        if not {"filename", "split"} <= set(table.columns) or table["filename"].duplicated().any():
            raise ValueError("it is no table of clips")
    except FileError as error:
        raise _unusable(store, error.what) from None
    except ValueError as error:
        raise _unusable(store, str(error)) from None
    return table


def _unusable(store: Store, reason: str) -> StoreError:
    return StoreError(
        f"rows of rejected clips are missing from the submission ({reason})",
        where=store.folder / MANIFEST,
        fix="Run 'dist-train verify', or prepare the store anew in another folder.",
    )
