"""Checkpoints: whole or not there, readable at any world size."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import environment
from torch import Tensor

from dist_train.engine.checkpoint import (
    MARKER,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    share,
)
from dist_train.errors import CheckpointError


@dataclass
class Threads:
    """A process group of threads, so that ranks really meet."""

    rank: int
    world: int
    barrier: threading.Barrier
    board: list[Any]

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(10)
        gathered = list(self.board)
        self.barrier.wait(10)
        return gathered


def on_each_rank(world: int, act: Callable[[Threads], None]) -> list[Exception]:
    """Run ``act`` on every rank, and return what was raised."""
    barrier, board = threading.Barrier(world), [None] * world
    raised: list[Exception] = []

    def one(rank: int) -> None:
        try:
            act(Threads(rank, world, barrier, board))
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def state(step: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(step)
    return {
        "model/a.weight": torch.randn(3, 4, 2, generator=random),
        "model/a.bias": torch.randn(3, generator=random),
        "model/count": torch.tensor(step),
        "exp_avg/a.weight": torch.randn(3, 4, 2, generator=random),
        "epoch/logits": torch.empty(0),
    }


def save(folder: Path, step: int, *, world: int = 1, keep_last: int = 9) -> Path:
    tensors = state(step)

    def act(group: Threads) -> None:
        mine = share(list(tensors), group.rank, world)
        kept = {name: tensor for name, tensor in tensors.items() if mine(name)}
        save_checkpoint(folder, step, kept, {"k": step}, group, keep_last=keep_last)

    assert on_each_rank(world, act) == []
    return folder / f"step-{step}"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_tensor_is_written_by_exactly_one_rank(world: int) -> None:
    names = list(state(0))
    owners = [[name for name in names if share(names, rank, world)(name)] for rank in range(world)]
    assert sorted(name for owned in owners for name in owned) == sorted(names)
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_round_trip_at_any_world_size(tmp_path: Path, world: int) -> None:
    path = save(tmp_path, 7, world=world)
    tensors, marker = load_checkpoint(path)
    expected = state(7)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    assert (marker["step"], marker["facts"]) == (7, {"k": 7})
    assert len(marker["files"]) == world
    assert [p.name for p in tmp_path.iterdir()] == ["step-7"]


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "missing") is None


def test_the_newest_is_the_highest_step_not_the_last_in_the_alphabet(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path / str(step), step)
        (tmp_path / str(step) / f"step-{step}").rename(tmp_path / f"step-{step}")
    assert newest_whole(tmp_path) == tmp_path / "step-100"


def truncate(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_a_file(path: Path) -> None:
    (path / "rank-00001.safetensors").unlink()


def lose_the_marker(path: Path) -> None:
    (path / MARKER).unlink()


def tear_the_marker(path: Path) -> None:
    text = (path / MARKER).read_text()
    (path / MARKER).write_text(text[: len(text) // 2])


def empty_the_marker(path: Path) -> None:
    (path / MARKER).write_text("{}")


def make_the_marker_a_list(path: Path) -> None:
    (path / MARKER).write_text("[]")


def lose_the_facts(path: Path) -> None:
    (path / MARKER).write_text('{"step": 8, "files": []}')


DAMAGES = [
    truncate, flip_a_bit, lose_a_file, lose_the_marker, tear_the_marker, empty_the_marker,
    make_the_marker_a_list, lose_the_facts,
]  # fmt: skip
damaged = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@damaged
def test_a_damaged_one_is_skipped_with_a_line_in_the_log(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    before, last = save(tmp_path, 4, world=2), save(tmp_path, 8, world=2)
    damage(last)
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path) == before
    (record,) = caplog.records
    assert "skipped a damaged checkpoint" in record.getMessage()
    assert str(last) in record.getMessage()
    with pytest.raises(CheckpointError):
        load_checkpoint(last)


@damaged
def test_where_all_are_damaged_the_run_does_not_start_anew(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for step in (4, 8):
        damage(save(tmp_path, step, world=2))
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        newest_whole(tmp_path)


def test_an_unfinished_one_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 8).rename(tmp_path / "step-8.partial")
    assert newest_whole(tmp_path) is None
    whole = save(tmp_path, 4)
    assert newest_whole(tmp_path) == whole


def test_what_is_not_ours_is_no_checkpoint_and_is_left_alone(tmp_path: Path) -> None:
    for foreign in ("step-x", "step-²", "notes"):
        (tmp_path / foreign).mkdir()
    for step in (1, 2):
        save(tmp_path, step, keep_last=1)
    assert newest_whole(tmp_path) == tmp_path / "step-2"
    assert {path.name for path in tmp_path.iterdir()} == {"step-x", "step-²", "notes", "step-2"}


def test_saving_again_over_an_unfinished_one(tmp_path: Path) -> None:
    left = tmp_path / "step-8.partial"
    left.mkdir()
    (left / "rank-00005.safetensors").write_bytes(b"of a larger world")
    path = save(tmp_path, 8)
    assert sorted(p.name for p in path.iterdir()) == [MARKER, "rank-00000.safetensors"]
    assert not left.exists()


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]


def test_the_new_one_is_kept_when_a_damaged_one_has_a_higher_step(tmp_path: Path) -> None:
    """The run went on from step 4, because step 8 was damaged, and comes to step 6."""
    save(tmp_path, 4)
    flip_a_bit(save(tmp_path, 8))
    path = save(tmp_path, 6, keep_last=1)
    assert newest_whole(tmp_path) == path
    assert [p.name for p in tmp_path.iterdir()] == ["step-6"]


FULL_DISK = """
import resource, signal, sys
from dataclasses import dataclass
from pathlib import Path
import torch
from dist_train.engine.checkpoint import save_checkpoint
from dist_train.errors import CheckpointError

@dataclass
class Alone:
    rank: int = 0
    world: int = 1
    def gather(self, value):
        return [value]

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    tensors = {"a": torch.zeros(int(sys.argv[3]))}
    save_checkpoint(Path(sys.argv[1]), 8, tensors, {}, Alone(), keep_last=1)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "values"), [(20_000, 9000), (100, 1)], ids=["at the tensors", "at the marker"]
)
def test_a_full_disk_leaves_nothing_that_looks_whole(
    tmp_path: Path, limit: int, values: int
) -> None:
    """The limit on the size of a file makes the write itself fail, half way through."""
    before = save(tmp_path, 4)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit), str(values)],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'step-8'}: the checkpoint cannot be written")
    assert "process 0: File too large" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]
    assert newest_whole(tmp_path) == before


@dataclass
class Failing:
    """Tensors whose owner's file cannot be written: a folder is in its place."""

    folder: Path
    names: list[str] = field(default_factory=lambda: ["a", "b"])

    def save(self, group: Threads) -> None:
        kept = {self.names[group.rank]: torch.zeros(2)}
        save_checkpoint(self.folder, 8, kept, {}, Blocking(group, self.folder), keep_last=1)


@dataclass
class Blocking:
    """Passes on to a group, and puts a folder where rank 1 is about to write."""

    group: Threads
    folder: Path

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def world(self) -> int:
        return self.group.world

    def gather(self, value: Any) -> list[Any]:
        gathered = self.group.gather(value)
        aside = self.folder / "step-8.partial"
        if self.rank == 1 and aside.is_dir():
            (aside / "rank-00001.safetensors").mkdir(exist_ok=True)
        return gathered


def test_a_failure_of_one_rank_is_an_error_on_every_rank(tmp_path: Path) -> None:
    raised = on_each_rank(2, Failing(tmp_path).save)
    assert len(raised) == 2
    for error in raised:
        assert isinstance(error, CheckpointError)
        assert "process 1: " in str(error)
    assert newest_whole(tmp_path) is None


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    raised = on_each_rank(2, Failing(tmp_path / "file").save)
    assert len(raised) == 2
    assert all("process 0: Not a directory" in str(error) for error in raised)


def test_the_marker_can_be_read_without_this_package(tmp_path: Path) -> None:
    marker = json.loads((save(tmp_path, 4, world=2) / MARKER).read_text())
    assert marker.keys() == {"step", "facts", "files"}
    for entry in marker["files"]:
        assert (tmp_path / "step-4" / entry["name"]).stat().st_size == entry["size"]
