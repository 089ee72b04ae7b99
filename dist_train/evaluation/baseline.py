"""What a few recorded columns of the clips alone predict: their sizes, without any pixel.

A network is worth its name by how much it is better. Splits, selection, threshold, calibration and
metrics are those of a run, so that both can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from dist_train.config import Config
from dist_train.data.check.clips import describing, recorded
from dist_train.data.splits import CODES
from dist_train.data.types import metadata_columns
from dist_train.errors import ConfigError, RunError
from dist_train.evaluation.evaluate import Evaluation, evaluate_any
from dist_train.evaluation.predict import results_of
from dist_train.evaluation.target_evaluation import TargetEvaluation
from dist_train.evaluation.target_table import PREDICTED, Scored
from dist_train.files import check_replaceable, check_writable, write_whole
from dist_train.metrics import Floats
from dist_train.run.data import RunData, open_data
from dist_train.run.folder import CALIBRATION, EVALUATION, ORIGIN, PREDICTIONS, parts_of_run
from dist_train.safe_text import for_spreadsheet
from dist_train.training.class_rates import class_rates

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from dist_train.data.check.leaks import TargetType

Kind = Literal["logistic", "boosting"]
SIZES = ("depth", "height", "width")
#: Files of this command, which it replaces.
_OWN = {PREDICTIONS, EVALUATION}


def baseline(
    config: Config, *, model: Kind = "logistic", columns: Sequence[str] = SIZES
) -> Evaluation | TargetEvaluation:
    """Fit a model of columns to the train split, and evaluate it as a run.

    ``config.out`` gets ``predictions.csv`` (as of ``predict``), ``calibration.json`` and
    ``evaluation.json``, and ``dist-train evaluate`` reads it as the folder of a run. Of regression
    there is no ``calibration.json``, and an older one is deleted.

    Each label of multilabel, and each value of regression, has a model of its own. Ordered classes
    are predicted as classes without an order.

    Args:
        config: its ``store``, ``target``, ``select``, ``split`` and ``seed`` are used as in
            training.
        model: logistic regression (of values ridge regression: Hoerl and Kennard 1970), or gradient
            boosting of trees. Both weigh the classes equally.
        columns: depth, height, width, or others that ``dist-train check`` tries as leaks.

    Raises:
        ConfigError: there is no such model or column, no clips are held out, or scikit-learn is not
            installed.
        RunError: ``config.out`` is the folder of a run.
        PlanError, StoreError: as in training.
        OSError: ``config.out`` cannot be written.
    """
    if model not in get_args(Kind):
        raise ConfigError(
            f"there is no baseline {model!r}",
            where="model",
            fix=f"There are {', '.join(get_args(Kind))}.",
        )
    if find_spec("sklearn") is None:
        raise ConfigError(
            "baselines need scikit-learn, not installed here",
            fix="Run pip install 'dist_train[check]'.",
        )
    if config.split.train_on_all:
        raise ConfigError(
            "no clips are held out to evaluate",
            where="split.train_on_all",
            fix="Set it to false.",
        )
    _check_place(config)
    data = open_data(config, training=True)
    of_labels = data.target_labels.columns
    known = describing(recorded(data.store), besides=of_labels)
    features = _chosen(known, columns, of_labels).loc[data.clips.index]
    _write(data, _scores(model, features, data))
    return evaluate_any(config.out / PREDICTIONS, out=config.out / EVALUATION)


def _check_place(config: Config) -> None:
    check_writable(config.out)
    for name in (PREDICTIONS, CALIBRATION, EVALUATION):
        check_replaceable(config.out / name)
    others = [name for name in parts_of_run(config.out) if name not in _OWN]
    if (config.out / ORIGIN).exists():
        others.append(ORIGIN)
    if others:
        raise RunError(
            f"the folder is that of a run ('{others[0]}' is in it)",
            where=config.out,
            fix="Choose another 'out'.",
        )


def _chosen(known: pd.DataFrame, columns: Sequence[str], of_labels: Sequence[str]) -> pd.DataFrame:
    for column in columns:
        if column not in known:
            raise ConfigError(
                f"the clips have no column {column!r}"
                + (", or it gives the label" if column in of_labels else ""),
                where="columns",
                fix=f"There are {', '.join(map(str, known))}.",
            )
    if not columns:
        raise ConfigError("there are no columns", where="columns", fix="Name one at least.")
    return known[list(dict.fromkeys(columns))]


def _scores(kind: Kind, features: pd.DataFrame, data: RunData) -> Floats:
    """Scores of the held-out clips, as ``Target.scores``.

    Args:
        features: of the selected clips.
    """
    target, seed = data.target, data.config.seed
    trained = data.splits[features.index] == CODES["train"]
    known, asked = features[trained], features[~trained]
    labels = data.target_labels.values[features.index][trained]

    def probability(codes: np.ndarray, type_: TargetType = "binary") -> Floats:
        fitted = _model(kind, features, seed, type_).fit(known, codes.astype(np.int64))
        return np.asarray(fitted.predict_proba(asked), np.float64)

    def of_label(has: np.ndarray) -> Floats:
        if 0 < has.sum() < len(has):
            return probability(has)[:, 1]
        # Nothing is known of the clips that differ.
        return np.full(len(asked), 0.5)

    def of_value(values: np.ndarray) -> Floats:
        fitted = _model(kind, features, seed, "continuous").fit(known, values.astype(np.float64))
        return np.asarray(fitted.predict(asked), np.float64)

    if target.kind == "binary":
        return probability(labels)[:, 1]
    if target.is_coded:
        return probability(labels, "multiclass" if len(target.classes) > 2 else "binary")
    each = of_value if target.kind == "regression" else of_label
    return np.stack([each(column) for column in labels.T], axis=1)


def _model(kind: Kind, columns: pd.DataFrame, seed: int, type_: TargetType) -> Pipeline:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from dist_train.data.check.leaks import as_numbers, boosting, boosting_of_values

    is_value, numbers = type_ == "continuous", as_numbers(columns, seed, type_)
    if kind == "boosting":
        trees = boosting_of_values(seed) if is_value else boosting(seed, class_weight="balanced")
        return make_pipeline(numbers, trees)
    return make_pipeline(
        numbers,
        SimpleImputer(strategy="median", keep_empty_features=True),
        StandardScaler(),
        Ridge() if is_value else LogisticRegression(class_weight="balanced", max_iter=1000),
    )


def _write(data: RunData, scores: Floats) -> None:
    """Write the predictions of the held-out clips as ``predict`` does, and their calibration."""
    out, clips, target = data.config.out, data.held_out, data.target
    labels = data.target_labels.values[clips.index]
    val = (clips["split"] == "val").to_numpy()
    is_number = target.kind in ("binary", "regression")
    truth = labels[val].astype(np.float64 if is_number else np.int64)
    columns, calibration, _ = results_of(
        clips, data.store, target, labels, scores, Scored(target, scores[val], scores[val], truth),
        _shares(data), None, None,
    )  # fmt: skip
    table = clips[["key", "filename", "group", "split"]].assign(**columns)
    metadata = metadata_columns(clips)
    table[metadata] = clips[metadata]
    texts = {"filename", "group", "class", PREDICTED, *metadata} & set(table)
    table = table.assign(**{str(name): table[name].map(for_spreadsheet) for name in texts})
    if calibration is None:
        (out / CALIBRATION).unlink(missing_ok=True)
    else:
        write_whole(out / CALIBRATION, calibration.model_dump_json(indent=2) + "\n")
    write_whole(out / PREDICTIONS, table.to_csv(index=False))


def _shares(data: RunData) -> dict[str, Any]:
    """The shares of classes, as in the record of a run. Weighted equally, classes are as in batches
    that have as many clips of each."""
    target = data.target
    if target.kind == "binary":
        return {"positive_rate": {"train_batches": 0.5, "natural": data.natural_rate()}}
    if target.kind == "regression":
        return {}
    share = 1 / len(target.classes) if target.is_coded else 0.5
    natural = dict(zip(target.classes, class_rates(data).natural.tolist(), strict=True))
    return {
        "class_shares": {
            "train_batches": dict.fromkeys(target.classes, share),
            "natural": natural,
        }
    }
