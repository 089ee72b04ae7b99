"""Groups and splits of another brightness are named; those that differ by chance are not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dist_train.data.check.shifts import find_shifts


def test_what_differs_is_named() -> None:
    random = np.random.default_rng(0)
    grey = pd.DataFrame({"mean grey": random.normal(90, 10, 800), "spread of grey": 7.0})
    group = pd.Series([f"g{number % 20}" for number in range(800)])
    split = pd.Series(["train", "train", "val", ""] * 200)
    assert find_shifts(grey, group, split) == []
    grey.loc[group == "g3", "mean grey"] += 15
    (shift,) = find_shifts(grey, group, split)
    assert (shift.of, shift.name, shift.statistic, shift.clips) == ("group", "g3", "mean grey", 40)
    own, others = (grey["mean grey"][mask] for mask in (group == "g3", group != "g3"))
    assert (shift.value, shift.others) == pytest.approx((own.mean(), others.mean()))
    pooled = np.sqrt((own.var(ddof=0) * 40 + others.var(ddof=0) * 760) / 798)
    assert shift.difference == pytest.approx((own.mean() - others.mean()) / pooled)
    grey.loc[split == "val", "spread of grey"] = 3.0
    assert find_shifts(grey, pd.Series("", index=grey.index), split)[0].name == "val"
