"""The held-out clips that the model is most confidently wrong about, as pictures."""

from __future__ import annotations

import logging

import numpy as np

from dist_train.data.pictures import film_strip
from dist_train.data.types import GREY
from dist_train.errors import DistTrainError
from dist_train.run.data import RunData
from dist_train.targets import by_class

#: Clips that are shown, each of which is read again.
MOST = 6
log = logging.getLogger(__name__)


def most_wrong(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Places of the clips whose own class is not predicted, the least probable first.

    Args:
        labels: class codes [N].
        scores: probabilities [N] of class 1, or [N, K] of K classes.

    Returns:
        int64 [0 to ``MOST``].
    """
    each = by_class(scores)
    own = each[np.arange(len(labels)), labels.astype(np.int64)]
    # With two classes, as the metrics do: positive above 0.5.
    wrong = np.flatnonzero(each.argmax(1) != labels)
    return wrong[np.argsort(own[wrong], kind="stable")][:MOST]


def strips_of_mistakes(
    data: RunData, labels: np.ndarray, scores: np.ndarray
) -> dict[str, np.ndarray]:
    """Return frames of ``most_wrong`` val clips, side by side, by a title that says the class, the
    predicted one and its probability. Clips that cannot be read are left out.

    Args:
        labels, scores: of the val split in the order of the store.
    """
    clips, names = np.sort(data.numbers("val")), data.classes
    strips = {}
    for number, place in enumerate(most_wrong(labels, scores), 1):
        score, label = scores[place], int(labels[place])
        called = int(score > 0.5) if scores.ndim == 1 else int(score.argmax())
        probability = score if called and scores.ndim == 1 else 1 - score
        if scores.ndim > 1:
            probability = score[called]
        try:
            clip = data.store.read(int(clips[place]))
        except (DistTrainError, OSError) as error:
            log.warning("a clip is not shown in TensorBoard: %s", error)
            continue
        title = f"{number} {names[label]} called {names[called]} {probability:.2f}"
        strips[title] = film_strip(clip, data.config.model.channels or GREY)[0]
    return strips
