import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.errors import ModelError
from dist_train.models.padding import ValidFrames, clear_padding, strided, valid_frames

FORMATS = [torch.contiguous_format, torch.channels_last_3d]


def clips_and_valid(frames: list[int], depth: int) -> tuple[Tensor, ValidFrames]:
    clips = torch.randn(len(frames), 3, depth, 4, 5, generator=torch.Generator().manual_seed(0))
    valid = valid_frames(torch.tensor(frames), clips)
    assert valid is not None
    return clips, valid


def test_mask_and_index_name_the_real_frames():
    _, valid = clips_and_valid([2, 1, 3], depth=3)
    expected = [[True, True, False], [True, False, False], [True, True, True]]
    assert valid.mask.tolist() == expected
    assert valid.index.tolist() == [0, 1, 3, 6, 7, 8]


def test_a_batch_without_padding_has_nothing_to_mark():
    clips = torch.zeros(2, 1, 7, 4, 4)
    assert valid_frames(None, clips) is None
    assert valid_frames(torch.tensor([7, 7]), clips) is None
    assert strided(None, 2) is None
    assert clear_padding(clips, None) is clips


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gather_joins_the_clips_and_scatter_is_its_inverse(memory_format):
    clips, valid = clips_and_valid([4, 6, 1], depth=6)
    clips = clips.contiguous(memory_format=memory_format)
    images = valid.gather(clips)
    joined = torch.cat([clips[0, :, :4], clips[1], clips[2, :, :1]], dim=1).transpose(0, 1)
    assert torch.equal(images, joined)

    back = valid.scatter(images, like=clips)
    assert torch.equal(back, torch.where(valid.mask[:, None, :, None, None], clips, 0.0))
    assert back.stride() == clips.stride()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_clear_padding_zeroes_even_what_is_not_a_number(memory_format):
    clips, valid = clips_and_valid([4, 6], depth=6)
    clips[0, :, 4:] = float("nan")
    clips = clips.contiguous(memory_format=memory_format)
    cleared = clear_padding(clips, valid)
    assert not cleared[0, :, 4:].any()
    assert torch.equal(cleared[0, :, :4], clips[0, :, :4])
    assert torch.equal(cleared[1], clips[1])
    assert cleared.stride() == clips.stride()


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_strided_lengths_are_those_of_the_clip_alone(kernel, stride):
    lengths = list(range(1, 14))
    _, valid = clips_and_valid(lengths, depth=15)
    behind = strided(valid, stride)
    assert behind is not None
    weight = torch.ones(1, 1, kernel)
    alone = [
        F.conv1d(torch.zeros(1, 1, n), weight, stride=stride, padding=kernel // 2).shape[2]
        for n in lengths
    ]
    assert behind.mask.sum(dim=1).tolist() == alone
    assert behind.mask.shape[1] == (15 - 1) // stride + 1


@pytest.mark.parametrize(
    "frames",
    [
        torch.tensor([3]),
        torch.tensor([[3, 3]]),
        torch.tensor([3.0, 3.0]),
        torch.tensor([0, 3]),
        torch.tensor([3, 6]),
    ],
)
def test_lengths_that_do_not_fit_the_batch_are_refused(frames):
    with pytest.raises(ModelError, match="frames is"):
        valid_frames(frames, torch.zeros(2, 1, 5, 4, 4))
