"""Labels that the predictions of held-out clips contradict, ranked.

Classes: confident learning (Northcutt, Jiang and Chuang, "Confident learning: estimating
uncertainty in dataset labels", Journal of Artificial Intelligence Research 70, 2021). Each class
has a threshold, the mean probability that its own clips get. The confident joint counts the clips
of label i whose probability of class j reaches the threshold of j. Of the clips of label i, the
share that j has of row i is called wrong: those of the largest margin ("prune by noise rate").

Values of regression: residuals over their robust spread (Iglewicz and Hoaglin, "How to detect and
handle outliers", 1993).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtr

from dist_train.class_metrics import prior_correct_classes
from dist_train.errors import RunError
from dist_train.evaluation.calibration import Calibration
from dist_train.evaluation.class_calibration import (
    AnyCalibration,
    ClassCalibration,
    LabelCalibration,
)
from dist_train.evaluation.evaluate import class_names
from dist_train.evaluation.prediction_origin import check_origin
from dist_train.evaluation.prediction_table import read_calibration, read_predictions
from dist_train.evaluation.target_table import CALIBRATED, is_labelled, scored, target_of_table
from dist_train.files import check_replaceable, write_whole
from dist_train.metrics import Floats, Labels, prior_correct
from dist_train.run.folder import PREDICTIONS, RECORD, SUSPECTS
from dist_train.run.record import open_run
from dist_train.safe_text import for_spreadsheet
from dist_train.targets import Target, by_class

COLUMNS = (
    *("key", "filename", "group", "label", "class", "suggested"),
    *("quality", "rank", "likely"),
)
#: Labelled clips below which little is known of a class's labels.
FEW = 10
#: Robust standard deviations from which a residual is an outlier (Iglewicz and Hoaglin).
OUTLIER = 3.5
#: Least probability and threshold to divide by.
_EDGE = 1e-12


class Judged(NamedTuple):
    """What predictions say of N labels.

    Attributes:
        suggested: the class, or value, that the prediction says: [N].
        quality: 0..1, low is suspicious: [N].
        likely: whether the label is called wrong: bool [N].
        order: the places of the labels, the most suspicious first: int64 [N].
    """

    suggested: np.ndarray
    quality: Floats
    likely: np.ndarray
    order: Labels


class Suspects(NamedTuple):
    """What ``find_suspects`` wrote.

    Attributes:
        labels: how many were judged.
        likely: how many of them are called wrong.
        notes: what limits the result, a sentence each.
    """

    path: Path
    labels: int
    likely: int
    notes: list[str]


def find_suspects(run: Path) -> Suspects:
    """Rank the labels of a run's predicted clips, and write ``suspects.csv``.

    A cross-validated run judges all clips; another one those of val and test.

    Returns:
        The path among others. The table has a row for each label, the most suspicious first: key,
        filename, group, label, class (its name; of multilabel and regression the name of the label
        or value that the row is about), suggested, quality, rank (from 1) and likely.

    Raises:
        RunError: there are no predictions, or they are not of the run's weights; or no clip has a
            label, or all have the same.
        FileError: ``suspects.csv`` is not a plain file.
        OSError: it cannot be written.
    """
    path = run / SUSPECTS
    check_replaceable(path)
    if os.path.lexists(run / RECORD):
        open_run(run)
        check_origin(run)
    frame = read_predictions(run / PREDICTIONS)
    calibration = read_calibration(run / PREDICTIONS, frame)
    known = frame[is_labelled(frame, target_of_table(frame))]
    if known.empty:
        raise RunError(
            "no clip has a label",
            where=run / PREDICTIONS,
            fix="Predict clips whose labels are in the manifest",
        )
    notes = []
    if "fold" not in frame:
        notes.append(
            f"only the {len(known):,} clips of val and test were judged; those of train were not "
            "held out. Runs with other values of split.fold judge those"
        )
    table = _table(known, calibration, notes)
    if table is None:
        raise RunError(
            f"the {len(known)} labelled clips all have the same label",
            where=run / PREDICTIONS,
            fix="Predict clips of several classes",
        )
    for column in ("filename", "group", "class", "suggested"):
        if not pd.api.types.is_numeric_dtype(table[column]):
            table[column] = table[column].map(for_spreadsheet)
    write_whole(path, table.to_csv(index=False))
    return Suspects(path, len(table), int(table["likely"].sum()), notes)


def _table(
    known: pd.DataFrame, calibration: AnyCalibration | None, notes: list[str]
) -> pd.DataFrame | None:
    """The rows of ``suspects.csv``; None if all labels are the same. Adds to ``notes``."""
    target = target_of_table(known)
    judge = _by_class if target.is_coded else _by_column
    identity = known[["key", "filename", "group"]].reset_index(drop=True)
    rows = [
        identity.assign(**columns, quality=found.quality, likely=found.likely, at=_places(found))
        for found, columns in judge(known, target, calibration, notes)
    ]
    if not rows:
        return None
    # Of several labels or values, by turns where they are equally suspicious.
    table = pd.concat(rows, ignore_index=True).sort_values(["quality", "at"], kind="stable")
    return table.assign(rank=np.arange(1, len(table) + 1))[list(COLUMNS)]


def _by_class(
    known: pd.DataFrame, target: Target, calibration: AnyCalibration | None, notes: list[str]
) -> Iterator[tuple[Judged, dict[str, Any]]]:
    """What is said of the class of each clip, and its columns; nothing if there is one class."""
    names: tuple[str, ...] = target.classes
    if target.kind == "binary":
        names, label = class_names(known), known["label"].to_numpy(np.int64)
        p = by_class(_at_own_share(known[CALIBRATED].to_numpy(np.float64), label, calibration))
    else:
        clips = scored(known, target)
        p, label = clips.calibrated, clips.truth
        if isinstance(calibration, ClassCalibration):
            # A class without clips keeps a share that can be divided by.
            counts = np.bincount(label, minlength=len(names)) + _EDGE
            p = prior_correct_classes(p, calibration.prior, (counts / counts.sum()).tolist())
    if len(np.unique(label)) < 2:
        return
    _note_few(label, names, notes)
    found, text = judge_classes(p, label), np.array(names, object)
    yield found, {"label": label, "class": text[label], "suggested": text[found.suggested]}


def _by_column(
    known: pd.DataFrame, target: Target, calibration: AnyCalibration | None, notes: list[str]
) -> Iterator[tuple[Judged, dict[str, Any]]]:
    """The same of each label or value by itself."""
    clips = scored(known, target)
    for k, name in enumerate(target.classes):
        truth = clips.truth[:, k]
        if target.kind == "regression":
            found = judge_values(clips.probability[:, k], truth)
        elif len(np.unique(truth)) < 2:
            notes.append(f"'{name}' is not judged: all clips have the same label")
            continue
        else:
            own = calibration.labels[name] if isinstance(calibration, LabelCalibration) else None
            _note_few(truth, (f"not {name}", name), notes)
            p = by_class(_at_own_share(clips.calibrated[:, k], truth, own))
            found = judge_classes(p, truth)
        yield found, {"label": truth, "class": name, "suggested": found.suggested}


def _places(found: Judged) -> Labels:
    """The place of each label in the order."""
    places = np.empty_like(found.order)
    places[found.order] = np.arange(len(places))
    return places


def judge_classes(probability: Floats, label: Labels) -> Judged:
    """Confident learning.

    The quality is the probability of the label with each class measured by its threshold: p_k / t_k
    over their sum. Where positives are rare, no clip of theirs need have a high probability, and
    the plain one would suspect them all.

    Args:
        probability: [N, K], of clips that the model was not trained on, calibrated, at the share of
            the classes among these clips.
        label: class codes [N].
    """
    clips, classes = probability.shape
    rows, counts = np.arange(clips), np.bincount(label, minlength=classes)
    own = probability[rows, label]
    sums = np.bincount(label, own, classes)
    # A class without clips has no threshold that a probability could reach.
    threshold = np.where(counts > 0, np.maximum(sums / np.maximum(counts, 1), _EDGE), np.inf)
    relative = probability / threshold
    quality = relative[rows, label] / np.maximum(relative.sum(axis=1), _EDGE)
    suggested = relative.argmax(axis=1)

    reaches = probability >= threshold
    counted = reaches.any(axis=1)
    confident = np.where(reaches, probability, -1.0).argmax(axis=1)
    pairs, joint = np.unique(label[counted] * classes + confident[counted], return_counts=True)
    given, other = pairs // classes, pairs % classes
    of_row = np.bincount(given, joint, classes)
    likely = np.zeros(clips, np.bool_)
    for i, j, share in zip(given, other, joint / of_row[given], strict=True):
        if i != j:
            members = np.flatnonzero(label == i)
            margin = probability[members, i] - probability[members, j]
            wrong = round(float(share) * len(members))
            likely[members[np.argsort(margin, kind="stable")[:wrong]]] = True
    likely &= suggested != label
    return Judged(suggested, quality, likely, np.argsort(quality, kind="stable"))


def judge_values(value: Floats, truth: Floats) -> Judged:
    """Outliers among residuals.

    A residual is measured from the median, in units of 1.4826 times the median absolute deviation,
    which is the standard deviation of normal ones and which the outliers themselves hardly widen.
    The quality is the share of normal residuals that are farther out.

    Args:
        value: what was predicted, [N].
        truth: [N].
    """
    residual = truth - value
    residual = residual - np.median(residual)
    spread = 1.4826 * float(np.median(np.abs(residual))) or float(residual.std()) or 1.0
    far = np.abs(residual) / spread
    quality = np.asarray(2 * ndtr(-far), np.float64)
    return Judged(value, quality, far > OUTLIER, np.argsort(-far, kind="stable"))


def _at_own_share(p: Floats, label: Labels, calibration: AnyCalibration | None) -> Floats:
    """Calibrated probabilities [N] of two classes, moved from the prior that they are for to the
    share of these clips."""
    share = float(label.mean())
    if not isinstance(calibration, Calibration) or not 0 < share < 1:
        return p
    return prior_correct(p, calibration.prior, share)


def _note_few(label: Labels, names: Sequence[str], notes: list[str]) -> None:
    counts = np.bincount(label, minlength=len(names))
    few = [f"{names[k]} ({n})" for k, n in enumerate(counts.tolist()) if 0 < n < FEW]
    if few:
        notes.append(
            f"fewer than {FEW} judged clips: {', '.join(few[:10])}; little is known of their labels"
        )
