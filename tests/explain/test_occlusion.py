"""Occlusion of a model that looks at one place: only hiding that place costs anything."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_train.explain.occlusion import MOST_PARTS, hidden_frames, hidden_places


def clip_of(depth: int) -> Tensor:
    clip = torch.zeros(1, 1, depth, 32, 24)
    clip[0, 0, 7, 20:24, 4:8] = 1
    return clip


def test_the_frame_that_counts_is_found() -> None:
    found = hidden_frames(clip := clip_of(10), lambda hidden: float((clip - hidden)[0, 0, 7].sum()))
    # 16 voxels of 1 become their mean over ten frames.
    np.testing.assert_allclose(found, np.where(np.arange(10) == 7, 16 * 0.9, 0), atol=1e-5)


def test_a_deep_clip_is_hidden_in_parts() -> None:
    calls: list[int] = []
    clip = torch.rand(1, 1, 100, 8, 8)

    def lost(hidden: Tensor) -> float:
        changed = (hidden != clip)[0, 0].flatten(1).any(1)
        calls.append(int(changed.sum()))
        return 1.0

    assert hidden_frames(clip, lost).tolist() == [1.0] * 100
    assert len(calls) == MOST_PARTS
    assert sum(calls) == 100


def test_the_place_that_counts_is_found() -> None:
    clip = clip_of(10)
    found = hidden_places(clip, lambda hidden: float((clip - hidden)[:, :, :, 20:24, 4:8].sum()))
    assert found.shape == (32, 24)
    top, left = np.unravel_index(found.argmax(), found.shape)
    assert 16 <= top < 28
    assert 0 <= left < 12
    assert found[:8].max() == found[:, 16:].max() == 0
