"""Clips of the same pixels are counted, and kept out of different splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import said, tiny_config

from dist_train.data import duplicates
from dist_train.data.duplicates import describe_duplicates, find_duplicates
from dist_train.data.store.reader import Store
from dist_train.errors import PlanError
from dist_train.run.data import open_data

# Copies: (clip, of which other one). Clip 0 of each 4 is positive.
COPIES = {9: 1, 21: 1, 33: 2, 44: 7}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    random = np.random.default_rng(0)
    clips = random.integers(0, 256, (48, 4, 8, 8), dtype=np.uint8)
    # The bytes of another clip in another shape are another clip.
    shapes: dict[int, Any] = {46: (clips[5].reshape(8, 4, 8))}
    (folder / "raw").mkdir()
    rows = ["filename,label,group"]
    for number in range(48):
        pixels = shapes.get(number, clips[COPIES.get(number, number)])
        np.save(folder / "raw" / f"c{number:02}.npy", pixels)
        rows.append(f"c{number:02}.npy,{int(number % 4 == 0)},g{number % 12}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    printed = said(
        *("prepare", "--manifest", folder / "clips.csv", "--source", folder / "raw"),
        *("--out", folder / "store", "--roi", "none"),
    )
    assert "7 clips have the same pixels as another clip (2 of them with opposite" in printed
    return folder / "store"


def test_copies_are_found_and_told(store: Path) -> None:
    opened = Store(store)
    expected = [f"c{COPIES.get(number, number):02}" for number in range(48)]
    assert find_duplicates(opened).tolist() == expected
    told = (
        "7 clips have the same pixels as another clip (2 of them with opposite labels), such as "
        "'c07.npy' (negative) and 'c44.npy' (positive)"
    )
    assert describe_duplicates(opened) == told
    assert told in said("info", store)
    assert told in said("verify", store, "--workers", 1)


def test_equal_checksums_alone_make_no_copies(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(store)
    # As by chance: the table takes clips 3 and 8 for alike, and their pixels say that they are not.
    opened.table.loc[8, "crc32c"] = opened.table.loc[3, "crc32c"]
    assert find_duplicates(opened)[8] == "c08"
    # Where copies are too many to be read, the checksum is what is known.
    monkeypatch.setattr(duplicates, "MOST_PIXELS", 0)
    assert find_duplicates(opened)[8] == "c03"


@pytest.mark.parametrize("groups", ["stratify", "disjoint"])
def test_training_refuses_copies_across_splits_unless_told(
    store: Path, groups: str, caplog: pytest.LogCaptureFixture
) -> None:
    def splits(duplicates: str, fold: int) -> Any:
        settings = ("split.folds=3", f"split.fold={fold}", f"split.groups={groups}")
        config = tiny_config(store, Path("out"), *settings, f"split.duplicates={duplicates}")
        return open_data(config, training=True).clips["split"]

    message = r"clips have the same pixels as a clip in another split.* such as 'c\d\d.npy' \("
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


def test_splits_of_the_manifest_are_not_changed_for_copies(store: Path, tmp_path: Path) -> None:
    rows = ["filename,label,split"]
    rows += [
        f"c{number:02}.npy,{int(number % 4 == 0)},{('train', 'val', 'test')[number // 4 % 3]}"
        for number in range(48)
    ]
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    source = store.parent / "raw"
    options = ("--source", source, "--out", tmp_path / "store", "--roi", "none")
    said("prepare", "--manifest", tmp_path / "clips.csv", *options)
    for setting in ("refuse", "together"):
        config = tiny_config(tmp_path / "store", Path("out"), f"split.duplicates={setting}")
        with pytest.raises(PlanError, match=r"Remove the copies .* or set split\.dupl\w+=keep"):
            open_data(config, training=True)
        # What was trained on such splits can still be judged.
        open_data(config)
