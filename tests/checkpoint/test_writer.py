"""Writing checkpoints beside training: what is saved, when it counts, and what a failure leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import environment
from syncs import record_syncs
from thread_group import Threads, on_each_rank
from torch import Tensor

from dist_train.checkpoint import writer
from dist_train.checkpoint.format import MARKER, latest_valid, load_checkpoint
from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.checkpoint.tensor_file import Sum, write_tensors
from dist_train.checkpoint.writer import CheckpointWriter, HostBuffers
from dist_train.distributed.collectives import run_on_all_ranks
from dist_train.errors import CheckpointError


@dataclass
class Alone:
    """A group of one."""

    rank: int = 0
    world: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def writer_in(folder: Path, **keep: Any) -> CheckpointWriter:
    return CheckpointWriter(folder, Alone(), keep=RetentionPolicy(**{"last": 9, **keep}))


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
    facts: dict[str, Any] = {"metrics": {"mcc": 0.5}}
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
    assert marker["facts"] == {"metrics": {"mcc": 0.5}}


def test_it_is_ready_when_written_and_exists_when_committed(
    tmp_path: Path, gate: threading.Event
) -> None:
    writer = writer_in(tmp_path)
    assert not writer.ready
    assert writer.commit() is None
    writer.save(1, {"a": torch.zeros(3)}, {})
    assert not writer.ready
    gate.set()
    writer._flight.entry.result(30)
    assert writer.ready
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


def test_the_same_files_at_each_save_of_the_same_state(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save(tmp_path / folder, 4)
    for name in (MARKER, "rank-00000.safetensors"):
        one, two = (tmp_path / folder / "step-4" / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_saving_again_over_an_unfinished_one(tmp_path: Path) -> None:
    for step in (3, 8):
        left = tmp_path / f"step-{step}.partial"
        left.mkdir()
        (left / "rank-00005.safetensors").write_bytes(b"of a larger world")
    path = save(tmp_path, 8)
    assert names_in(path) == {MARKER, "rank-00000.safetensors"}
    assert names_in(tmp_path) == {"step-8"}


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, last=2)
    assert names_in(tmp_path) == {"step-10", "step-11"}


def test_milestones_and_the_best_are_kept(tmp_path: Path) -> None:
    writer = writer_in(tmp_path, last=1, every=4, best="val/auc")
    for step, mcc in enumerate([0.1, 0.9, 0.3, 0.2, 0.8, None, 0.4], start=1):
        writer.save(step, {"a": torch.zeros(1)}, {"metrics": {"val/auc": mcc}})
    writer.finish()
    assert names_in(tmp_path) == {"step-2", "step-4", "step-7"}


def test_a_damaged_one_is_not_the_best(tmp_path: Path) -> None:
    writer = writer_in(tmp_path, last=1, best="val/auc")
    for step, mcc in ((1, 0.9), (2, 0.5)):
        writer.save(step, {"a": torch.zeros(1)}, {"metrics": {"val/auc": mcc}})
    writer.finish()
    assert names_in(tmp_path) == {"step-1", "step-2"}
    marker = tmp_path / "step-1" / MARKER
    marker.write_text(marker.read_text()[:-5])
    save(tmp_path, 3, last=1, best="val/auc")
    assert names_in(tmp_path) == {"step-2", "step-3"}


def test_the_new_one_is_kept_when_a_damaged_one_has_a_higher_step(tmp_path: Path) -> None:
    """The run went on from step 4, because step 8 was damaged, and comes to step 6."""
    for step in (4, 8):
        save(tmp_path, step)
    (tmp_path / "step-8" / MARKER).unlink()
    path = save(tmp_path, 6, last=1)
    assert latest_valid(tmp_path) == path
    assert names_in(tmp_path) == {"step-6"}


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    foreign = {"step-x", "step-²", "notes"}
    for name in foreign:
        (tmp_path / name).mkdir()
    for step in (1, 2):
        save(tmp_path, step, last=1)
    assert latest_valid(tmp_path) == tmp_path / "step-2"
    assert names_in(tmp_path) == foreign | {"step-2"}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from test_writer import Alone
from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.checkpoint.writer import CheckpointWriter
from dist_train.errors import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
# At the tensors, and at the marker.
for name, limit, values in (("tensors", 20_000, 9000), ("marker", 100, 1)):
    folder = Path(sys.argv[1], name)
    writer = CheckpointWriter(folder, Alone(), keep=RetentionPolicy(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    writer.save(8, {"a": torch.zeros(values)}, {})
    try:
        writer.commit()
    except CheckpointError as error:
        print(error)
    assert sorted(path.name for path in folder.iterdir()) == ["step-4"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.save(8, {"a": torch.zeros(values)}, {})
    writer.finish()
"""


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    """The limit on the size of a file makes the write itself fail, half way through. When there is
    room again, the same writer goes on."""
    for name in ("tensors", "marker"):
        save(tmp_path / name, 4)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=environment(PYTHONPATH=":".join(sys.path)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for name, line in zip(("tensors", "marker"), said, strict=True):
        folder = tmp_path / name
        assert line.startswith(f"{folder / 'step-8'}: the checkpoint cannot be written")
        assert "process 0: File too large" in line
        assert names_in(folder) == {"step-8"}
        assert latest_valid(folder) == folder / "step-8"


def test_a_failure_of_one_rank_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """A folder is where rank 1 is to write its file."""
    (tmp_path / "step-8.partial" / "rank-00001.safetensors").mkdir(parents=True)

    def act(group: Threads) -> None:
        writer = CheckpointWriter(tmp_path, group, keep=RetentionPolicy(1))
        writer.save(8, {f"of {group.rank}": torch.zeros(2)}, {})
        with pytest.raises(CheckpointError, match="process 1: Is a directory"):
            writer.commit()
        assert names_in(tmp_path) == set()
        assert writer.finish() is None
        run_on_all_ranks(group, lambda: None)  # both have looked before either writes again
        # What failed has left nothing behind that a later one trips over.
        writer.save(8, {f"of {group.rank}": torch.zeros(2)}, {})
        writer.finish()

    assert on_each_rank(2, act) == []
    assert latest_valid(tmp_path) == tmp_path / "step-8"


def test_a_failure_is_told_by_the_save_that_follows(tmp_path: Path) -> None:
    (tmp_path / "step-8.partial" / "rank-00000.safetensors").mkdir(parents=True)
    writer = writer_in(tmp_path)
    writer.save(8, {"a": torch.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="Is a directory"):
        writer.save(9, {"a": torch.zeros(2)}, {})
    assert names_in(tmp_path) == set()


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def act(group: Threads) -> None:
        writer = CheckpointWriter(tmp_path / "file", group, keep=RetentionPolicy(1))
        writer.save(8, {"a": torch.zeros(2)}, {})
        writer.finish()

    raised = on_each_rank(2, act)
    assert len(raised) == 2
    assert all("process 0: Not a directory" in str(error) for error in raised)


def test_what_cannot_be_written_at_all_is_an_error_that_says_why(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    writer.save(8, {"a": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(CheckpointError, match="complex64") as raised:
        writer.finish()
    assert isinstance(raised.value.__cause__, KeyError)
    assert names_in(tmp_path) == set()


def test_facts_are_json(tmp_path: Path) -> None:
    writer = writer_in(tmp_path)
    writer.save(8, {"a": torch.zeros(2)}, {"size": (1, 2), "by number": {10: "x", 9: "y"}})
    writer.finish()
    _, marker = load_checkpoint(tmp_path / "step-8")
    assert marker["facts"] == {"size": [1, 2], "by number": {"10": "x", "9": "y"}}
    assert json.loads((tmp_path / "step-8" / MARKER).read_text())["facts"] == marker["facts"]


# Host copies in memory that is kept.


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_copy_has_the_layout_of_the_tensor(layout: torch.memory_format) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2, 2).to(memory_format=layout))
    copy = HostBuffers().copy({"a": weight})["a"]
    assert torch.equal(copy, weight)
    assert copy.stride() == weight.stride()
    assert copy.data_ptr() != weight.data_ptr()
    assert not copy.requires_grad


def test_the_memory_is_the_same_each_time() -> None:
    buffers = HostBuffers()
    weight = torch.zeros(4, 5)
    places = set()
    for value in range(3):
        copy = buffers.copy({"a": weight.fill_(value)})["a"]
        assert torch.equal(copy, weight)
        places.add(copy.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("other", [torch.ones(5, 4), torch.ones(4, 5).half(), torch.ones(5, 4).T])
def test_memory_of_another_form_is_not_used_again(other: torch.Tensor) -> None:
    buffers = HostBuffers()
    buffers.copy({"a": torch.zeros(4, 5)})
    copy = buffers.copy({"a": other})["a"]
    assert copy.dtype == other.dtype
    assert copy.stride() == other.stride()
    assert torch.equal(copy, other)


def test_tensors_that_are_gone_are_not_held() -> None:
    buffers = HostBuffers()
    buffers.copy({"a": torch.zeros(4), "b": torch.zeros(4)})
    assert buffers.copy({"b": torch.ones(4)}).keys() == {"b"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_copies_from_a_device_are_complete_and_pinned() -> None:
    buffers = HostBuffers()
    weight = torch.zeros(2**24, device="cuda")
    for value in range(3):
        copy = buffers.copy({"a": weight.fill_(value)})["a"]
        assert copy.is_pinned()
        assert bool((copy == value).all())
