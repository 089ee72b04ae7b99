"""What a few recorded columns of the clips alone predict: their sizes, without any pixel.

A network is worth its name by how much it is better. Splits, selection, threshold, calibration and
metrics are those of a run, so that both can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from dist_train.config import Config
from dist_train.data.check.clips import describing, recorded
from dist_train.data.types import CLASSES, metadata_columns
from dist_train.errors import ConfigError, PlanError, RunError
from dist_train.evaluation.calibration import fit
from dist_train.evaluation.evaluate import Evaluation, evaluate
from dist_train.files import check_replaceable, check_writable, write_whole
from dist_train.run.data import RunData, open_data
from dist_train.run.folder import CALIBRATION, EVALUATION, ORIGIN, PREDICTIONS, parts_of_run
from dist_train.safe_text import for_spreadsheet

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

Kind = Literal["logistic", "boosting"]
SIZES = ("depth", "height", "width")
#: Files of this command, which it replaces.
_OWN = {PREDICTIONS, EVALUATION}


def baseline(
    config: Config, *, model: Kind = "logistic", columns: Sequence[str] = SIZES
) -> Evaluation:
    """Fit a model of columns to the train split, and evaluate it as a run.

    ``config.out`` gets ``predictions.csv`` (as of ``predict``), ``calibration.json`` and
    ``evaluation.json``, and ``dist-train evaluate`` reads it as the folder of a run.

    Args:
        config: its ``store``, ``select``, ``split`` and ``seed`` are used as in training.
        model: logistic regression, or gradient boosting of trees. Both weigh the classes equally.
        columns: depth, height, width, or others that ``dist-train check`` tries as leaks.

    Raises:
        ConfigError: there is no such model or column, no clips are held out, or scikit-learn is not
            installed.
        RunError: ``config.out`` is the folder of a run.
        PlanError, StoreError: as in training; or there are more than two classes.
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
    clips = data.clips
    held_out = clips["split"] != "train"
    features = _chosen(describing(recorded(data.store)), columns).loc[clips.index]
    if data.target.kind != "binary":
        raise PlanError(
            f"the target is {data.target.kind}, and a baseline tells two classes apart",
            where="target",
            fix="Choose two by target.classes.",
        )
    clips = clips.assign(label=data.class_codes()[clips.index])
    label = clips["label"].to_numpy(np.int64)
    trained = ~held_out.to_numpy()
    fitted = _model(model, features, config.seed)
    fitted.fit(features[trained], label[trained])
    probability = fitted.predict_proba(features[~trained])[:, 1]
    _write(data, clips[held_out], probability)
    return evaluate(config.out / PREDICTIONS, out=config.out / EVALUATION)


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


def _chosen(known: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    for column in columns:
        if column not in known:
            raise ConfigError(
                f"the clips have no column {column!r}",
                where="columns",
                fix=f"There are {', '.join(map(str, known))}.",
            )
    if not columns:
        raise ConfigError("there are no columns", where="columns", fix="Name one at least.")
    return known[list(dict.fromkeys(columns))]


def _model(kind: Kind, columns: pd.DataFrame, seed: int) -> Pipeline:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from dist_train.data.check.leaks import as_numbers, boosting

    if kind == "boosting":
        return make_pipeline(as_numbers(columns, seed), boosting(seed, class_weight="balanced"))
    return make_pipeline(
        as_numbers(columns, seed),
        SimpleImputer(strategy="median", keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )


def _write(data: RunData, clips: pd.DataFrame, probability: np.ndarray) -> None:
    """Write the predictions of clips as ``predict`` does, and their calibration."""
    out, label = data.config.out, clips["label"].to_numpy(np.float64)
    val = (clips["split"] == "val").to_numpy()
    # Weighted equally, classes are as in batches of one positive to one negative.
    calibration = fit(probability[val], label[val], batches_share=0.5, prior=data.natural_rate())
    metadata = metadata_columns(clips)
    table = clips[["key", "filename", "group", "split", "label"]].assign(
        probability=probability,
        calibrated=calibration.apply(probability),
        frames=clips["frames"],
    )
    texts = ["filename", "group", *metadata]
    names = {code: data.classes[code] for code in (0, 1)}
    if names != {0: CLASSES[0], 1: CLASSES[1]}:
        table["class"] = clips["label"].map(names)
        texts.append("class")
    table[metadata] = clips[metadata]
    for name in texts:
        table[name] = table[name].map(for_spreadsheet)
    write_whole(out / CALIBRATION, calibration.model_dump_json(indent=2) + "\n")
    write_whole(out / PREDICTIONS, table.to_csv(index=False))
