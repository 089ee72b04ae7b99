"""Labels and weights of training clips from their crowd score: the share of annotators, from 0 to
1, who called a clip positive.

Batches, metrics and the plan keep the classes. Scores are looked up by clip number.
"""

from __future__ import annotations

import logging
import os

import numpy as np

from dist_train.errors import ConfigError
from dist_train.run.data import RunData
from dist_train.training.class_rates import ClassRates, Floats

log = logging.getLogger(__name__)

Array = np.ndarray[tuple[int], np.dtype[np.float32]]


class CrowdScores:
    """The crowd scores of a run's clips.

    Raises:
        ConfigError: the target has other than two classes, no training clip has a score, a score is
            not within 0 to 1, or all clips of the batches would have no weight.
    """

    def __init__(self, data: RunData, rates: ClassRates) -> None:
        settings, target = data.config.loss, data.target
        asked = "soft_labels" if settings.soft_labels else "sureness"
        where = f"loss.{asked}"
        if target.kind != "binary":
            raise ConfigError(
                f"a crowd score is of two classes, and the target is {target.kind}",
                where=where,
                fix="Leave it out.",
            )
        self._score, self._label = data.store.table["crowd_score"], data.labels
        self._is_soft, self._is_weighted = bool(settings.soft_labels), settings.sureness != "none"
        train = data.numbers("train")
        scores, classes = self._score[train], self._label[train]
        known = ~np.isnan(scores)
        if not known.any():
            raise ConfigError(
                "no clip of the train split has a crowd score",
                where=where,
                fix="Prepare the store from a manifest with a column crowd_score, or leave it out.",
            )
        if not ((scores[known] >= 0) & (scores[known] <= 1)).all():
            raise ConfigError(
                "a crowd score is not within 0 to 1",
                where=where,
                fix="Give the share of annotators in the manifest, and prepare it again.",
            )
        against = int((known & ((scores > 0.5) != (classes == 1)) & (scores != 0.5)).sum())
        if self._is_soft and against and os.environ.get("RANK", "0") == "0":
            log.warning(
                "%d of the %d training clips with a crowd score have one that is against their "
                "class; they are trained on by the score",
                against, int(known.sum()),
            )  # fmt: skip
        self._scale, self._train = 1.0, train
        if self._is_weighted:
            mean = float(rates.batches @ self.class_means(self._margin(train)))
            if mean == 0:
                raise ConfigError(
                    "all crowd scores are 0.5, so no clip has a weight", where="loss.sureness"
                )
            self._scale = 1 / mean

    def labels(self, clips: np.ndarray) -> Array:
        """The score of each clip, or its class where there is none: float32 [B]."""
        score, label = self._score[clips], self._label[clips]
        if not self._is_soft:
            score = np.nan
        labels: Array = np.where(np.isnan(score), label, score).astype(np.float32)
        return labels

    def weights(self, clips: np.ndarray) -> Array | None:
        """The weight of each clip, with mean 1 over the batches: float32 [B]; None for none."""
        if not self._is_weighted:
            return None
        weights: Array = (self._margin(clips) * self._scale).astype(np.float32)
        return weights

    def of_training(self) -> tuple[Array, Array]:
        """``labels`` and ``weights`` of all training clips."""
        weights = self.weights(self._train)
        labels = self.labels(self._train)
        return labels, np.ones_like(labels) if weights is None else weights

    def _margin(self, clips: np.ndarray) -> np.ndarray:
        score = self._score[clips]
        return np.where(np.isnan(score), 1.0, np.abs(2 * score - 1))

    def class_means(self, values: np.ndarray) -> Floats:
        """Means over the training clips of each class, float64 [2], of values [training clips]."""
        classes = self._label[self._train]
        return np.array([values[classes == label].mean() for label in (0, 1)])
