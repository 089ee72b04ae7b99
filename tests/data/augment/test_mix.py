"""Mixup and CutMix within groups: shares, depths and labels, however a batch is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.config import AugmentSettings
from dist_train.data.augment.mix import MixDraw, MixSampler, mix, mixed

CLIPS = [7, 3, 9, 1]


def clips(depths: list[int], *, deepest: int = 8) -> torch.Tensor:
    """Clips of random voxels in 0.5 to 1, and zeros beyond the depth: [B, 2, deepest, 6, 5]."""
    volumes = 0.5 + 0.5 * torch.rand(
        (len(depths), 2, deepest, 6, 5), generator=torch.Generator().manual_seed(0)
    )
    for volume, depth in zip(volumes, depths, strict=True):
        volume[:, depth:] = 0
    return volumes


def sampler(seed: int = 0, **settings: object) -> MixSampler:
    return MixSampler(AugmentSettings(**settings), seed)


def test_mixup_is_the_formula() -> None:
    before, after = clips([8] * 4), clips([8] * 4)
    partners, shares = mix(after, [8] * 4, [MixDraw(shift=3, share=0.7)])
    assert partners.tolist() == [3, 0, 1, 2]
    expected = 0.7 * before.numpy() + 0.3 * before.numpy()[[3, 0, 1, 2]]
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    np.testing.assert_allclose(shares, 0.7, rtol=1e-6)
    labels = mixed(torch.tensor([1.0, 0, 0, 0]), partners, shares)
    np.testing.assert_allclose(labels, [0.7, 0.3, 0, 0], rtol=1e-6)
    of_classes = mixed(torch.eye(4), partners, shares)
    expected = 0.7 * np.eye(4) + 0.3 * np.eye(4)[[3, 0, 1, 2]]
    np.testing.assert_allclose(of_classes, expected, rtol=1e-6)


def test_cutmix_puts_a_box_of_one_clip_into_another() -> None:
    before, after = clips([8] * 4), clips([8] * 4)
    box = ((0.25, 0.5), (0.0, 0.5), (0.2, 0.6))
    partners, shares = mix(after, [8] * 4, [MixDraw(1, 0.0, box)])
    expected = before.clone()
    expected[:, :, 2:6, :3, 1:4] = before.roll(-1, 0)[:, :, 2:6, :3, 1:4]
    assert torch.equal(after, expected)
    np.testing.assert_allclose(shares, 1 - 4 * 3 * 3 / (8 * 6 * 5), rtol=1e-6)
    assert partners.tolist() == [1, 2, 3, 0]


@given(
    depths=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
    axes=st.sampled_from(["mixup", "both", "space", "depth"]),
)
def test_padding_is_never_content_and_shares_are_those_of_the_content(
    depths: list[int], seed: int, axes: str
) -> None:
    """The content of each clip is its own number: 1, 2, 4 or 8; so a mean tells the shares."""
    content = torch.tensor([1.0, 2, 4, 8])
    volumes = torch.zeros(4, 1, 8, 12, 12)
    for volume, depth, value in zip(volumes, depths, content, strict=True):
        volume[:, :depth] = value
    settings = {"mixup": 1.0} if axes == "mixup" else {"cutmix": 1.0, "cutmix_axes": axes}
    draw = sampler(seed, **settings)(CLIPS, step=0)
    partners, shares = mix(volumes, depths, [draw])
    for clip, depth in enumerate(depths):
        assert (volumes[clip, :, depth:] == 0).all()
        assert (volumes[clip, :, :depth] >= min(content[clip], content[partners[clip]])).all()
        mean = volumes[clip, :, :depth].mean()
        share = shares[clip]
        expected = share * content[clip] + (1 - share) * content[partners[clip]]
        torch.testing.assert_close(mean, expected)
        beyond = min(depth, depths[partners[clip]])
        assert (volumes[clip, :, beyond:depth] == content[clip]).all()


@given(seed=st.integers(0, 10**6), step=st.integers(0, 10**6))
def test_labels_of_a_group_keep_their_sum_and_belong_to_their_clip(seed: int, step: int) -> None:
    draw = sampler(seed, mixup=1.0, mixup_alpha=1.0)(CLIPS, step=step)
    partners, shares = mix(clips([8] * 4), [8] * 4, [draw])
    assert sorted(partners.tolist()) == [0, 1, 2, 3]
    assert all(partners[i] != i for i in range(4))
    assert (shares >= 0.5 - 1e-6).all()
    assert float(mixed(torch.tensor([1.0, 0, 0, 0]), partners, shares).sum()) == pytest.approx(1)


def test_a_draw_depends_on_seed_step_and_clips_alone() -> None:
    settings = {"mixup": 0.4, "cutmix": 0.4}
    draws = {
        (seed, step, first): sampler(seed, **settings)([first, 3, 9, 1], step=step)
        for seed in range(3) for step in range(3) for first in range(3)
    }  # fmt: skip
    again = sampler(1, **settings)([2, 3, 9, 1], step=2)
    assert draws[1, 2, 2] == again
    assert len({repr(draw) for draw in draws.values() if draw is not None}) == len(
        [draw for draw in draws.values() if draw is not None]
    )


def test_any_cut_of_a_batch_gives_the_same_clips() -> None:
    depths = [8, 5, 3, 8, 6, 6, 2, 8]
    draw = sampler(cutmix=1.0)
    draws = [draw(CLIPS, step=1), draw([4, 4, 4, 4], step=1)]
    whole = clips(depths)
    _, shares = mix(whole, depths, draws)
    halves = clips(depths)
    parts = [mix(halves[i : i + 4], depths[i : i + 4], [draws[i // 4]])[1] for i in (0, 4)]
    assert torch.equal(whole, halves)
    assert torch.equal(shares, torch.cat(parts))


def test_probabilities_and_the_distribution_of_shares() -> None:
    draw = sampler(mixup=0.5, mixup_alpha=1.0, cutmix=0.25, cutmix_alpha=1.0, cutmix_axes="space")
    draws = [draw(CLIPS, step=step) for step in range(4000)]
    blends = [d for d in draws if d is not None and d.box is None]
    boxes = [d.box for d in draws if d is not None and d.box is not None]
    assert len(blends) / 4000 == pytest.approx(0.5, abs=0.04)
    assert len(boxes) / 4000 == pytest.approx(0.25, abs=0.04)
    # The greater part of a uniform cut of 1.
    assert np.mean([d.share for d in blends]) == pytest.approx(0.75, abs=0.02)
    areas = [y[1] * x[1] for _, y, x in boxes]
    assert np.mean(areas) == pytest.approx(0.25, abs=0.02)
    assert all(z == (0.0, 1.0) for z, _, _ in boxes)
    assert {d.shift for d in blends} == {1, 2, 3}


def test_a_group_is_left_alone_where_it_is_not_drawn() -> None:
    before, after = clips([8] * 8), clips([8] * 8)
    partners, shares = mix(after, [8] * 8, [None, MixDraw(1, 0.6)])
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4:], after[4:])
    assert partners.tolist() == [0, 1, 2, 3, 5, 6, 7, 4]
    assert shares[:4].tolist() == [1, 1, 1, 1]
