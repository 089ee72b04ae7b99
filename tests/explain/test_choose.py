"""Which clips are chosen, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dist_train.explain.choose import Chosen, choose_clips
from dist_train.targets import Target


def keys(chosen: list[Chosen], why: str) -> list[tuple[str, int | None]]:
    return [(one.key, one.of) for one in chosen if one.why == why]


def test_of_two_classes() -> None:
    table = pd.DataFrame({"key": list("abcdefg")})
    table["probability"] = [0.9, 0.01, 0.02, 0.8, 0.3, 0.6, 0.999]
    truth = np.array([0, 0, 0, 1, 1, 0, -1])
    chosen = choose_clips(table, Target(), truth, 2)
    assert keys(chosen, "most wrong") == [("a", 1), ("e", 0)]
    # The surest of each class in turn; one without a label may be sure.
    assert keys(chosen, "most sure") == [("g", 1), ("b", 0)]
    everything = choose_clips(table, Target(), truth, 9)
    assert keys(everything, "most wrong") == [("a", 1), ("e", 0), ("f", 1)]
    assert keys(everything, "most sure") == [("g", 1), ("b", 0), ("d", 1), ("c", 0)]
    assert {one.of for one in choose_clips(table, Target(), truth, 9, of=0)} == {0}


def test_of_more_classes() -> None:
    scores = np.array([[0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05]])
    table = pd.DataFrame({"key": list("abc")})
    table[[f"probability:{name}" for name in "xyz"]] = scores
    chosen = choose_clips(table, Target("multiclass", tuple("xyz")), np.array([2, 1, 0]), 5)
    assert keys(chosen, "most wrong") == [("a", 0), ("b", 2)]
    assert keys(chosen, "most sure") == [("c", 0)]


def test_of_labels() -> None:
    table = pd.DataFrame({"key": list("abc")})
    table[["probability:x", "probability:y"]] = [[0.9, 0.7], [0.2, 0.97], [0.1, 0.2]]
    truth = np.array([[0, 0], [0, 1], [0, 0]], np.float32)
    target = Target("multilabel", ("x", "y"))
    chosen = choose_clips(table, target, truth, 5)
    # A clip is shown once.
    assert keys(chosen, "most wrong") == [("a", 0)]
    assert keys(chosen, "most sure") == [("b", 1)]
    assert keys(choose_clips(table, target, truth, 5, of=1), "most wrong") == [("a", 1)]


def test_of_values() -> None:
    table = pd.DataFrame({"key": list("abc")})
    table[["value:x", "value:y"]] = [[1.0, 500.0], [5.0, 100.0], [3.0, 0.0]]
    truth = np.array([[1.0, 100.0], [1.0, 100.0], [np.nan, np.nan]], np.float32)
    truth[1, 0] = 4.0
    target = Target("regression", ("x", "y"), (0.0, 0.0), (1.0, 1000.0))
    assert keys(choose_clips(table, target, truth, 5, of=0), "most wrong") == [("b", 0), ("a", 0)]
    # A distance of 1 in x is more than one of 400 in y.
    assert keys(choose_clips(table, target, truth, 5), "most wrong") == [("b", 0), ("a", 1)]
    assert not keys(choose_clips(table, target, truth, 5), "most sure")
