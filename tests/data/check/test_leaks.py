"""A planted leak is named, in set after set; in clean sets none is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from dist_train.data.check.leaks import (
    CERTAIN,
    CERTAIN_OF_GROUPS,
    FEWEST,
    find_leaks,
    limits,
)
from dist_train.data.synthetic.drawing import draw_clip

pytest.importorskip("sklearn")


def recorded(seed: int, clips: int = 300) -> tuple[pd.DataFrame, np.ndarray]:
    """Depths and sizes of a synthetic set, which are drawn for both classes alike, in 12 groups of
    uneven size and rate, each with a brightness of its own."""
    random = np.random.default_rng(seed)
    specs = [draw_clip(seed, index) for index in range(clips)]
    group = random.choice(12, clips, p=np.arange(1, 13) / 78)
    columns = pd.DataFrame(
        {
            "depth": [spec.depth for spec in specs],
            "width": [spec.box.right - spec.box.left for spec in specs],
            "mean grey": random.normal(100, 20, 12)[group] + random.normal(0, 10, clips),
            "group": [f"P{number}" for number in group],
        }
    )
    rate = random.beta(2, 4, 12)
    return columns, (random.random(clips) < rate[group]).astype(np.int64)


@pytest.mark.slow
def test_a_planted_leak_is_named_and_clean_sets_have_none() -> None:
    for seed in range(5):
        columns, label = recorded(seed)
        clean = [leak for leak in find_leaks(columns, {"": label}) if leak.columns != ["group"]]
        assert [leak.columns for leak in clean if leak.is_leak] == []
        assert len(clean) == 4
        assert all(leak.apart for leak in clean)

        columns["width"] += 80 * label
        leaks = find_leaks(columns, {"": label})
        assert leaks[0].columns == ["width"]
        assert [leak.columns for leak in leaks[1:-1] if leak.is_leak] in ([], [["group"]])
        assert leaks[0].is_leak
        assert leaks[0].low > 0.25
        assert leaks[0].low <= leaks[0].mcc <= leaks[0].high
        # Together, without the group, which folds keep apart.
        assert leaks[-1].columns == ["depth", "width", "mean grey"]
        assert leaks[-1].is_leak


def test_a_group_that_tells_the_label_and_a_text_column_are_named() -> None:
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 400)
    # 40 groups of one class each; a camera belongs to the class in most of them.
    group = np.where(label == 1, random.integers(0, 20, 400), random.integers(20, 40, 400))
    camera = np.where(group % 10 < 9, np.where(group < 20, "A", "B"), "C")
    columns = pd.DataFrame(
        {
            "group": [f"g{number}" for number in group],
            "camera": camera,
            "noise": np.where(random.random(400) < 0.2, np.nan, random.normal(size=400)),
            "always": 3,
        }
    )
    leaks = {" ".join(leak.columns): leak for leak in find_leaks(columns, {"": label})}
    assert leaks.keys() == {"group", "camera", "noise", "camera noise"}
    assert leaks["group"].is_leak
    assert not leaks["group"].apart
    assert leaks["camera"].is_leak
    assert leaks["camera"].apart
    assert not leaks["noise"].is_leak


def test_a_leak_of_one_class_of_several_is_named_with_its_class() -> None:
    random = np.random.default_rng(0)
    code = random.integers(0, 4, 240)
    columns = pd.DataFrame(
        {
            "width": random.normal(size=240) + 4 * (code == 2),
            "noise": random.normal(size=240),
        }
    )
    labels = {name: (code == k).astype(np.int64) for k, name in enumerate("abcd")}
    width, noise, both = find_leaks(columns, labels)
    assert (width.columns, width.of, width.is_leak) == (["width"], "c", True)
    assert width.mcc is not None
    assert width.mcc > 0.8
    assert (noise.columns, noise.is_leak) == (["noise"], False)
    assert (both.columns, both.of, both.is_leak) == (["width", "noise"], "c", True)
    # The interval holds for all four classes at once, so it is wider than that of one.
    (alone, *_) = find_leaks(columns, {"c": labels["c"]})
    assert (alone.of, alone.mcc) == ("", width.mcc)
    assert width.low < alone.low
    assert alone.high <= width.high


def test_values_are_told_by_rank_whatever_their_scale() -> None:
    random = np.random.default_rng(0)
    value, group = random.normal(size=300), random.integers(0, 12, 300)
    columns = pd.DataFrame(
        {
            "depth": value + 0.3 * random.normal(size=300),
            "noise": random.normal(size=300),
            "camera": np.where(value > 0, "new", "old"),
            "group": [f"g{number}" for number in group],
        }
    )
    leaks = {" ".join(leak.columns): leak for leak in find_leaks(columns, {"v": np.exp(3 * value)})}
    assert [name for name, leak in leaks.items() if leak.is_leak] == [
        "depth", "camera", "depth noise camera",
    ]  # fmt: skip
    depth = leaks["depth"]
    assert depth.mcc is None
    assert depth.rank_correlation is not None
    assert 0.8 < depth.low < depth.rank_correlation < depth.high < 1
    assert (depth.metric, depth.apart, leaks["group"].apart) == ("rank correlation", True, False)
    assert abs(leaks["noise"].score) < 0.2
    assert find_leaks(columns, {"v": np.ones(300)}) == []


def test_more_labels_need_more_certainty() -> None:
    assert limits(1) == pytest.approx((CERTAIN, CERTAIN_OF_GROUPS))
    certain, of_groups = limits(20)
    assert 20 * norm.sf(certain / np.sqrt(2)) == pytest.approx(norm.sf(CERTAIN / np.sqrt(2)))
    assert 20 * np.exp(-(of_groups**2) / 2) == pytest.approx(np.exp(-(CERTAIN_OF_GROUPS**2) / 2))


def test_few_clips_or_groups() -> None:
    label = np.array([1] * (FEWEST - 1) + [0] * 60)
    assert find_leaks(pd.DataFrame({"depth": label}), {"": label}) == []
    label = np.array([1] * 30 + [0] * 60)
    groups = pd.DataFrame({"depth": label, "group": ["a", "b", "c"] * 30})
    depth = find_leaks(groups, {"": label})[0]
    assert (depth.columns, depth.mcc, depth.apart, depth.is_leak) == (["depth"], 1.0, False, True)
