"""The model card of a run: every number is one of the run's own files, or of its store's table."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train import __version__
from dist_train.class_metrics import metrics_of
from dist_train.config import Config
from dist_train.data.splits import CODES, crossed_groups, given_splits
from dist_train.data.types import GREY, class_names
from dist_train.errors import DistTrainError, RunError
from dist_train.evaluation import evaluation_text, target_text
from dist_train.evaluation.calibration import Calibration
from dist_train.evaluation.class_calibration import (
    AnyCalibration,
    ClassCalibration,
    LabelCalibration,
)
from dist_train.evaluation.evaluate import Evaluation
from dist_train.evaluation.model_card import (
    CardData,
    CardDecision,
    CardEvaluation,
    CardInput,
    CardMetric,
    CardModel,
    CardSelection,
    ModelCard,
    Spread,
    number,
    spread,
)
from dist_train.evaluation.prediction_origin import check_origin, read_origin
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.evaluation.report_run import stored_evaluation
from dist_train.evaluation.target_evaluation import OF_SCORES, TargetEvaluation
from dist_train.evaluation.target_table import is_labelled, scored, target_of_table
from dist_train.places import Location, shown
from dist_train.run.data import RunData, black_and_white, open_run_data
from dist_train.run.folder import EVALUATION, PREDICTIONS
from dist_train.run.model import target_of
from dist_train.targets import Kind, Target

log = logging.getLogger(__name__)

#: Clips of a class below which a card names it as a limit, in training and in the evaluation.
FEW_TRAINED, FEW_EVALUATED = 100, evaluation_text.FEW_CLIPS
#: Most classes that a limit names.
MOST_NAMED = 10
EVALUATE = "run 'dist-train predict' and 'dist-train evaluate' on the run, and export it again"
AnyEvaluation = Evaluation | TargetEvaluation


def card_of_run(
    run: Path,
    config: Config,
    record: Mapping[str, Any],
    facts: Mapping[str, Any],
    out: Path,
    *,
    calibration: AnyCalibration | None,
    snapshots: Sequence[str] | None,
    parameters: int,
    crc32c: int,
    store_path: Location | None = None,
) -> ModelCard:
    """The card of the file ``out`` that ``export_run`` has written.

    Args:
        facts: what ``export_run`` returns.
        snapshots: names of the snapshots in the file, whose evaluation the run may have; None for
            the weights of a single step, which the run has not evaluated.
        parameters: of one network.
        crc32c: of the file's weights.
        store_path: where the run's store is now, if it was moved.
    """
    target = target_of(config.target)
    names = list(target.classes)
    if target == Target():
        by_code = class_names(record["store"].get("classes"))
        names = [by_code[0], by_code[1]]
    session = record["sessions"][-1]
    model = CardModel(
        name=config.model.name,
        parameters=parameters,
        networks=len(facts["networks"]),
        steps=facts["steps"],
        weights=facts["from"],
        settings={name: value for name, value in facts["model"].items() if name != "name"},
        precision=facts["precision"],
        target=target.kind,
        classes=names,
        trained=session["started"],
        versions=record["versions"],
        code_from_outside=facts.get("code_from_outside", []),
    )
    data, missing = None, None
    try:
        data = open_run_data(run, config, store_path=store_path)
    except DistTrainError as error:
        missing = error.what
    evaluation = None if snapshots is None else _evaluation(run, snapshots)
    card = ModelCard(
        file=out.name,
        crc32c=crc32c,
        dist_train=__version__,
        model=model,
        data=_data(record, data, missing),
        input=_input(config, record, facts, data),
        selection=_selection(config, record),
        evaluation=None if evaluation is None else evaluated(evaluation),
        decision=_decision(facts, calibration),
        limits=[],
        use=_use(out, model.target, has_calibration=calibration is not None),
    )
    return card.model_copy(update={"limits": _limits(card, config)})


def _data(record: Mapping[str, Any], data: RunData | None, missing: str | None) -> CardData:
    store = record["store"]
    known = CardData(
        store=shown(store["path"]).rstrip("/").rpartition("/")[2],
        content=store["content"],
        fingerprint=store["fingerprint"],
        clips=store["clips"],
        missing=missing,
    )
    if data is None:
        return known
    table = data.store.table
    chosen = data.splits > 0
    groups, named = table.codes("group"), np.array([bool(n) for n in table.names("group")])
    there = [name for name, code in CODES.items() if (data.splits == code).any()]
    return known.model_copy(
        update={
            "by_split": {
                name: dict(zip(data.target_labels.classes, data.counts(name), strict=True))
                for name in there
            },
            "groups": {
                name: int(named[np.unique(groups[data.splits == CODES[name]])].sum())
                for name in there
            },
            "split_by": "table" if given_splits(table)[chosen].all() else "folds",
            "shared_groups": len(crossed_groups(table, data.splits)),
            "rejected": sum(data.store.info["rejected"].values()),
            **{name: _spread(table[name][chosen]) for name in ("frames", "height", "width")},
        }
    )


def _spread(values: np.ndarray) -> Spread | None:
    """None if no value is known."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    return Spread(least=known.min(), median=float(np.median(known)), most=known.max())


def _input(
    config: Config, record: Mapping[str, Any], facts: Mapping[str, Any], data: RunData | None
) -> CardInput:
    said = record["store"].get("black_and_white", {})
    found = CardInput(
        channels=list(config.model.channels or GREY),
        dtype=None,
        size=config.clip.size,
        max_frames=config.clip.max_frames,
        intensity=said,
        preparation=facts["preprocessing"],
    )
    if data is None:
        return found
    chosen, table = data.splits > 0, data.store.table
    spacing = {axis: _spread(table.sampling(f"spacing.{axis}")[chosen]) for axis in "zyx"}
    return found.model_copy(
        update={
            "dtype": str(data.store.dtype),
            "intensity": black_and_white(data.store),
            "frame_rate": _spread(1 / table.sampling("interval")[chosen]),
            "spacing": {axis: of for axis, of in spacing.items() if of is not None},
        }
    )


def _selection(config: Config, record: Mapping[str, Any]) -> CardSelection:
    stop = config.stop.model_dump(mode="json") if config.stop.metric is not None else None
    return CardSelection(
        steps=record["steps"],
        epochs=config.train.epochs,
        snapshots=config.snapshots.model_dump(mode="json")["at"],
        early_stopping=stop,
        ema=config.optim.ema,
        split=config.split.model_dump(mode="json"),
        select=config.select.model_dump(mode="json"),
        seed=config.seed,
        held_out_seen=record.get("held_out_seen", 0),
    )


def _evaluation(run: Path, snapshots: Sequence[str]) -> AnyEvaluation | None:
    """The run's evaluation, if it is of its predictions, and these are of the exported weights
    without test-time augmentation."""
    if not os.path.lexists(run / PREDICTIONS):
        return None
    try:
        given = stored_evaluation(run / EVALUATION)
        if given is None:
            return None
        check_origin(run)
        origin = read_origin(run / PREDICTIONS)
        predicted_by = set(snapshots) if origin is None else set(origin.snapshots)
        is_plain = origin is None or origin.tta is None
        if is_plain and predicted_by == set(snapshots) and _is_of(run, given):
            return given
        reason = "it is of other predictions or snapshots"
        if not is_plain:
            reason = "it is of predictions with --tta, which an export makes without"
    except RunError as error:
        reason = error.what
    log.warning("%s is not in the model card: %s. Evaluate again", run / EVALUATION, reason)
    return None


def _is_of(run: Path, given: AnyEvaluation) -> bool:
    """Whether the predictions have the number of clips and the metrics that an evaluation says, as
    far as these depend on no threshold."""
    frame = read_predictions(run / PREDICTIONS)
    target = target_of_table(frame)
    frame = frame[is_labelled(frame, target) & (frame["split"] == given.split).to_numpy()]
    kind = "binary" if isinstance(given, Evaluation) else given.kind
    if (kind, given.clips) != (target.kind, len(frame)):
        return False
    if isinstance(given, Evaluation):
        said: dict[str, float | None] = {"auc": given.auc, "ap": given.ap}
        scores, truth = frame["probability"].to_numpy(), frame["label"].to_numpy()
    else:
        names = given.metrics if target.kind == "regression" else OF_SCORES
        said = {name: given.metrics[name].value for name in names}
        clips = scored(frame, target)
        scores, truth = clips.probability, clips.truth
    found = metrics_of(target, scores, truth)
    return all(_same(found[name], value) for name, value in said.items())


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def evaluated(e: AnyEvaluation) -> CardEvaluation:
    """What an evaluation says. Only later versions have ``intervals``, ``choice``, ``resampled``
    and ``worst``."""
    content = e.model_dump(mode="json")
    if isinstance(e, Evaluation):
        names = ("mcc", "auc", "ap", "accuracy", "f1", "precision", "recall")
        figures = {
            name: CardMetric(value=content[name], ci95=content.get(f"{name}_ci95"))
            for name in names
        }
        classes = dict(zip(e.classes, (e.clips - e.positives, e.positives), strict=True))
        threshold: float | dict[str, float] | None = e.threshold
        rule = evaluation_text.threshold_origin(e)
    else:
        figures = {n: CardMetric(value=f.value, ci95=f.ci95) for n, f in e.metrics.items()}
        classes = {c.name: c.clips for c in e.per_class}
        each = {c.name: c.threshold for c in e.per_class if c.threshold is not None}
        threshold = each or None
        rule = None
        if each:
            rule = (
                "given" if e.threshold_fitted_on is None else f"fitted on {e.threshold_fitted_on}"
            )
    intervals = content.get("intervals") or {}
    for name, figure in figures.items():
        if figure.ci95 is None and intervals.get(name):
            figures[name] = figure.model_copy(update={"ci95": tuple(intervals[name])})
    if e.calibrated is not None:
        for name in ("log_loss", "brier", "ece"):
            figures[name] = CardMetric(value=getattr(e.calibrated, name), ci95=intervals.get(name))
    if rule is not None and content.get("choice"):
        rule = f"{content['choice']}, {rule}"
    return CardEvaluation(
        split=e.split,
        clips=e.clips,
        classes=classes,
        metrics=figures,
        resampled=content.get("resampled") or "clips",
        threshold=threshold,
        threshold_rule=rule,
        optimistic=e.threshold_fitted_on_same_clips,
        worst=list(content.get("worst") or []),
    )


def _decision(facts: Mapping[str, Any], calibration: AnyCalibration | None) -> CardDecision:
    told: str | None = None
    prior: float | dict[str, float] | None = None
    if isinstance(calibration, Calibration):
        told, prior = evaluation_text.how_calibrated(calibration), calibration.prior
    elif isinstance(calibration, ClassCalibration):
        told = target_text.how_calibrated(calibration)
        classes = (facts.get("target") or {}).get("classes") or range(len(calibration.prior))
        prior = dict(zip(map(str, classes), calibration.prior, strict=True))
    elif isinstance(calibration, LabelCalibration):
        told = target_text.how_calibrated(calibration)
        prior = {name: of.prior for name, of in calibration.labels.items()}
    threshold = facts["threshold"]
    rule = None if threshold is None else "the highest MCC on val, or 0.5 where val lacks a class"
    return CardDecision(threshold=threshold, rule=rule, calibration=told, prior=prior)


def _use(out: Path, kind: Kind, *, has_calibration: bool) -> list[str]:
    what = "value" if kind == "regression" else "probability"
    answer = f"{what} = model.probability(volumes)"
    if has_calibration:
        answer = f"{what} = model.calibrated(model.probability(volumes))"
    return [
        "from pathlib import Path; from dist_train.evaluation.exported import load_exported",
        f"model = load_exported(Path({out.name!r}))",
        f"{answer}  # of a tensor [clips, channels, frames, height, width]",
    ]


def _limits(card: ModelCard, config: Config) -> list[str]:
    """What the data say that the model cannot do, or that nobody knows of it."""
    data, e, split = card.data, card.evaluation, card.selection.split
    found = []
    if e is None:
        why = "it held out no clips" if split["train_on_all"] else EVALUATE
        found.append(f"Nothing is known of its errors: there is no evaluation of it ({why}).")
    else:
        few = {name: n for name, n in e.classes.items() if n < FEW_EVALUATED}
        if few:
            found.append(f"Few clips are evaluated: {_listed(few)}. The intervals are wide.")
        if e.optimistic:
            found.append(
                "The threshold was fitted on the evaluated clips: its metrics are too good."
            )
        if e.worst:
            found.append(f"The metrics are worst for: {'; '.join(map(_in_words, e.worst))}.")
        if data.split_by == "folds":
            fold = f"fold {split['fold']} of {split['folds']}"
            found.append(f"One training is evaluated, with {fold} as test: others may differ.")
    if card.selection.held_out_seen:
        found.append(
            f"The weights were trained on {card.selection.held_out_seen} of the held-out clips "
            "before: the metrics are too good."
        )
    if data.missing is not None:
        found.append(f"Classes, groups and sizes are not known here: {data.missing}.")
    trained = data.by_split.get("train", {})
    if few := {name: n for name, n in trained.items() if n < FEW_TRAINED}:
        found.append(f"Few clips were trained on: {_listed(few)}.")
    if data.shared_groups:
        found.append(
            f"{data.shared_groups} groups have clips in more than one split: the metrics do not "
            "tell of new groups."
        )
    elif data.by_split and not any(data.groups.values()):
        found.append(
            "The clips have no groups: whether the metrics hold for new ones is not known."
        )
    if data.frames is not None:
        cut = config.clip.max_frames
        longer = f", cut to {cut}" if cut is not None and cut < data.frames.most else ""
        found.append(f"Clips had {spread(data.frames)} frames{longer}; others were not tried.")
    if card.decision.prior is not None:
        found.append(
            "Calibrated probabilities hold where classes are as frequent as the prior says; "
            "elsewhere give 'dist-train predict --prior'."
        )
    return found


def _in_words(part: object) -> str:
    """A slice, as "site b, clips 20, mcc 0.41"."""
    if not isinstance(part, Mapping):
        return str(part)
    shown = {name: value for name, value in part.items() if value is not None}
    return ", ".join(
        f"{name} {number(value) if isinstance(value, float) else value}"
        for name, value in shown.items()
    )


def _listed(counts: Mapping[str, int]) -> str:
    shown = [f"{n} {name}" for name, n in list(counts.items())[:MOST_NAMED]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more classes" if more > 0 else "")
