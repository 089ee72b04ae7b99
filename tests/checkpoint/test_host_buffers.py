"""Host copies in memory that is reused."""

from __future__ import annotations

import pytest
import torch

from dist_train.checkpoint.host_buffers import HostBuffers


def test_a_copy_has_the_layout_of_the_tensor() -> None:
    weight = torch.randn(4, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d)
    copy = HostBuffers().copy({"a": torch.nn.Parameter(weight)})["a"]
    assert torch.equal(copy, weight)
    assert copy.stride() == weight.stride()
    assert copy.data_ptr() != weight.data_ptr()
    assert not copy.requires_grad


def test_memory_is_reused_by_tensors_of_the_same_form_and_else_released() -> None:
    buffers = HostBuffers()
    first = buffers.copy({"a": torch.zeros(4, 5), "b": torch.zeros(4)})["a"]
    again = buffers.copy({"a": torch.ones(4, 5)})
    assert again.keys() == {"a"}
    assert torch.equal(again["a"], torch.ones(4, 5))
    assert again["a"].data_ptr() == first.data_ptr()
    for other in (torch.ones(5, 4), torch.ones(4, 5).half(), torch.ones(5, 4).T):
        copy = buffers.copy({"a": other})["a"]
        assert (copy.dtype, copy.stride()) == (other.dtype, other.stride())
        assert torch.equal(copy, other)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_copies_from_a_device_are_complete_and_pinned() -> None:
    buffers = HostBuffers()
    weight = torch.zeros(2**24, device="cuda")
    for value in range(3):
        copy = buffers.copy({"a": weight.fill_(value)})["a"]
        assert copy.is_pinned()
        assert bool((copy == value).all())
