"""Tensors in a file, as the safetensors library reads them."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import google_crc32c
import pytest
import torch
from safetensors.torch import load_file, save
from syncs import Sync, record_syncs
from torch import Tensor

from dist_train.checkpoint import tensor_file
from dist_train.checkpoint.tensor_file import CHUNK, DTYPES, STAGE, Sum, write_tensors


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


def sum_of(path: Path) -> Sum:
    data = path.read_bytes()
    return Sum(len(data), google_crc32c.value(data))


def test_what_is_written_is_on_the_disk_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the safetensors library reads it."""
    path = tmp_path / "a.safetensors"
    # A longer file of an earlier session.
    path.write_bytes(bytes(10_000_000))
    syncs = record_syncs(monkeypatch)
    written = write_tensors(path, tensors())
    assert syncs == [Sync(path, size=written.size)]
    assert written == sum_of(path)
    read, expected = load_file(path), tensors()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_no_tensors(tmp_path: Path) -> None:
    assert write_tensors(tmp_path / "a", {}) == sum_of(tmp_path / "a")
    assert load_file(tmp_path / "a") == {}


def test_the_file_is_as_long_as_the_library_makes_it(tmp_path: Path) -> None:
    """No gap and no byte that the format does not ask for."""
    path = tmp_path / "a.safetensors"
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors().items()}
    written = write_tensors(path, contiguous)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert written.size - header == sum(tensor.nbytes for tensor in contiguous.values())
    assert abs(written.size - len(save(contiguous))) < 64


def test_little_memory_is_taken_beside_the_tensors(tmp_path: Path) -> None:
    layout = torch.channels_last_3d
    weights = {str(n): torch.ones(64, 128, 4, 8, 8).to(memory_format=layout) for n in range(3)}
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "a.safetensors", weights)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * CHUNK < weights["0"].nbytes


def assert_written_well(path: Path) -> None:
    """More than one write, and a rest that fills none."""
    content = {"a": torch.arange(STAGE // 2 + 1001)}
    written = write_tensors(path, content)
    assert written == sum_of(path)
    assert written.size == path.stat().st_size
    assert torch.equal(load_file(path)["a"], content["a"])


def test_a_file_system_in_memory(tmp_path: Path) -> None:
    """Many have no writes past the cache."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is none")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert_written_well(Path(folder) / "a.safetensors")


def test_a_write_that_the_device_refuses_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of odd length is by most."""
    monkeypatch.setattr(tensor_file, "ALIGNED", 1)
    assert_written_well(tmp_path / "a.safetensors")
