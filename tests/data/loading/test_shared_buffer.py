"""The arena: regions are never lent twice at a time, and come back with their last tensor."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import FrameType

import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data.loading.shared_buffer import PAGE, SLACK, Arena

MB = 1 << 20


def lent(arena: Arena, size: int) -> int:
    offset = arena.lend(size)
    assert offset is not None
    return offset


def memory_of(arena: Arena) -> int:
    """Bytes of its pages."""
    return os.fstat(arena._descriptor).st_blocks * 512


def test_region_comes_back_with_the_last_tensor_on_it() -> None:
    arena = Arena(4 * MB)
    first = arena.tensor(lent(arena, MB), (4, MB // 4))
    row = first[2]
    second = arena.tensor(lent(arena, MB), (MB,))
    assert second.data_ptr() - first.data_ptr() == MB
    del first
    assert lent(arena, MB) == 2 * MB, "a row still holds the first"
    del row
    assert lent(arena, MB) == 0


def test_region_comes_back_without_running_python() -> None:
    """Python drops the KeyboardInterrupt of a Ctrl-C that arrives in a callback of a reference."""
    arena = Arena(4 * MB)
    tensor = arena.tensor(lent(arena, MB), (MB,))
    ran: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            ran.append(frame.f_code.co_name)

    sys.setprofile(note)
    del tensor
    sys.setprofile(None)
    assert ran == []
    assert lent(arena, MB) == 0


def test_there_is_no_region_where_all_are_lent() -> None:
    arena = Arena(4 * PAGE)
    whole = arena.tensor(lent(arena, 3 * PAGE + 1), (3 * PAGE + 1,))
    assert arena.lend(1) is None
    del whole
    assert arena.lend(1) == 0


@given(st.lists(st.tuples(st.integers(1, 5 * PAGE), st.integers(0, 5)), max_size=40))
def test_regions_do_not_overlap(steps: list[tuple[int, int]]) -> None:
    arena = Arena(20 * PAGE)
    held: list[torch.Tensor] = []
    for number, (size, dropped) in enumerate(steps):
        offset = arena.lend(size)
        if offset is not None:
            held.append(arena.tensor(offset, (size,)).fill_(number))
        assert all((each == each[0]).all() for each in held)
        assert len({int(each[0]) for each in held}) == len(held)
        del held[dropped : dropped + 1]


def test_memory_of_one_large_batch_is_given_back() -> None:
    arena = Arena(64 * MB)
    assert memory_of(arena) == 0
    large = arena.tensor(lent(arena, 32 * MB), (32 * MB,)).fill_(1)
    assert memory_of(arena) == 32 * MB
    del large
    small = arena.tensor(lent(arena, MB), (MB,))
    assert memory_of(arena) <= SLACK * MB
    assert (small == 1).all()


def test_its_pages_are_used_again() -> None:
    arena = Arena(64 * MB)
    for _ in range(8):
        arena.tensor(lent(arena, 4 * MB), (4 * MB,)).fill_(1)
    assert memory_of(arena) == 4 * MB


def test_pages_are_made_before_they_are_written_to() -> None:
    arena = Arena(64 * MB)
    kept = arena.tensor(lent(arena, MB), (MB,)).fill_(3)
    offset = lent(arena, 3 * MB + 5)
    behind = arena.tensor(lent(arena, MB), (MB,)).fill_(4)
    region = arena.writable(offset, 3 * MB + 5)
    assert memory_of(arena) == 5 * MB + PAGE
    assert (region == 0).all()
    region[:] = 7
    assert (arena.writable(offset, 3 * MB + 5) == 7).all(), "content is kept"
    assert (kept == 3).all()
    assert (behind == 4).all()


def test_a_limit_on_files_is_no_limit_on_memory() -> None:
    """To the kernel, this memory is a file."""
    arena = Arena(4 * MB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, hard))
    try:
        arena.writable(0, MB)[:] = 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert memory_of(arena) == MB


def test_nothing_is_left_of_it() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    arena = Arena(MB)
    tensor = arena.tensor(lent(arena, 3), (3,)).fill_(5)
    del arena
    assert tensor.tolist() == [5, 5, 5], "memory lives as long as a tensor on it"
    del tensor
    assert len(list(Path("/proc/self/fd").iterdir())) == before
