"""Checkpoints: whole or not there, readable at any world size."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

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


def test_what_is_loaded_may_be_changed_without_changing_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    for tensor in load_checkpoint(path)[0].values():
        tensor.zero_()
    assert torch.equal(load_checkpoint(path)[0]["model/a.weight"], state(7)["model/a.weight"])


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert latest_valid(tmp_path) is None
    assert latest_valid(tmp_path / "missing") is None


def test_the_newest_is_the_highest_step_not_the_last_in_the_alphabet(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path / str(step), step)
        (tmp_path / str(step) / f"step-{step}").rename(tmp_path / f"step-{step}")
    assert latest_valid(tmp_path) == tmp_path / "step-100"


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


def a_folder_for_a_file(path: Path) -> None:
    lose_a_file(path)
    (path / "rank-00001.safetensors").mkdir()


def add_a_file(path: Path) -> None:
    shutil.copy(path / "rank-00001.safetensors", path / "rank-00002.safetensors")


def lose_the_marker(path: Path) -> None:
    (path / MARKER).unlink()


def tear_the_marker(path: Path) -> None:
    text = (path / MARKER).read_text()
    (path / MARKER).write_text(text[: len(text) // 2])


def empty_the_marker(path: Path) -> None:
    (path / MARKER).write_text("{}")


def make_the_marker_a_list(path: Path) -> None:
    (path / MARKER).write_text("[]")


def make_the_marker_deep(path: Path) -> None:
    (path / MARKER).write_text("[" * 100_000)


def make_the_marker_no_text(path: Path) -> None:
    (path / MARKER).write_bytes(b"\xff\xfe")


def change_a_fact(path: Path) -> None:
    text = (path / MARKER).read_text()
    assert '"k": 8' in text
    (path / MARKER).write_text(text.replace('"k": 8', '"k": 9'))


def reseal(path: Path, **changes: object) -> None:
    content = json.loads((path / MARKER).read_text())
    del content["crc32c"]
    (path / MARKER).write_text(sealed({**content, **changes}))


def lose_the_facts(path: Path) -> None:
    reseal(path, facts=None)


def another_step(path: Path) -> None:
    reseal(path, step=9)


def forget_a_rank(path: Path) -> None:
    lose_a_file(path)
    reseal(path, files=json.loads((path / MARKER).read_text())["files"][:1])
    (path / "rank-00000.safetensors").rename(path / "rank-00001.safetensors")


def name_no_files(path: Path) -> None:
    reseal(path, files=[])


def name_files_elsewhere(path: Path) -> None:
    files = json.loads((path / MARKER).read_text())["files"]
    reseal(path, files=[{**entry, "name": f"../step-4/{entry['name']}"} for entry in files])


def files_of_another_form(path: Path) -> None:
    reseal(path, files=[1, 2])


DAMAGES = [
    truncate, flip_a_bit, lose_a_file, a_folder_for_a_file, add_a_file, lose_the_marker,
    tear_the_marker, empty_the_marker, make_the_marker_a_list, make_the_marker_deep,
    make_the_marker_no_text, change_a_fact, lose_the_facts, another_step, forget_a_rank,
    name_no_files, name_files_elsewhere, files_of_another_form,
]  # fmt: skip
damaged = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@damaged
def test_a_damaged_one_is_skipped_with_a_line_in_the_log(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    before, last = save(tmp_path, 4, world=2), save(tmp_path, 8, world=2)
    damage(last)
    with caplog.at_level(logging.WARNING):
        assert latest_valid(tmp_path) == before
    (record,) = caplog.records
    assert "skipped a damaged checkpoint" in record.getMessage()
    assert str(last) in record.getMessage()
    with pytest.raises(CheckpointError):
        load_checkpoint(last)


@damaged
def test_where_all_are_damaged_the_run_does_not_start_anew(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(save(tmp_path, 8, world=2))
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


def test_hidden_files_of_the_file_system_do_no_harm(tmp_path: Path) -> None:
    path = save(tmp_path, 8)
    (path / ".nfs000001").write_bytes(b"")
    assert latest_valid(tmp_path) == path


def test_an_unfinished_one_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 8).rename(tmp_path / "step-8.partial")
    assert latest_valid(tmp_path) is None
    whole = save(tmp_path, 4)
    assert latest_valid(tmp_path) == whole


def test_the_marker_can_be_read_without_this_package(tmp_path: Path) -> None:
    marker = json.loads((save(tmp_path, 4, world=2) / MARKER).read_text())
    assert marker.keys() == {"step", "facts", "files", "crc32c"}
    for entry in marker["files"]:
        assert (tmp_path / "step-4" / entry["name"]).stat().st_size == entry["size"]
