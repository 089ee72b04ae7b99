"""Class weights, smoothing, logit adjustment and the teacher's part, against formulas in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import losses_of, tiny_config
from scipy.special import expit, logit, softmax
from short_runs import train_until
from targets import target_config, target_store
from test_losses import MANY, SOFT, SOFT3, Y3, Z3, Y, Z, bce, target_of

from dist_train.config import DistillSettings, LossSettings, load_config
from dist_train.errors import ConfigError
from dist_train.run.record import read_record
from dist_train.targets import Kind
from dist_train.training.class_rates import ClassRates
from dist_train.training.implied_rate import implied_rate, implied_shares
from dist_train.training.losses import make_loss
from dist_train.training.training_loss import make_training_loss

RATES = ClassRates(np.array([0.75, 0.25]), np.array([0.98, 0.02]))
RATES3 = ClassRates(np.array([0.5, 0.25, 0.25]), np.array([0.9, 0.06, 0.04]))
CPU = torch.device("cpu")


def loss_of(
    kind: Kind,
    z: np.ndarray,
    y: np.ndarray,
    extras: dict[str, np.ndarray] | None = None,
    **settings: Any,
) -> float:
    rates = RATES if kind == "binary" else RATES3
    loss = make_training_loss(LossSettings(**settings), CPU, target_of(kind), rates)
    logits, labels = (torch.tensor(values, dtype=torch.float32) for values in (z, y))
    more = {name: torch.tensor(v, dtype=torch.float32) for name, v in (extras or {}).items()}
    return float(loss(logits, labels, **more))


def ce(z: np.ndarray, share: np.ndarray) -> np.ndarray:
    return -(share * np.log(softmax(z, axis=1))).sum(1)


@pytest.mark.parametrize("y", [Y, SOFT])
def test_class_weights_of_two_classes(y: np.ndarray) -> None:
    weights = y * 2 + (1 - y) * 2 / 3
    found = loss_of("binary", Z, y, class_weights="balanced")
    assert found == pytest.approx((weights * bce(Z, y)).mean(), rel=1e-5)
    # Of 4 clips 1 has 3 times the weight of the others, and the mean is 1.
    weights = (y * 3 + (1 - y)) / 1.5
    found = loss_of("binary", Z, y, class_weights={"slow": 3.0})
    assert found == pytest.approx((weights * bce(Z, y)).mean(), rel=1e-5)


def test_class_weights_of_more_classes() -> None:
    weights = np.array([2, 4, 4]) / 3
    found = loss_of("multiclass", Z3, Y3, class_weights="balanced")
    assert found == pytest.approx((weights[Y3] * ce(Z3, np.eye(3)[Y3])).mean(), rel=1e-5)
    above = 1.0 * (Y3[:, None] > np.array([0, 1]))
    found = loss_of("ordinal", Z3[:, :2], Y3, class_weights="balanced")
    expected = (weights[Y3] * bce(Z3[:, :2], above).mean(1)).mean()
    assert found == pytest.approx(expected, rel=1e-5)
    found = loss_of("multilabel", Z3, MANY, class_weights={"fast": 4.0})
    assert found == pytest.approx((np.array([0.5, 0.5, 2]) * bce(Z3, MANY)).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "ordinal"])
def test_balanced_weights_keep_the_scale_of_the_loss(kind: Kind) -> None:
    """A batch of the plan's rates, of clips with equal losses."""
    y = np.array([0, 0, 0, 1]) if kind == "binary" else np.array([0, 0, 1, 2])
    z = np.zeros({"binary": (4,), "multiclass": (4, 3), "ordinal": (4, 2)}[kind])
    plain = loss_of(kind, z, y)
    assert loss_of(kind, z, y, class_weights="balanced") == pytest.approx(plain, rel=1e-5)


def test_smoothing() -> None:
    found = loss_of("binary", Z, Y, smoothing=0.2)
    assert found == pytest.approx(bce(Z, 0.8 * Y + 0.1).mean(), rel=1e-5)
    found = loss_of("multiclass", Z3, Y3, smoothing=0.3)
    assert found == pytest.approx(ce(Z3, 0.7 * np.eye(3)[Y3] + 0.1).mean(), rel=1e-5)
    own = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    assert found == pytest.approx(float(own(torch.tensor(Z3).float(), torch.tensor(Y3))), rel=1e-5)
    found = loss_of("multilabel", Z3, MANY, smoothing=0.2)
    assert found == pytest.approx(bce(Z3, 0.8 * MANY + 0.1).mean(), rel=1e-5)


def test_logit_adjustment() -> None:
    shift = logit(0.25) - logit(0.02)
    found = loss_of("binary", Z, Y, logit_adjustment="natural")
    assert found == pytest.approx(bce(Z + shift, Y).mean(), rel=1e-5)
    found = loss_of("binary", Z, Y, logit_adjustment="balanced")
    assert found == pytest.approx(bce(Z + logit(0.25), Y).mean(), rel=1e-5)
    shift = np.log(RATES3.batches / RATES3.natural)
    found = loss_of("multiclass", Z3, Y3, logit_adjustment="natural")
    assert found == pytest.approx(ce(Z3 + shift, np.eye(3)[Y3]).mean(), rel=1e-5)
    # Menon et al.: the log of the prior alone.
    found = loss_of("multiclass", Z3, Y3, logit_adjustment="balanced")
    assert found == pytest.approx(ce(Z3 + np.log(RATES3.batches), np.eye(3)[Y3]).mean(), rel=1e-5)


def test_an_adjusted_net_gives_probabilities_of_the_natural_rate() -> None:
    """Two kinds of clips, of which 60 % and 10 % are positive in batches: the logits of least
    loss are those of Bayes' rule."""
    labels = torch.tensor([1.0] * 6 + [0.0] * 4 + [1.0] + [0.0] * 9)
    odds = np.array([0.6 / 0.4, 0.1 / 0.9]) * (0.02 / 0.98) / (0.25 / 0.75)
    logits = torch.tensor(np.log(odds), dtype=torch.float32, requires_grad=True)
    settings = LossSettings(logit_adjustment="natural")
    loss = make_training_loss(settings, CPU, target_of("binary"), RATES)
    (gradient,) = torch.autograd.grad(loss(logits.repeat_interleave(10), labels), logits)
    assert gradient.abs().max() < 1e-6
    (elsewhere,) = torch.autograd.grad(loss((logits + 1).repeat_interleave(10), labels), logits)
    assert elsewhere.abs().min() > 1e-2


def test_the_teachers_part() -> None:
    distill = DistillSettings(teacher="run", weight=0.3, temperature=2.5)
    found = loss_of("binary", Z, Y, {"teacher": SOFT}, distill=distill)
    expected = 0.7 * bce(Z, Y) + 0.3 * 2.5**2 * bce(Z / 2.5, SOFT)
    assert found == pytest.approx(expected.mean(), rel=1e-5)
    found = loss_of("multiclass", Z3, Y3, {"teacher": SOFT3}, distill=distill)
    expected = 0.7 * ce(Z3, np.eye(3)[Y3]) + 0.3 * 2.5**2 * ce(Z3 / 2.5, SOFT3)
    assert found == pytest.approx(expected.mean(), rel=1e-5)


def test_all_of_them_together() -> None:
    sureness = np.linspace(0, 2, len(Z))
    distill = DistillSettings(teacher="run", weight=0.3, temperature=2.0)
    extras = {"teacher": SOFT, "clip_weights": sureness}
    found = loss_of(
        "binary", Z, SOFT, extras, class_weights="balanced", smoothing=0.1, name="focal",
        args={"gamma": 1.0}, logit_adjustment="balanced", sureness="margin", distill=distill,
    )  # fmt: skip
    z, y = Z + logit(0.25), SOFT * 0.9 + 0.05
    p = expit(z)
    focal = -y * (1 - p) * np.log(p) - (1 - y) * p * np.log(1 - p)
    each = 0.7 * focal + 0.3 * 4 * bce(z / 2, SOFT)
    weights = sureness * (SOFT * 2 + (1 - SOFT) * 2 / 3)
    assert found == pytest.approx((weights * each).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("ordinal", {"smoothing": 0.1}, "loss.smoothing: it is not defined .* ordinal"),
        ("regression", {"class_weights": "balanced"}, "loss.class_weights: it is not defined"),
        ("multilabel", {"class_weights": "balanced"}, "several labels, so they cannot be balanced"),
        ("multilabel", {"logit_adjustment": "natural"}, "loss.logit_adjustment: it is not"),
        ("regression", {"distill": DistillSettings(teacher="r")}, "loss.distill: it is not"),
        ("binary", {"class_weights": {"fats": 2.0}}, "no class fats. The classes are calm, slow"),
        ("binary", {"class_weights": "balanced", "args": {"reduction": "sum"}}, "reduction is not"),
    ],
)
def test_what_does_not_fit_a_target_is_refused_by_name(
    kind: Kind, settings: dict[str, Any], words: str
) -> None:
    rates = RATES if kind == "binary" else RATES3
    with pytest.raises(ConfigError, match=words):
        make_training_loss(LossSettings(**settings), CPU, target_of(kind), rates)


def test_no_setting_is_the_plain_loss_to_the_bit() -> None:
    logits, labels = torch.tensor(Z).float(), torch.tensor(Y).float()
    loss = make_training_loss(LossSettings(), CPU, target_of("binary"), RATES)
    assert torch.equal(loss(logits, labels), make_loss(LossSettings())(logits, labels))


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 0.25),
        ({"class_weights": "balanced"}, 0.5),
        ({"class_weights": {"slow": 3.0}}, 0.5),
        ({"logit_adjustment": "natural"}, 0.02),
        ({"logit_adjustment": "balanced"}, 0.5),
        # Weights of 3 are odds of 3.
        ({"class_weights": {"slow": 3.0}, "logit_adjustment": "natural"}, 0.06 / (0.98 + 0.06)),
    ],
)
def test_the_share_of_positives_that_probabilities_are_of(
    settings: dict[str, Any], rate: float
) -> None:
    found = implied_rate(LossSettings(**settings), target_of("binary"), RATES, None)
    assert found == pytest.approx(rate, rel=1e-9)
    # Two classes are a case of many.
    shares = implied_shares(LossSettings(**settings), target_of("binary"), RATES)
    np.testing.assert_allclose(shares, [1 - rate, rate], rtol=1e-9)


@pytest.mark.parametrize("kind", ["multiclass", "ordinal", "multilabel", "regression"])
def test_each_kind_of_target_trains_on_mixed_clips(kind: str, tmp_path: Path) -> None:
    more = {
        "multiclass": ("loss.name=focal", "loss.class_weights=balanced", "loss.smoothing=0.1"),
        "ordinal": ("loss.class_weights={stalled: 2}",),
        "multilabel": ("loss.class_weights={left: 2}", "loss.smoothing=0.1"),
        "regression": ("loss.name=mae",),
    }[kind]
    mixes = ("augment.mixup=0.5", "augment.cutmix=0.5")
    store, losses = target_store(tmp_path / "store", kind), {}
    for name, settings in {"plain": more, "mixed": (*more, *mixes)}.items():
        train_until(target_config(store, tmp_path / name, kind, *settings), 2)
        losses[name] = losses_of(tmp_path / name)
    assert np.isfinite(losses["mixed"]).all()
    assert losses["mixed"][0] != losses["plain"][0]


def test_a_run_trains_with_them_and_records_the_share(store: Path, tmp_path: Path) -> None:
    first = {}
    for name, settings in {
        "plain": [],
        "weights": ["loss.class_weights=balanced"],
        "focal": ["loss.name=focal"],
        "smooth": ["loss.smoothing=0.1"],
        "adjusted": ["loss.logit_adjustment=natural"],
    }.items():
        train_until(tiny_config(store, tmp_path / name, *settings), 2)
        first[name] = losses_of(tmp_path / name)[0]
    assert len(set(first.values())) == len(first)
    rate = read_record(tmp_path / "weights")["positive_rate"]["train_batches"]
    assert rate == pytest.approx(0.5)
    rate = read_record(tmp_path / "adjusted")["positive_rate"]["train_batches"]
    assert rate == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("augment.mixup=0.7", "augment.cutmix=0.7"), "mixup + cutmix must be at most 1"),
        (("loss.distill.temperature=0.5",), "'loss.distill.temperature': Input should be greater"),
        (("loss.class_weights={stalled: 0}",), "Input should be greater than 0"),
        (("loss.class_weight=balanced",), "Did you mean 'loss.class_weights'?"),
    ],
)
def test_wrong_settings_of_the_loss_are_named(settings: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["store=s", *settings])
    assert told in str(caught.value)
