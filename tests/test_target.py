"""What the outputs of each kind of target mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, logit

from dist_train.targets import Target

THREE = ("a", "b", "c")
LOGITS = arrays(np.float32, (5, 3), elements=st.floats(-30, 30, width=32))


def test_outputs_and_shapes() -> None:
    assert (Target().outputs, Target().logit_shape, Target().label_shape) == (1, (), ())
    shapes = {
        kind: (Target(kind, THREE).outputs, Target(kind, THREE).label_shape)  # type: ignore[arg-type]
        for kind in ("multiclass", "multilabel", "ordinal", "regression")
    }
    assert shapes == {
        "multiclass": (3, ()), "multilabel": (3, (3,)), "ordinal": (2, ()), "regression": (3, (3,))
    }  # fmt: skip
    assert (
        Target("regression", ("a",)).label_shape == Target("regression", ("a",)).logit_shape == ()
    )


@given(LOGITS)
@settings(max_examples=50, deadline=None)
def test_classes_share_one_probability(logits: np.ndarray) -> None:
    for target in (Target("multiclass", THREE), Target("ordinal", (*THREE, "d"))):
        scores = target.scores(logits)
        assert scores.shape == (5, len(target.classes))
        assert (scores >= 0).all()
        np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)


def test_ordinal_outputs_are_chances_to_be_above() -> None:
    target = Target("ordinal", THREE)
    above = np.array([[0.9, 0.2], [0.3, 0.6]])
    # The second row rises, so the chance to be above b is held at that to be above a.
    expected = [[0.1, 0.7, 0.2], [0.7, 0.0, 0.3]]
    np.testing.assert_allclose(target.scores(logit(above)), expected, atol=1e-12)


def test_each_label_has_its_own_probability() -> None:
    logits = np.array([[0.0, 2.0, -1.0]])
    np.testing.assert_array_equal(Target("multilabel", THREE).scores(logits), expit(logits))


def test_values_have_their_own_unit() -> None:
    target = Target("regression", ("speed", "age"), center=(100.0, -1.0), scale=(10.0, 0.5))
    np.testing.assert_allclose(target.scores(np.array([[0.0, 2.0]])), [[100, 0]])
    one = Target("regression", ("speed",), (100.0,), (10.0,))
    np.testing.assert_allclose(one.truth(np.array([1.0, -1.0], np.float32)), [[110], [90]])
    with pytest.raises(ValueError, match="reshape"):
        one.scores(np.zeros((2, 3)))
