"""The mapping that makes frequencies of probabilities, on clips whose true one is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from dist_train.evaluation.calibration import FEWEST, METHODS, Calibration, fit, reliability_of
from dist_train.metrics import Floats, prior_correct

SHARE = 0.25


def over_confident(
    clips: int, seed: int, *, temperature: float = 3.0, bias: float = 0.0
) -> tuple[Floats, Floats]:
    """Probabilities at the batches' share, and labels at the share of about 0.27: after the step
    to val's share, the true logit is what a model says over ``temperature``, and ``bias``."""
    random = np.random.default_rng(seed)
    truth = random.normal(-1.6, 1.5, clips)
    label = (random.random(clips) < expit(truth)).astype(np.float64)
    told = expit(temperature * (truth - bias))
    return prior_correct(told, label.mean(), SHARE), label


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    found = fit(*over_confident(20_000, 0, temperature=temperature), batches_share=SHARE, prior=0.1)
    assert found.method == "temperature"
    assert 1 / found.slope == pytest.approx(temperature, rel=0.05)
    assert found.bias == 0


def test_a_known_bias_is_found() -> None:
    found = fit(*over_confident(20_000, 1, bias=0.8), batches_share=SHARE, prior=0.1)
    assert found.method == "temperature and bias"
    assert 1 / found.slope == pytest.approx(3, rel=0.05)
    assert found.bias == pytest.approx(0.8, abs=0.08)


def test_what_is_no_line_in_logits_is_found_by_isotonic_regression() -> None:
    random = np.random.default_rng(2)
    told = random.random(8000)
    truth = np.where(told < 0.5, 0.1, 0.6)
    label = (random.random(8000) < truth).astype(np.float64)
    found = fit(prior_correct(told, label.mean(), SHARE), label,
                batches_share=SHARE, prior=float(label.mean()))  # fmt: skip
    assert found.method == "isotonic"
    clips = prior_correct([0.2, 0.4, 0.6, 0.9], label.mean(), SHARE)
    np.testing.assert_allclose(found.apply(clips), [0.1, 0.1, 0.6, 0.6], atol=0.05)


@pytest.mark.parametrize(("clips", "seed"), [(40, 0), (200, 1), (4000, 2)])
def test_on_unseen_clips_it_is_no_worse_than_none(clips: int, seed: int) -> None:
    """Over-confident by far, or calibrated already: then it costs next to nothing."""
    for temperature, allowed in ((3.0, 0.0), (1.0, 0.02)):
        found = fit(
            *over_confident(clips, seed, temperature=temperature), batches_share=SHARE, prior=0.27
        )
        unseen, label = over_confident(5000, 100 + seed, temperature=temperature)
        raw = reliability_of(prior_correct(unseen, SHARE, 0.27), label)
        calibrated = reliability_of(found.apply(unseen), label)
        assert calibrated.log_loss <= raw.log_loss + allowed
        if clips > 1000 and temperature > 1:
            assert calibrated.ece < 0.03 < raw.ece
            assert calibrated.brier < raw.brier


def test_cross_validated_figures_by_hand() -> None:
    """Of no mapping there is nothing to fit, so they are those of the clips themselves."""
    p, y = over_confident(300, 3)
    found = fit(p, y, batches_share=SHARE, prior=0.1)
    assert list(found.cross_validated) == list(METHODS)
    assert found.cross_validated["none"] == reliability_of(
        prior_correct(p, SHARE, float(y.mean())), y
    )
    shifted = prior_correct(p, SHARE, float(y.mean()))
    assert found.cross_validated["none"].log_loss == pytest.approx(
        -np.log(np.where(y == 1, shifted, 1 - shifted)).mean()
    )
    assert found.raw == reliability_of(p, y)


def test_the_prior_comes_last_and_alone_where_nothing_is_fitted() -> None:
    p, y = over_confident(3000, 4)
    for prior in (0.003, 0.4):
        found = fit(p, y, batches_share=SHARE, prior=prior)
        at_val = fit(p, y, batches_share=SHARE, prior=float(y.mean()))
        expected = prior_correct(at_val.apply(p), float(y.mean()), prior)
        np.testing.assert_allclose(found.apply(p), expected, rtol=1e-12)
        plain = fit(p[y == 0], y[y == 0], batches_share=SHARE, prior=prior)
        assert plain.method == "none"
        np.testing.assert_allclose(plain.apply(p), prior_correct(p, SHARE, prior), rtol=1e-12)


@pytest.mark.parametrize(
    ("positives", "tried"),
    [(0, ()), (FEWEST - 1, ()), (FEWEST, METHODS[:2]), (19, METHODS[:2]), (20, METHODS)],
)
def test_few_positives_fit_little(positives: int, tried: tuple[str, ...]) -> None:
    random = np.random.default_rng(positives)
    y = np.r_[np.ones(positives), np.zeros(100)]
    found = fit(random.random(len(y)), y, batches_share=SHARE, prior=0.1)
    assert tuple(found.cross_validated) == tried
    assert (found.clips, found.positives) == (len(y), positives)
    assert np.isfinite(found.apply([0.0, 0.5, 1.0])).all()
    nothing = fit([], [], batches_share=SHARE, prior=0.1)
    assert (nothing.method, nothing.raw) == ("none", None)


@pytest.mark.parametrize("method", METHODS[1:])
def test_clips_that_are_separated_without_error_stay_short_of_certain(method: str) -> None:
    y = np.r_[np.ones(30), np.zeros(90)]
    p = np.where(y == 1, 0.9, 0.1)
    found = fit(p, y, batches_share=SHARE, prior=0.25)
    assert 0 < found.apply([0.1])[0] < 0.1
    assert 0.9 < found.apply([0.9])[0] < 1
    assert np.isfinite(found.cross_validated[method].log_loss)  # type: ignore[index]


def test_order_is_kept_and_json_too() -> None:
    for seed in range(3):
        found = fit(*over_confident(500, seed), batches_share=SHARE, prior=0.01)
        assert (np.diff(found.apply(np.linspace(0, 1, 1000))) >= 0).all()
        assert Calibration.model_validate_json(found.model_dump_json()) == found
