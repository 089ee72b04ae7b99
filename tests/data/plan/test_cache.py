"""The sorted clips of a large set: sorted once, by one process, whole or not there."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from dist_train.class_ratio import ClassRatio
from dist_train.data.plan import cache
from dist_train.data.plan.cache import sorted_classes
from dist_train.data.plan.depth_order import by_depth
from dist_train.data.plan.plan import plan_of
from dist_train.data.plan.rules import PlanRules
from dist_train.errors import PlanError

CLIPS = 30_000


def columns() -> tuple[np.ndarray, np.ndarray]:
    """(depths int16, labels int8); a label of -1 takes no part."""
    rng = np.random.default_rng(0)
    depths = rng.integers(17, 435, CLIPS).astype(np.int16)
    return depths, rng.choice([-1, 0, 1], CLIPS, p=[0.1, 0.8, 0.1]).astype(np.int8)


def never() -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("a set that is there was read again")


@pytest.mark.parametrize("piece", [1000, 1 << 21])
def test_files_hold_what_sorting_in_memory_gives(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PIECE", piece)
    depths, labels = columns()
    sorted_classes(tmp_path, "a", columns)
    found = sorted_classes(tmp_path, "a", never)
    for clips, label in zip(found, (1, 0), strict=True):
        numbers = np.flatnonzero(labels == label)
        expected = by_depth(numbers, depths[numbers].astype(np.int64), "clips")
        assert clips.clips.dtype == np.uint32
        np.testing.assert_array_equal(clips.clips, expected.clips)
        np.testing.assert_array_equal(clips.depths, expected.depths)
        np.testing.assert_array_equal(clips.starts, expected.starts)
        assert clips.digest == expected.digest


def test_another_set_replaces_the_one_that_is_there(tmp_path: Path) -> None:
    old, _ = sorted_classes(tmp_path, "a", columns)
    before = old.clips.copy()
    depths, labels = columns()
    new, _ = sorted_classes(tmp_path, "b", lambda: (depths[:100], labels[:100]))
    assert len(new) < 100
    assert len(list(tmp_path.glob("sorted.*"))) == 1
    # Whoever has the old one open goes on.
    np.testing.assert_array_equal(old.clips, before)


def test_what_a_killed_process_left_does_not_count(tmp_path: Path) -> None:
    torn = tmp_path / "sorted.0123abcd"
    torn.mkdir()
    (torn / "positives.u32").write_bytes(b"torn")
    sorted_classes(tmp_path, "a", columns)
    assert not torn.exists()
    assert len(sorted_classes(tmp_path, "a", never)[0]) > 0


def test_a_set_that_was_being_replaced_is_not_there_any_more(tmp_path: Path) -> None:
    def fail() -> tuple[np.ndarray, np.ndarray]:
        return np.array([0]), np.array([1])

    sorted_classes(tmp_path, "a", columns)
    with pytest.raises(PlanError):
        sorted_classes(tmp_path, "b", fail)
    assert len(sorted_classes(tmp_path, "a", columns)[0]) > 0


def test_files_of_another_version_are_made_anew(tmp_path: Path) -> None:
    sorted_classes(tmp_path, "a", columns)
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 0}))
    with pytest.raises(AssertionError, match="read again"):
        sorted_classes(tmp_path, "a", never)


def _ask(folder: Path, reads: Path, digests: multiprocessing.SimpleQueue) -> None:
    def read() -> tuple[np.ndarray, np.ndarray]:
        with reads.open("a") as file:
            file.write("read\n")
        return columns()

    positives, negatives = sorted_classes(folder, "a", read)
    rules = PlanRules(32, ClassRatio(1, 3), 0)
    digests.put(plan_of(positives, negatives, rules).global_batch(5).tolist())


def test_of_many_processes_one_sorts(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    batches = spawn.SimpleQueue()
    reads = tmp_path / "reads"
    processes = [
        spawn.Process(target=_ask, args=(tmp_path / "cache", reads, batches)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [batches.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert found[0] == found[1] == found[2]
    assert reads.read_text() == "read\n"


def test_a_class_without_clips(tmp_path: Path) -> None:
    depths = np.arange(1, 5)
    positives, negatives = sorted_classes(tmp_path, "a", lambda: (depths, np.zeros(4, np.int8)))
    assert (len(positives), len(negatives)) == (0, 4)
    positives, negatives = sorted_classes(tmp_path, "a", never)
    with pytest.raises(PlanError, match="holds 0 positives"):
        plan_of(positives, negatives, PlanRules(4, ClassRatio(1, 3), 0))


@pytest.mark.parametrize(
    ("depths", "labels", "message"),
    [
        (np.ones(3, np.int16), np.ones(4, np.int8), "not one number for each"),
        (np.array([5, 0, 3]), np.ones(3, np.int8), "^1: a clip is less than one frame"),
    ],
)
def test_columns_that_do_not_fit(
    tmp_path: Path, depths: np.ndarray, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        sorted_classes(tmp_path, "a", lambda: (depths, labels))
    assert not (tmp_path / "classes.json").exists()
