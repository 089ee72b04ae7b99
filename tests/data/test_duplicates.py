"""Clips of the same pixels are counted, and kept out of different splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import said, tiny_config
from make_media import store_of
from tables import table_of

from dist_train.data import duplicates
from dist_train.data.duplicates import describe_duplicates, find_duplicates
from dist_train.data.store.reader import Store
from dist_train.errors import PlanError
from dist_train.run.data import open_data

# Clips that are copies, and the clip that each is a copy of. Every fourth clip is positive.
COPIES = {9: 1, 21: 1, 33: 2, 44: 7}


def copies_in(folder: Path, **columns: list[str]) -> Path:
    """The folder of a store of 48 clips with ``COPIES``."""
    clips: list[Any] = [*np.random.default_rng(0).integers(0, 256, (48, 4, 8, 8), dtype=np.uint8)]
    # The bytes of clip 5 in another shape are another clip.
    clips[46] = clips[5].reshape(8, 4, 8)
    pixels = [clips[COPIES.get(number, number)] for number in range(48)]
    labels = [int(number % 4 == 0) for number in range(48)]
    return store_of(folder, pixels, label=labels, **columns).folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    groups = [f"g{number % 12}" for number in range(48)]
    return copies_in(tmp_path_factory.mktemp("copies"), group=groups)


def firsts(store: Store) -> list[str]:
    """The key of each clip's first copy, or its own."""
    copies, keys = find_duplicates(store), store.table["key"]
    keys[copies.clips] = keys[copies.first]
    return keys.tolist()


def test_copies_are_found_and_told(store: Path) -> None:
    opened = Store(store)
    expected = [f"clip{COPIES.get(number, number):03}" for number in range(48)]
    assert firsts(opened) == expected
    told = (
        "7 clips have the same pixels as another clip (2 of them with opposite labels), such as "
        "'clip007.npy' (negative) and 'clip044.npy' (positive)"
    )
    assert describe_duplicates(opened) == told
    assert told in said("info", store)
    assert told in said("verify", store, "--workers", 1)
    source = ("--manifest", store.parent / "clips.csv", "--source", store.parent / "raw")
    assert told in said("prepare", *source, "--out", store.parent / "again", "--roi", "none")


def test_equal_checksums_alone_make_no_copies(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(store)
    # As by chance: checksum and shape of clips 3 and 8 are the same, their pixels are not.
    frame = opened.table.frame()
    frame.loc[8, "crc32c"] = frame.loc[3, "crc32c"]
    opened.table = table_of(frame)
    assert firsts(opened)[8] == "clip008"
    # If there are too many pixels to read, the checksum decides.
    monkeypatch.setattr(duplicates, "MOST_PIXELS", 0)
    assert firsts(opened)[8] == "clip003"


@pytest.mark.parametrize("groups", ["stratify", "disjoint"])
def test_training_refuses_copies_across_splits_unless_told(
    store: Path, groups: str, caplog: pytest.LogCaptureFixture
) -> None:
    def splits(duplicates: str, fold: int) -> Any:
        settings = ("split.folds=3", f"split.fold={fold}", f"split.groups={groups}")
        config = tiny_config(store, Path("out"), *settings, f"split.duplicates={duplicates}")
        return open_data(config, training=True).clips["split"]

    message = r"clips have the same pixels as a clip in another split.* such as 'clip\d+.npy' \("
    for fold in range(3):
        with pytest.raises(PlanError, match=message + r".*split\.duplicates=together"):
            splits("refuse", fold)
        kept = splits("keep", fold)
        assert any(kept[copy] != kept[other] for copy, other in COPIES.items())
        assert "have the same pixels" in caplog.text
        caplog.clear()
        joined = splits("together", fold)
        assert all(joined[copy] == joined[other] for copy, other in COPIES.items())
        if groups == "disjoint":
            assert joined.groupby(joined.index % 12).nunique().max() == 1
        assert not caplog.text


def test_splits_of_the_manifest_are_not_changed_for_copies(tmp_path: Path) -> None:
    store = copies_in(tmp_path, split=[("train", "val", "test")[n // 4 % 3] for n in range(48)])
    for setting in ("refuse", "together"):
        config = tiny_config(store, Path("out"), f"split.duplicates={setting}")
        with pytest.raises(PlanError, match=r"Remove the copies .* or set split\.dupl\w+=keep"):
            open_data(config, training=True)
        # A run that was trained on such splits can still be evaluated.
        open_data(config)
