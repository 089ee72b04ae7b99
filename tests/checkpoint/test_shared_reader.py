"""A checkpoint of which each rank reads a part."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from thread_group import Threads, on_each_rank
from torch import Tensor

from dist_train.checkpoint import format as checkpoint_format
from dist_train.checkpoint.format import load_checkpoint, rank_file
from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.checkpoint.shared_reader import SharedTensors
from dist_train.checkpoint.writer import CheckpointWriter
from dist_train.files import crc32c_of_file

NAMES = ("a", "b", "c", "number")


def tensor_of(name: str) -> Tensor:
    return torch.tensor(7) if name == "number" else torch.full((2, 3), float(ord(name)))


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_each_file_is_read_by_one_rank_and_every_rank_has_all_tensors(
    readers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(group: Threads) -> None:
        writer = CheckpointWriter(tmp_path, group, keep=RetentionPolicy(1))
        writer.save(1, {name: tensor_of(name) for name in NAMES[group.rank :: group.world]}, {})
        writer.finish()

    assert on_each_rank(3, write) == []
    read: Counter[str] = Counter()
    lock = threading.Lock()

    def counted(path: Path) -> int:
        with lock:
            read[path.name] += 1
        return crc32c_of_file(path)

    monkeypatch.setattr(checkpoint_format, "crc32c_of_file", counted)

    def load(group: Threads) -> None:
        own, _ = load_checkpoint(tmp_path / "step-1", group.rank, group.world)
        shared = SharedTensors(group, own)
        assert shared.keys() == set(NAMES)
        assert "missing" not in shared
        for name in NAMES:
            assert torch.equal(shared[name], tensor_of(name)), name

    assert on_each_rank(readers, load) == []
    assert read == {rank_file(rank): 1 for rank in range(3)}
