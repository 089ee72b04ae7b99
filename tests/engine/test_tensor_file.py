"""Tensors in a file, as the safetensors library reads them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import google_crc32c
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dist_train.engine.tensor_file import CHUNK, DTYPES, sum_of_file, write_tensors


def tensors() -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 5, 6, generator=numbers)
    return {
        "channels last": weight.to(memory_format=torch.channels_last_3d),
        "transposed": weight[0, 0, 0].T,
        "every second": weight[::2],
        "expanded": torch.ones(1).expand(7),
        "number": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "trained": torch.nn.Parameter(weight.clone()),
        'ünïcode/"name"': torch.zeros(1),
        "longer than a piece": torch.randn(CHUNK // 2, generator=numbers),
    } | {str(dtype): weight.mul(50).to(dtype) for dtype in DTYPES}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors())
    read = load_file(path)
    expected = tensors()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("content", [{}, tensors()], ids=["none", "many"])
def test_size_and_checksum_are_those_of_the_file(
    tmp_path: Path, content: dict[str, Tensor]
) -> None:
    path = tmp_path / "a.safetensors"
    written = write_tensors(path, content)
    data = path.read_bytes()
    assert written == (len(data), google_crc32c.value(data)) == sum_of_file(path)


def test_the_file_is_as_long_as_the_library_makes_it(tmp_path: Path) -> None:
    """No gap and no byte that the format does not ask for."""
    path = tmp_path / "a.safetensors"
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors().items()}
    written = write_tensors(path, contiguous)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert written.size - header == sum(tensor.nbytes for tensor in contiguous.values())
    assert abs(written.size - len(save(contiguous))) < 64


def test_no_more_than_two_tensors_are_held_a_second_time(tmp_path: Path) -> None:
    layout = torch.channels_last_3d
    weights = {str(n): torch.ones(64, 64, 4, 8, 8).to(memory_format=layout) for n in range(8)}
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "a.safetensors", weights)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    one = weights["0"].nbytes
    assert one < peak < 2.2 * one
