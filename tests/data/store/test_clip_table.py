"""The clip table: what records it gives back, damage, and that it is rebuilt."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_media import store_of
from tables import DEFAULTS

from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.worker import BatchDataset
from dist_train.data.store.build import finalize
from dist_train.data.store.clip_table import (
    NUMBERS,
    RUN,
    SAMPLING,
    TABLE,
    ClipTable,
    write_table,
)
from dist_train.data.store.reader import MARKER, Store
from dist_train.data.store.verify import verify
from dist_train.data.types import DTYPES, METADATA
from dist_train.errors import StoreError

SHARDS = 9
GREY = DTYPES["uint8"], 1
#: Text that UTF-8 can hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LENGTH = st.floats(0, 1e9, exclude_min=True)
RECORD = st.fixed_dictionaries(
    {
        "filename": TEXT,
        "group": st.sampled_from(["", "g", "G", "M\u00e4us", "\U0001f400", "\uffff"]) | TEXT,
        "split": st.sampled_from(["", "train", "val", "test"]),
        "label": st.integers(-1, 1),
        "weight": st.floats(0, 1e300),
        "crowd_score": st.none() | st.floats(0, 1),
        "tier1": st.booleans(),
        "shape": st.lists(st.integers(1, 2**31 - 1), min_size=3, max_size=3),
        "shard": st.integers(0, SHARDS - 1),
        "offset": st.integers(0, 2**63 - 1),
        "crc32c": st.integers(0, 2**32 - 1),
    },
    optional={
        "metadata": st.dictionaries(st.sampled_from(["site", "a.b", "\u00b5"]), TEXT),
        "spacing": st.lists(st.none() | LENGTH, min_size=3, max_size=3),
        "interval": st.none() | LENGTH,
    },
)
FORMS = st.tuples(st.sampled_from([*DTYPES]), st.sampled_from([1, 3]))
RECORDS = st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]{1,95}", fullmatch=True), RECORD)


@given(RECORDS, FORMS)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any], of_clips: tuple[str, int]
) -> None:
    dtype, channels = of_clips
    form = DTYPES[dtype], channels
    for record in given.values():
        record["shape"] += [channels] if channels > 1 else []
        record |= {"dtype": dtype} if dtype != "uint8" else {}
    records = sorted(given.items(), key=lambda entry: entry[0].encode())
    path = tmp_path_factory.mktemp("table") / TABLE
    opened = ClipTable.open(path, write_table(path, records, SHARDS, form), len(records))
    assert opened.differs(records, SHARDS, form) is None
    names = {name for _, record in records for name in record.get("metadata", ())}
    assert opened.metadata == tuple(sorted(f"{METADATA}{name}" for name in names))
    said = [
        (*(record.get("spacing") or [None] * 3), record.get("interval")) for _, record in records
    ]
    for table in (opened, pickle.loads(pickle.dumps(opened)), ClipTable.of(records, SHARDS, form)):
        for name, column in zip(SAMPLING, zip(*said, strict=True), strict=said != []):
            expected = np.array([np.nan if value is None else value for value in column])
            np.testing.assert_array_equal(table.sampling(name), expected)
        rows = table.frame().to_dict("records")
        assert len(rows) == len(table) == len(records)
        for clip, ((key, record), row) in enumerate(zip(records, rows, strict=True)):
            assert table.clip_of(key) == clip
            assert row.pop("key") == table.text("key", clip) == table.key(clip).decode() == key
            shape = [row.pop(name) for name in ("frames", "height", "width")]
            assert shape == record["shape"][:3]
            metadata = record.get("metadata", {})
            assert [row.pop(f"{METADATA}{n}") for n in names] == [
                metadata.get(n, "") for n in names
            ]
            crowd = row.pop("crowd_score")
            assert (
                np.isnan(crowd) if record["crowd_score"] is None else crowd == record["crowd_score"]
            )
            assert row == {name: record[name] for name in row}
        for name in ("group", "split"):
            assert table.names(name) == sorted({r[name] for _, r in records}, key=str.encode)


@given(st.lists(st.integers(0, 300), min_size=1, unique=True), st.integers(0, 300))
def test_any_key_is_found(numbers: list[int], wanted: int) -> None:
    keys = sorted(f"k{number}" for number in numbers)
    record = DEFAULTS | {"shape": [1, 1, 1], "crowd_score": None}
    table = ClipTable.of([(key, record) for key in keys], 1, GREY)
    assert table.clip_of(f"k{wanted}") == (keys.index(f"k{wanted}") if wanted in numbers else None)
    assert table.keys(0, len(keys)) == [key.encode() for key in keys]
    assert table.keys(len(keys) - 1, len(keys)) == [keys[-1].encode()]


def test_a_column_that_begins_late_is_blank_before() -> None:
    record = DEFAULTS | {"shape": [1, 1, 1], "crowd_score": None}
    late = record | {"metadata": {"site": "B"}, "group": "b", "interval": 0.5}
    keys = [f"{number:06}" for number in range(RUN + 2)]
    records = [(key, record) for key in keys[:-1]] + [(keys[-1], late)]
    table = ClipTable.of(records, 1, GREY)
    assert table.texts("meta:site", np.array([0, RUN, RUN + 1])) == ["", "", "B"]
    assert table.texts("group", np.array([0, RUN + 1])) == ["", "b"]
    np.testing.assert_array_equal(table.sampling("interval")[[0, RUN, -1]], [np.nan, np.nan, 0.5])
    assert np.isnan(table.sampling("spacing.z")).all()


def test_a_length_that_is_none_is_unknown() -> None:
    record = DEFAULTS | {"shape": [1, 1, 1], "crowd_score": None}
    lengths = [0, -1, np.inf, np.nan, 2]
    records = [(f"k{n}", record | {"spacing": [v, 1, None]}) for n, v in enumerate(lengths)]
    table = ClipTable.of(records, 1, GREY)
    np.testing.assert_array_equal(table.sampling("spacing.z"), [*[np.nan] * 4, 2.0])
    assert table.differs(records, 1, GREY) is None


def store_in(folder: Path) -> Path:
    clips = [np.full((2, 6, 6), number, np.uint8) for number in range(8)]
    return store_of(folder, clips, label=[0, 1] * 4, group=[f"g{n % 3}" for n in range(8)]).folder


def take_all(store: Store) -> None:
    for name in store.table.columns:
        assert len(store.table[name]) == 8


def test_damage_is_found_in_every_section(tmp_path: Path) -> None:
    """By opening, by the use of a column, or by verify; and finalize rebuilds the same bytes."""
    store = store_in(tmp_path)
    path, marker = store / TABLE, (store / MARKER).read_bytes()
    whole = path.read_bytes()
    for at in range(0, len(whole), 41):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (fault,) = verify(store, workers=1)
        assert fault.where == path
        assert "is damaged" in fault.what
        with pytest.raises(StoreError, match=r"the clip table is damaged.*'dist-train finalize'"):
            take_all(Store(store))
    for content in (b"", whole[:-1], whole[:50], whole + whole):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"the clip table is damaged"):
            Store(store)
    finalize(store)
    assert path.read_bytes() == whole
    assert (store / MARKER).read_bytes() == marker


def test_the_table_of_another_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = store_in(tmp_path / "a")
    other = store_of(tmp_path / "b", [np.zeros((1, 2, 2), np.uint8)] * 2, label=[0, 1]).folder
    (one / TABLE).write_bytes((other / TABLE).read_bytes())
    with pytest.raises(StoreError, match=r"the clip table is damaged \(its header is not the one"):
        Store(one)


def test_flipped_labels_are_not_trained_on(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    path = store / TABLE
    labels = np.array([0, 1] * 4, np.int8).tobytes()
    assert path.read_bytes().count(labels) == 1
    path.write_bytes(path.read_bytes().replace(labels, labels[::-1]))
    clips = ClipDataset(Store(store), size=(4, 4), max_frames=None, augment=None)
    with pytest.raises(StoreError, match=r"damaged \(the checksum of 'label'\)"):
        clips.labels([3])


def test_a_worker_gets_a_path(tmp_path: Path) -> None:
    clips = ClipDataset(Store(store_in(tmp_path)), size=(4, 4), max_frames=3, augment=None)
    content = pickle.dumps(BatchDataset(clips, None, None, 1.0))
    assert len(content) < 10_000
    copy = pickle.loads(content).clips
    assert copy.depths([0, 7]).tolist() == [2, 2]
    assert copy.labels([0, 7]).tolist() == [0, 1]
    np.testing.assert_array_equal(copy.store.read(5), clips.store.read(5))


WRONG = {name: [least - 1, most + 1, 1.0, True] for name, (_, least, most) in NUMBERS.items()}
WRONG |= {"weight": [np.inf, "1"], "group": [None, "\ud800"], "tier1": [1], "crowd_score": ["a"]}
WRONG |= {"shape": [[1, 1], [1, 1, 1, 3], None], "dtype": ["uint16", "float64"]}
WRONG |= {"metadata": [None, ["site"], "site", {"site": 1}]}
WRONG |= {"spacing": [[1.0], ["1", 1, 1], 1], "interval": ["1", True]}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_another_form_are_refused(tmp_path: Path, name: str) -> None:
    for value in WRONG[name]:
        record = DEFAULTS | {"shape": [1, 1, 1], "crowd_score": None, name: value}
        if name in ("frames", "height", "width"):
            record["shape"] = [
                value if side == name else 1 for side in ("frames", "height", "width")
            ]
        with pytest.raises(StoreError, match="make no clip table"):
            write_table(tmp_path / TABLE, [("key", record)], 1, GREY)
        assert not any(tmp_path.iterdir())
