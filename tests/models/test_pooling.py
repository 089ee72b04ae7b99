import torch

from dist_train.models.frames import valid_frames
from dist_train.models.pooling import global_average_pool


def random_features() -> torch.Tensor:
    return torch.randn(3, 4, 6, 2, 5, generator=torch.Generator().manual_seed(0))


def test_without_padding_it_is_the_mean():
    x = random_features()
    torch.testing.assert_close(global_average_pool(x), x.flatten(2).mean(dim=2))


def test_padded_frames_do_not_count():
    x = random_features()
    frames = torch.tensor([6, 1, 4])
    expected = torch.stack([x[b, :, :n].mean(dim=(1, 2, 3)) for b, n in enumerate(frames)])
    valid = valid_frames(frames, x)
    torch.testing.assert_close(global_average_pool(x, valid), expected)

    x[1, :, 1:] = float("nan")
    x[2, :, 4:] = 1e30
    torch.testing.assert_close(global_average_pool(x, valid), expected)


def test_bfloat16_is_averaged_in_float32_and_float64_stays():
    x = random_features().bfloat16()
    valid = valid_frames(torch.tensor([6, 1, 4]), x)
    assert torch.equal(global_average_pool(x, valid), global_average_pool(x.float(), valid))
    assert torch.equal(global_average_pool(x), global_average_pool(x.float()))
    assert global_average_pool(x.double(), valid).dtype == torch.float64
