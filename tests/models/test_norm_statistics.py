from __future__ import annotations

import pytest
import torch

from dist_train.errors import ModelError
from dist_train.models.norm import norms
from dist_train.models.norm_statistics import precise_statistics
from dist_train.models.resnet3d import ResNet3D

BATCHES = [[8, 5], [8, 8, 3], [8]]


def test_statistics_are_those_of_all_real_values_together(make_model):
    model: ResNet3D = make_model(10, width=4)
    batches = [torch.randn(len(frames), 1, 8, 64, 64) + 3 for frames in BATCHES]
    with torch.no_grad(), precise_statistics(model):
        for clips, frames in zip(batches, BATCHES, strict=True):
            model(clips, torch.tensor(frames))
    with torch.no_grad():
        values = torch.cat(
            [
                model.stem.conv(clip[None, :, :n])[0].flatten(1)
                for clips, frames in zip(batches, BATCHES, strict=True)
                for clip, n in zip(clips, frames, strict=True)
            ],
            dim=1,
        ).double()
    norm = model.stem.norm
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    var = values.var(1, correction=0)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-6, atol=1e-6)
    assert norm.num_batches_tracked == 0
    assert norm.observer is None


def test_without_a_batch_or_after_an_error_nothing_moves(make_model):
    model = make_model(10, width=4)
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(ModelError, match="saw no batch"), precise_statistics(model):
        pass

    def interrupted() -> None:
        with precise_statistics(model):
            model(torch.randn(1, 1, 8, 64, 64))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(norm.observer is None for norm in norms(model))
