"""Host copies in memory that is kept."""

from __future__ import annotations

import pytest
import torch

from dist_train.engine.host_buffers import HostBuffers


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
