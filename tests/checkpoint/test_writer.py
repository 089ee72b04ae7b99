"""Writing checkpoints beside training: what is saved, when it counts, and what a failure leaves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from room import LittleRoom
from syncs import record_syncs
from thread_group import ALONE, Threads, on_each_rank
from torch import Tensor

from dist_train.checkpoint import writer
from dist_train.checkpoint.format import MARKER, latest_valid, load_checkpoint
from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.checkpoint.tensor_file import Sum, write_tensors
from dist_train.checkpoint.writer import CheckpointWriter
from dist_train.errors import CheckpointError


def writer_in(folder: Path, **keep: Any) -> CheckpointWriter:
    return CheckpointWriter(folder, ALONE, keep=RetentionPolicy(**{"last": 9, **keep}))


def save(folder: Path, step: int, **keep: Any) -> Path:
    writer = writer_in(folder, **keep)
    writer.save(step, {"a": torch.full((3,), float(step))}, {})
    path = writer.finish()
    assert path == folder / f"step-{step}"
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing threads wait until it is set."""
    opened = threading.Event()

    def write_behind_it(path: Path, tensors: Mapping[str, Tensor]) -> Sum:
        assert opened.wait(30)
        return write_tensors(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", write_behind_it)
    yield opened
    opened.set()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_what_is_saved_is_what_was_there_at_the_call(
    tmp_path: Path, gate: threading.Event, layout: torch.memory_format
) -> None:
    weight = torch.arange(120.0).reshape(2, 3, 4, 5, 1).to(memory_format=layout).requires_grad_()
    facts: dict[str, Any] = {"metrics": {"mcc": 0.5}, "size": (1, 2), "by number": {10: "x"}}
    before = weight.detach().clone()
    writer = writer_in(tmp_path)
    writer.save(1, {"weight": weight}, facts)
    with torch.no_grad():
        weight.zero_()
    facts["metrics"]["mcc"] = 1.0
    gate.set()
    path = writer.finish()
    assert path is not None
    tensors, marker = load_checkpoint(path)
    assert torch.equal(tensors["weight"], before)
    assert tensors["weight"].is_contiguous()
    # As JSON, which has neither tuples nor numbers as names.
    assert marker["facts"] == {"metrics": {"mcc": 0.5}, "size": [1, 2], "by number": {"10": "x"}}


def test_it_is_ready_when_written_and_exists_when_committed(
    tmp_path: Path, gate: threading.Event
) -> None:
    writer = writer_in(tmp_path)
    assert not writer.ready
    assert writer.commit() is None
    writer.save(1, {"a": torch.zeros(3)}, {})
    assert not writer.ready
    gate.set()
    while not writer.ready:
        pass
    assert latest_valid(tmp_path) is None
    assert writer.commit() == tmp_path / "step-1"
    assert not writer.ready
    assert latest_valid(tmp_path) == tmp_path / "step-1"


def test_a_second_save_commits_the_first_and_may_reuse_its_memory(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    value = torch.zeros(1000)
    for step in range(1, 6):
        value.fill_(step)
        writer.save(step, {"a": value, f"b{step}": value[:step]}, {})
        assert names_in(tmp_path) >= {f"step-{before}" for before in range(1, step)}
    writer.finish()
    for step in range(1, 6):
        tensors, _ = load_checkpoint(tmp_path / f"step-{step}")
        assert tensors.keys() == {"a", f"b{step}"}
        assert all(bool((tensor == step).all()) for tensor in tensors.values())


def test_all_ranks_see_it_whole_or_not_there(tmp_path: Path) -> None:
    """Ranks that are ready at different times commit together."""

    def act(group: Threads) -> None:
        writer = CheckpointWriter(tmp_path, group, keep=RetentionPolicy(2))
        for step in range(1, 5):
            writer.save(step, {f"of {group.rank}": torch.full((step,), group.rank)}, {})
            while not all(group.gather(writer.ready)):
                pass
            assert writer.commit() == tmp_path / f"step-{step}"
            tensors, _ = load_checkpoint(tmp_path / f"step-{step}")
            assert tensors.keys() == {f"of {rank}" for rank in range(group.world)}
            group.gather(None)
        writer.finish()

    assert on_each_rank(3, act) == []
    assert names_in(tmp_path) == {"step-3", "step-4"}


def test_shares_and_marker_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order, so that a loss of power leaves a checkpoint that is whole or none."""
    syncs = record_syncs(monkeypatch)
    path = save(tmp_path, 1)
    aside = tmp_path / "step-1.partial"
    share, marker, names, name = syncs
    assert share.path == aside / "rank-00000.safetensors"
    assert share.size == (path / share.path.name).stat().st_size
    assert marker.path.parent == aside
    assert marker.path.name.startswith(f"{MARKER}.")
    assert marker.size == (path / MARKER).stat().st_size
    assert (names.path, names.names) == (aside, {share.path.name, MARKER})
    assert (name.path, name.names) == (tmp_path, {"step-1"})


def test_saving_again_over_an_unfinished_one(tmp_path: Path) -> None:
    for step in (3, 8):
        left = tmp_path / f"step-{step}.partial"
        left.mkdir()
        (left / "rank-00005.safetensors").write_bytes(b"of a larger world")
    path = save(tmp_path, 8)
    assert names_in(path) == {MARKER, "rank-00000.safetensors"}
    assert names_in(tmp_path) == {"step-8"}


def test_last_milestones_and_the_best_that_is_not_damaged_are_kept(tmp_path: Path) -> None:
    writer = writer_in(tmp_path, last=1, every=4, best="val/auc")
    for step, auc in enumerate([0.1, 0.9, 0.3, 0.2, 0.8, None, 0.4], start=1):
        writer.save(step, {"a": torch.zeros(1)}, {"metrics": {"val/auc": auc}})
    writer.finish()
    assert names_in(tmp_path) == {"step-2", "step-4", "step-7"}
    marker = tmp_path / "step-2" / MARKER
    marker.write_text(marker.read_text()[:-5])
    save(tmp_path, 9, last=1, best="val/auc")
    assert names_in(tmp_path) == {"step-7", "step-9"}


def test_the_new_one_is_kept_when_a_damaged_one_has_a_higher_step(tmp_path: Path) -> None:
    """The run went on from step 4, because step 8 was damaged, and comes to step 6."""
    for step in (4, 8):
        save(tmp_path, step)
    (tmp_path / "step-8" / MARKER).unlink()
    path = save(tmp_path, 6, last=1)
    assert latest_valid(tmp_path) == path
    assert names_in(tmp_path) == {"step-6"}


def test_what_is_not_ours_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = {"step-x", "step-²", "notes"}
    for name in foreign:
        (tmp_path / name).mkdir()
    writer = writer_in(tmp_path, last=1)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3, 4):
            writer.save(step, {"a": torch.zeros(1)}, {})
            writer.finish()
            if step == 2:
                (tmp_path / "step-2" / "notes.txt").write_text("mine")
    assert latest_valid(tmp_path) == tmp_path / "step-4"
    assert names_in(tmp_path) == foreign | {"step-2", "step-4"}
    (record,) = caplog.records
    assert "step-2 holds files of no checkpoint, so it stays" in record.getMessage()


@pytest.mark.parametrize(("limit", "values"), [(20_000, 9000), (100, 1)], ids=["tensors", "marker"])
def test_a_full_disk_leaves_nothing_that_looks_whole(
    tmp_path: Path, little_room: LittleRoom, limit: int, values: int
) -> None:
    """The write itself fails, half way through. With room again the same writer goes on."""
    save(tmp_path, 4)
    writer = writer_in(tmp_path, last=1)
    little_room(limit)
    writer.save(8, {"a": torch.zeros(values)}, {})
    with pytest.raises(CheckpointError) as raised:
        writer.commit()
    assert str(raised.value).startswith(
        f"{tmp_path / 'step-8'}: the checkpoint cannot be written (process 0: File too large)"
    )
    assert names_in(tmp_path) == {"step-4"}
    little_room(None)
    writer.save(8, {"a": torch.zeros(values)}, {})
    writer.finish()
    assert names_in(tmp_path) == {"step-8"}
    assert latest_valid(tmp_path) == tmp_path / "step-8"


def test_a_failure_of_one_rank_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """Rank 1 finds a folder at the name of its file."""
    (tmp_path / "step-8.partial" / "rank-00001.safetensors").mkdir(parents=True)

    def act(group: Threads) -> None:
        writer = CheckpointWriter(tmp_path, group, keep=RetentionPolicy(1))
        writer.save(8, {f"of {group.rank}": torch.zeros(2)}, {})
        with pytest.raises(CheckpointError, match="process 1: Is a directory"):
            writer.commit()
        assert names_in(tmp_path) == set()
        assert writer.finish() is None
        group.gather(None)  # both have looked before either writes again
        writer.save(8, {f"of {group.rank}": torch.zeros(2)}, {})
        writer.finish()

    assert on_each_rank(2, act) == []
    assert latest_valid(tmp_path) == tmp_path / "step-8"


def test_a_failure_is_told_by_the_save_that_follows(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    writer.save(8, {"a": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(CheckpointError, match="complex64") as raised:
        writer.save(9, {"a": torch.zeros(2)}, {})
    assert isinstance(raised.value.__cause__, KeyError)
    assert names_in(tmp_path) == set()
