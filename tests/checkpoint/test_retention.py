"""Which checkpoints stay."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from dist_train.checkpoint.retention import RetentionPolicy, to_remove

values = st.none() | st.floats(allow_nan=True)
saved = st.dictionaries(
    st.integers(0, 60),
    st.dictionaries(st.sampled_from(["val/mcc@0.5", "val/loss"]), values),
    min_size=1,
)
rules = st.builds(
    RetentionPolicy,
    last=st.integers(1, 5),
    every=st.none() | st.integers(1, 10),
    best=st.sampled_from([None, "val/mcc@0.5", "val/loss", "val/auc"]),
)


@given(saved=saved, keep=rules, data=st.data())
def test_each_rule_keeps_what_it_says_and_nothing_else_stays(
    saved: dict[int, dict[str, float | None]], keep: RetentionPolicy, data: st.DataObject
) -> None:
    newest = data.draw(st.sampled_from(sorted(saved)))
    removed = to_remove(saved, newest, keep)
    assert removed == sorted(set(removed))
    left = saved.keys() - set(removed)
    assert newest in left
    assert max(left) == newest
    for step in saved:
        newer = [other for other in saved if step < other <= newest]
        among_last = step <= newest and len(newer) < keep.last
        by_number = step <= newest and keep.every is not None and step % keep.every == 0
        assert (step in left) == (among_last or by_number or step == best(saved, newest, keep))


def best(
    saved: dict[int, dict[str, float | None]], newest: int, keep: RetentionPolicy
) -> int | None:
    """The best step, found by a loop."""
    found, found_value = None, math.nan
    for step in sorted(saved):
        value = saved[step].get(keep.best or "")
        if step > newest or value is None or math.isnan(value):
            continue
        better = value <= found_value if keep.best == "val/loss" else value >= found_value
        if found is None or better:
            found, found_value = step, value
    return found
