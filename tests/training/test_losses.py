"""Each loss against its formula in numpy, with classes and with probabilities as labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax

from dist_train.config import LossSettings
from dist_train.errors import ConfigError
from dist_train.targets import Kind, Target
from dist_train.training.label_forms import as_scores, class_shares
from dist_train.training.losses import KINDS, LOSSES, make_loss

NAMES = ("calm", "slow", "fast")
RANDOM = np.random.default_rng(0)
Z, Z3 = RANDOM.normal(size=9) * 2, RANDOM.normal(size=(9, 3)) * 2
Y, Y3 = RANDOM.integers(0, 2, 9), RANDOM.integers(0, 3, 9)
SOFT, SOFT3 = RANDOM.random(9), RANDOM.dirichlet(np.ones(3), 9)
MANY = RANDOM.integers(0, 2, (9, 3))


def target_of(kind: Kind) -> Target:
    return Target(kind, NAMES[:2] if kind == "binary" else NAMES)


def loss_of(kind: Kind, name: str, z: np.ndarray, y: np.ndarray, **args: float) -> float:
    loss = make_loss(LossSettings(name=name, args=args), target=target_of(kind))
    logits, labels = (torch.tensor(values, dtype=torch.float32) for values in (z, y))
    mean = float(loss(logits, labels))
    each = make_loss(LossSettings(name=name, args=args), target=target_of(kind), each=True)
    assert float(each(logits, labels).mean()) == pytest.approx(mean, rel=1e-6)
    return mean


def bce(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    p = expit(z)
    return -y * np.log(p) - (1 - y) * np.log(1 - p)


@pytest.mark.parametrize("y", [Y, SOFT])
def test_two_classes(y: np.ndarray) -> None:
    assert loss_of("binary", "bce", Z, y) == pytest.approx(bce(Z, y).mean(), rel=1e-5)
    assert loss_of("binary", "auto", Z, y) == loss_of("binary", "bce", Z, y)
    p = expit(Z)
    focal = -y * (1 - p) ** 1.5 * np.log(p) - (1 - y) * p**1.5 * np.log(1 - p)
    assert loss_of("binary", "focal", Z, y, gamma=1.5) == pytest.approx(focal.mean(), rel=1e-5)
    assert loss_of("binary", "focal", Z, y, gamma=0) == pytest.approx(bce(Z, y).mean(), rel=1e-5)


@pytest.mark.parametrize("y", [Y3, SOFT3])
def test_more_classes(y: np.ndarray) -> None:
    share = np.eye(3)[y] if y.ndim == 1 else y
    ce = -(share * log_softmax(Z3, axis=1)).sum(1).mean()
    assert loss_of("multiclass", "ce", Z3, y) == pytest.approx(ce, rel=1e-5)
    assert loss_of("multiclass", "auto", Z3, y) == loss_of("multiclass", "ce", Z3, y)
    p = softmax(Z3, axis=1)
    focal = -(share * (1 - p) ** 2 * np.log(p)).sum(1).mean()
    assert loss_of("multiclass", "focal", Z3, y) == pytest.approx(focal, rel=1e-5)


def test_several_labels() -> None:
    expected = bce(Z3, MANY).mean()
    assert loss_of("multilabel", "auto", Z3, MANY) == pytest.approx(expected, rel=1e-5)
    assert loss_of("multilabel", "focal", Z3, MANY, gamma=0) == pytest.approx(expected, rel=1e-5)


def test_ordered_classes() -> None:
    z, above = Z3[:, :2], 1.0 * (Y3[:, None] > np.array([0, 1]))
    expected = bce(z, above).mean()
    assert loss_of("ordinal", "auto", z, Y3) == pytest.approx(expected, rel=1e-5)
    assert loss_of("ordinal", "ordinal", z, above) == pytest.approx(expected, rel=1e-5)


def test_values() -> None:
    error = np.abs(Z3 - SOFT3)
    huber = np.where(error < 0.5, error**2 / 2, 0.5 * (error - 0.25)).mean()
    assert loss_of("regression", "huber", Z3, SOFT3, delta=0.5) == pytest.approx(huber, rel=1e-5)
    assert loss_of("regression", "mse", Z3, SOFT3) == pytest.approx((error**2).mean(), rel=1e-5)
    assert loss_of("regression", "mae", Z3, SOFT3) == pytest.approx(error.mean(), rel=1e-5)
    natural = loss_of("regression", "huber", Z3, SOFT3)
    assert loss_of("regression", "auto", Z3, SOFT3) == natural


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_gradient_of_the_focal_loss_is_finite_where_a_class_is_certain(gamma: float) -> None:
    sure = torch.tensor([[90.0, -90.0, 0.0], [-90.0, 90.0, 0.0]], requires_grad=True)
    for kind in ("multilabel", "multiclass"):
        settings = LossSettings(name="focal", args={"gamma": gamma})
        loss = make_loss(settings, target=target_of(kind))
        labels = torch.tensor([[1.0, 0, 0]] * 2) if kind == "multilabel" else torch.zeros(2)
        (gradient,) = torch.autograd.grad(loss(sure, labels), sure)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0.1


def test_the_default_is_torchs_own_to_the_bit() -> None:
    logits, labels = torch.tensor(Z).float(), torch.tensor(Y).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert torch.equal(make_loss(LossSettings())(logits, labels), expected)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "ordinal", "regression"])
def test_a_loss_of_another_kind_of_target_is_refused_by_name(kind: Kind) -> None:
    for name, loss in LOSSES.items():
        if kind in KINDS[loss]:
            make_loss(LossSettings(name=name), target=target_of(kind))
        else:
            with pytest.raises(ConfigError, match=f"{name} is a loss for .* this one is {kind}"):
                make_loss(LossSettings(name=name), target=target_of(kind))


def test_labels_become_scores_and_shares_of_classes() -> None:
    labels = torch.tensor([0.0, 2.0, 1.0])
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
    above = torch.tensor([[0.0, 0], [1, 1], [1, 0]])
    assert torch.equal(as_scores(labels, "multiclass", 3), one_hot)
    assert torch.equal(as_scores(one_hot, "multiclass", 3), one_hot)
    assert torch.equal(as_scores(labels, "ordinal", 2), above)
    assert torch.equal(class_shares(above, "ordinal"), one_hot)
    binary = torch.tensor([0.0, 1.0, 0.25])
    assert as_scores(binary, "binary", 1) is binary
    assert class_shares(binary, "binary").tolist() == [[1, 0], [0, 1], [0.75, 0.25]]
