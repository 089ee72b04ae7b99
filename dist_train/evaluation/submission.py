"""The table of a submission: a row for each clip of the manifest, also for rejected ones."""

from __future__ import annotations

import io
import logging

import pandas as pd

from dist_train.data.store.reader import MANIFEST, REJECTED, Store
from dist_train.errors import FileError, StoreError
from dist_train.files import read_plain, reason_of
from dist_train.run.folder import SUBMISSION

log = logging.getLogger(__name__)

MOST_BYTES = 2**31


def make_submission(
    predictions: pd.DataFrame, threshold: float, store: Store, *, rejected_as: int
) -> pd.DataFrame:
    """A table of ``filename`` and ``stalled`` in the order of the store's manifest.

    Its clips are those of the test split, or else of val, or else, for another store than the
    run's, all. A rejected clip belongs to a split only if the manifest names it. Warns of rejected
    clips.

    Args:
        predictions: the predicted clips, with ``filename``, ``split`` (empty in another store) and
            ``calibrated``.
        threshold: a clip is stalled if ``calibrated`` is greater.
        rejected_as: ``stalled`` of rejected clips, 0 or 1.

    Raises:
        StoreError: the store's manifest cannot be used.
    """
    manifest = _read_manifest(store)
    rejected = manifest[~manifest["filename"].isin(store.table.texts("filename"))]
    if len(rejected) != sum(store.info["rejected"].values()):
        raise _unusable(store, "it does not list as many other clips as were rejected")
    split = next((name for name in ("test", "val") if (predictions["split"] == name).any()), None)
    if split is not None:
        predictions = predictions[predictions["split"] == split]
        rejected = rejected[rejected["split"] == split]
    called = predictions[["filename"]].assign(
        stalled=(predictions["calibrated"] > threshold).astype(int)
    )
    rows = pd.concat([called, rejected[["filename"]].assign(stalled=rejected_as)])
    if len(rejected):
        log.warning(
            "%d of the %d rows of %s are of clips that the store rejected (see %s): they have %d, "
            "the likelier class",
            len(rejected), len(rows), SUBMISSION, f"{store.name}/{REJECTED}", rejected_as,
        )  # fmt: skip
    place = pd.Series(manifest.index, index=manifest["filename"])
    return rows.iloc[rows["filename"].map(place).argsort(kind="stable")]


def _read_manifest(store: Store) -> pd.DataFrame:
    """The store's list of all clips, with ``filename`` and ``split``."""
    try:
        content = read_plain(store.file(MANIFEST), most_bytes=MOST_BYTES)
        # A name may hold a carriage return.
        table = pd.read_csv(
            io.BytesIO(content), dtype=str, keep_default_na=False, lineterminator="\n"
        )
        if not {"filename", "split"} <= set(table.columns) or table["filename"].duplicated().any():
            raise ValueError("it is no table of clips")
    except (FileError, ValueError) as error:
        raise _unusable(store, reason_of(error)) from None
    return table


def _unusable(store: Store, reason: str) -> StoreError:
    return StoreError(
        f"rows of rejected clips are missing from the submission ({reason})",
        where=f"{store.name}/{MANIFEST}",
        fix="Run 'dist-train verify', or prepare the store anew in another folder.",
    )
