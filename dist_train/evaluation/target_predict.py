"""What ``predict`` writes of kinds of target other than binary: labels, priors, calibration."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from dist_train.config import Config
from dist_train.data.store.reader import Store
from dist_train.data.target_labels import target_labels
from dist_train.errors import ConfigError
from dist_train.evaluation.class_calibration import (
    ClassCalibration,
    LabelCalibration,
    fit_classes,
    fit_labels,
)
from dist_train.evaluation.target_table import Scored
from dist_train.targets import Target

log = logging.getLogger(__name__)

Prior = float | Mapping[str, float]


def check_prior(target: Target, prior: Prior | None) -> None:
    """Raise ``ConfigError`` unless a prior is None, or of the form that the target needs."""
    if prior is None:
        return
    if target.kind == "regression":
        raise _no_prior("values of regression have no prior", "Leave it out.")
    if target.kind == "binary":
        if isinstance(prior, Mapping):
            raise _no_prior("two classes have one share, that of positives", "Give a number.")
        if not 0 < prior < 1:
            raise _no_prior(
                f"{prior:g} is no share of positives", "Give one strictly between 0 and 1."
            )
        return
    names = ", ".join(target.classes[:20])
    if not isinstance(prior, Mapping):
        raise _no_prior(
            f"{prior:g} does not say whose share it is", f"Give NAME=SHARE,... of: {names}."
        )
    for name, share in prior.items():
        if name not in target.classes:
            raise _no_prior(f"there is no class '{name}'", f"There are: {names}.")
        if not 0 < share < 1:
            raise _no_prior(
                f"{share:g} is no share of '{name}'", "Give one strictly between 0 and 1."
            )
    if target.is_coded:
        missing = [name for name in target.classes if name not in prior]
        if missing:
            raise _no_prior(f"it lacks '{missing[0]}'", f"Give the share of each of: {names}.")
        if abs(sum(prior.values()) - 1) > 1e-6:
            raise _no_prior(
                f"the shares of the classes make {sum(prior.values()):g}, not 1", "Change them."
            )


def _no_prior(what: str, fix: str) -> ConfigError:
    return ConfigError(what, where="prior", fix=fix)


def labels_elsewhere(config: Config, target: Target, store: Store) -> np.ndarray:
    """The labels of the clips of another store than the run's, as ``TargetLabels.values``; none, -1
    or NaN, where the store has not the run's classes or columns."""
    try:
        return target_labels(config.target, store.table, store.classes).values
    except ConfigError as error:
        if config.target.columns is not None or (store.table["label"] >= 0).any():
            log.warning("%s: its labels are not used: %s", store.name, error.what)
    shape = () if target.is_coded else (len(target.classes),)
    none = -1 if target.is_coded else np.nan
    return np.full((len(store.table), *shape), none)


def calibrate(
    val: Scored, shares: Mapping[str, Mapping[str, float]], prior: Prior | None
) -> ClassCalibration | LabelCalibration | None:
    """Fit the calibration of a run's val clips; regression has none.

    Args:
        shares: ``class_shares`` of the run's record.
    """
    target = val.target
    if target.kind == "regression":
        return None
    assert prior is None or isinstance(prior, Mapping)
    batches, world = shares["train_batches"], {**shares["natural"], **(prior or {})}
    if target.kind == "multilabel":
        return fit_labels(
            val.probability, val.truth, target.classes, batches_share=batches, prior=world
        )
    before, after = (tuple(each[name] for name in target.classes) for each in (batches, world))
    return fit_classes(val.probability, val.truth, batches_share=before, prior=after)
