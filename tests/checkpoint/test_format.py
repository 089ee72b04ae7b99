"""Checkpoints: complete or absent, readable at any world size."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_group import Threads, on_each_rank
from torch import Tensor

from dist_train.checkpoint.format import MARKER, assign_tensors, latest_valid, load_checkpoint
from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.checkpoint.writer import CheckpointWriter
from dist_train.errors import CheckpointError
from dist_train.files import sealed

FIRST, SECOND = (f"rank-0000{rank}.safetensors" for rank in range(2))


def state(step: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(step)
    return {
        "model/a.weight": torch.randn(3, 4, 2, generator=random),
        "model/a.bias": torch.randn(3, generator=random),
        "model/count": torch.tensor(step),
        "exp_avg/a.weight": torch.randn(3, 4, 2, generator=random),
        "epoch/logits": torch.empty(0),
    }


def save(folder: Path, step: int, *, world: int = 1) -> Path:
    tensors = state(step)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}

    def act(group: Threads) -> None:
        mine = assign_tensors(sizes, group.rank, world)
        kept = {name: tensor for name, tensor in tensors.items() if mine(name)}
        writer = CheckpointWriter(folder, group, keep=RetentionPolicy(9))
        writer.save(step, kept, {"k": step})
        assert writer.finish() == folder / f"step-{step}"

    assert on_each_rank(world, act) == []
    return folder / f"step-{step}"


@given(
    sizes=st.dictionaries(st.text(), st.integers(0, 1000), min_size=1),
    world=st.integers(1, 9),
)
def test_each_tensor_is_written_by_one_rank_and_ranks_differ_by_one_tensor(
    sizes: dict[str, int], world: int
) -> None:
    owned = [list(filter(assign_tensors(sizes, rank, world), sizes)) for rank in range(world)]
    assert sorted(name for names in owned for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in owned]
    assert max(loads) - min(loads) <= max(sizes.values())


@pytest.mark.parametrize("world", [1, 3])
def test_round_trip_at_any_world_size(tmp_path: Path, world: int) -> None:
    path = save(tmp_path, 7, world=world)
    tensors, marker = load_checkpoint(path)
    expected = state(7)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
        tensor.zero_()
    assert torch.equal(load_checkpoint(path)[0]["model/a.weight"], expected["model/a.weight"])
    assert (marker["step"], marker["facts"]) == (7, {"k": 7})
    assert [p.name for p in tmp_path.iterdir()] == ["step-7"]
    # The marker can be read without this package.
    plain = json.loads((path / MARKER).read_text())
    assert plain.keys() == {"step", "facts", "files", "crc32c"}
    assert [(path / e["name"]).stat().st_size for e in plain["files"]] == [
        entry["size"] for entry in marker["files"]
    ]
    assert len(marker["files"]) == world


def test_the_newest_is_the_highest_step_not_the_last_in_the_alphabet(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "missing") is None
    save(tmp_path, 200).rename(tmp_path / "step-200.partial")
    assert latest_valid(tmp_path) is None, "an unfinished one is no checkpoint"
    for step in (9, 20, 100):
        path = save(tmp_path, step)
        # Hidden files of file systems do no harm.
        (path / ".nfs000001").write_bytes(b"")
    assert latest_valid(tmp_path) == tmp_path / "step-100"
    assert latest_valid(tmp_path, before=100) == tmp_path / "step-20"


def truncate(path: Path) -> None:
    os.truncate(path / SECOND, (path / SECOND).stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / FIRST).read_bytes())
    content[-1] ^= 1
    (path / FIRST).write_bytes(content)


def lose_a_file(path: Path) -> None:
    (path / SECOND).unlink()


def a_folder_for_a_file(path: Path) -> None:
    lose_a_file(path)
    (path / SECOND).mkdir()


def add_a_file(path: Path) -> None:
    shutil.copy(path / SECOND, path / "rank-00002.safetensors")


def lose_the_marker(path: Path) -> None:
    (path / MARKER).unlink()


def change_a_fact(path: Path) -> None:
    text = (path / MARKER).read_text()
    assert '"k": 8' in text
    (path / MARKER).write_text(text.replace('"k": 8', '"k": 9'))


def tear_the_marker(path: Path) -> None:
    text = (path / MARKER).read_text()
    (path / MARKER).write_text(text[: len(text) // 2])


def entries(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / MARKER).read_text())["files"]


def reseal(path: Path, **changes: object) -> None:
    content = json.loads((path / MARKER).read_text())
    del content["crc32c"]
    (path / MARKER).write_text(sealed({**content, **changes}))


def forget_a_rank(path: Path) -> None:
    lose_a_file(path)
    reseal(path, files=entries(path)[:1])
    (path / FIRST).rename(path / SECOND)


def name_files_elsewhere(path: Path) -> None:
    reseal(path, files=[{**e, "name": f"../step-4/{e['name']}"} for e in entries(path)])


DAMAGES: list[Callable[[Path], None] | bytes | dict[str, object]] = [
    truncate, flip_a_bit, lose_a_file, a_folder_for_a_file, add_a_file, lose_the_marker,
    change_a_fact, tear_the_marker, forget_a_rank, name_files_elsewhere,
    # In place of the marker.
    b"{}", b"[]", b"\xff\xfe", b"[" * 100_000,
    # Changes of a marker whose checksum is right.
    {"facts": None}, {"step": 9}, {"files": []}, {"files": [1, 2]},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: getattr(d, "__name__", str(d)[:20]))
def test_a_damaged_one_is_skipped_and_without_another_the_run_does_not_start_anew(
    tmp_path: Path,
    damage: Callable[[Path], None] | bytes | dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, last = save(tmp_path, 4, world=2), save(tmp_path, 8, world=2)
    if isinstance(damage, bytes):
        (last / MARKER).write_bytes(damage)
    elif isinstance(damage, dict):
        reseal(last, **damage)
    else:
        damage(last)
    with caplog.at_level(logging.WARNING):
        assert latest_valid(tmp_path) == before
    (record,) = caplog.records
    assert "skipped a damaged checkpoint" in record.getMessage()
    assert str(last) in record.getMessage()
    with pytest.raises(CheckpointError):
        load_checkpoint(last)
    shutil.rmtree(before)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is whole"):
        latest_valid(tmp_path)


@pytest.mark.parametrize("harms", [200, pytest.param(1500, marks=pytest.mark.soak)])
def test_a_random_harm_to_any_file_is_never_accepted(tmp_path: Path, harms: int) -> None:
    path = save(tmp_path, 8, world=3)
    whole = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    draw = random.Random(0)
    for _ in range(harms):
        name = draw.choice(list(whole))
        content = bytearray(whole[name])
        harm = draw.choice(["cut", "flip", "flip", "lengthen", "remove", "swap"])
        if harm == "cut":
            del content[draw.randrange(len(content)) :]
        elif harm == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif harm == "lengthen":
            content += bytes([draw.randrange(256)])
        elif harm == "swap":
            content[:] = whole[draw.choice([other for other in whole if other != name])]
        if harm == "remove":
            (path / name).unlink()
        else:
            (path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="none of the 1"):
            latest_valid(tmp_path)
        (path / name).write_bytes(whole[name])
    assert latest_valid(tmp_path) == path
