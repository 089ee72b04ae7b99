import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from dist_train.errors import ConfigError, RunError
from dist_train.evaluation.calibration import fit
from dist_train.evaluation.evaluate import Evaluation, evaluate
from dist_train.evaluation.evaluation_text import rows, table
from dist_train.evaluation.prediction_table import COLUMNS, read_predictions
from dist_train.metrics import best_threshold, prior_correct

# (split, label, probability). The best val interval is from 0.4 to 0.7 of the probability.
VAL = [("val", 0, 0.1), ("val", 0, 0.4), ("val", 1, 0.7), ("val", 1, 0.8)]
# At the middle of it: tp 2, fp 1, fn 1, tn 4.
TEST = [
    *(("test", 0, p) for p in (0.05, 0.1, 0.2, 0.5, 0.6)),
    *(("test", 1, p) for p in (0.3, 0.7, 0.9)),
]
UNKNOWN = [("test", "", 0.99), ("val", "", 0.01)]


def calibrated(probability: float) -> float:
    return float(prior_correct([probability], 0.25, 0.05)[0])


def write(path: Path, clips: list[tuple[str, object, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for index, (split, label, probability) in enumerate(clips):
            corrected = calibrated(float(probability))
            name = f"clip{index}"
            table.writerow(
                [name, f"{name}.mp4", "g", split, label, repr(probability), repr(corrected), 40]
            )
    return path


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return write(tmp_path / "predictions.csv", [*VAL, *TEST, *UNKNOWN])


def test_threshold_from_val_and_figures_from_test(predictions: Path) -> None:
    evaluation = evaluate(predictions)
    assert (evaluation.split, evaluation.clips, evaluation.positives) == ("test", 8, 3)
    assert evaluation.threshold == pytest.approx((calibrated(0.4) + calibrated(0.7)) / 2)
    assert evaluation.threshold_fitted_on == "val"
    assert not evaluation.threshold_fitted_on_same_clips
    assert evaluation.confusion == ((4, 1), (1, 2))
    assert evaluation.mcc == pytest.approx((2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5))
    assert evaluation.auc == pytest.approx((3 + 5 + 5) / 15)
    assert evaluation.accuracy == 6 / 8
    assert evaluation.precision == pytest.approx(2 / 3)
    assert evaluation.recall == pytest.approx(2 / 3)
    assert evaluation.f1 == pytest.approx(2 / 3)
    assert list(evaluation.mcc_at) == ["0.4", "0.5", "0.6", "0.7"]
    assert evaluation.mcc_ci95[0] < evaluation.mcc < evaluation.mcc_ci95[1]
    assert evaluation.auc_ci95[0] < evaluation.auc <= evaluation.auc_ci95[1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_one_labelled_split_serves_for_both_and_says_so(tmp_path: Path, split: str) -> None:
    clips = [(split, label, p) for _, label, p in TEST]
    evaluation = evaluate(write(tmp_path / "p.csv", [*clips, *UNKNOWN]))
    assert evaluation.split == evaluation.threshold_fitted_on == split
    assert evaluation.threshold_fitted_on_same_clips
    assert evaluation.threshold == best_threshold(
        [calibrated(p) for *_, p in TEST], [y for _, y, _ in TEST]
    )


def test_a_given_threshold_is_used_as_it_is(predictions: Path) -> None:
    evaluation = evaluate(predictions, threshold=calibrated(0.25))
    assert (evaluation.threshold, evaluation.threshold_fitted_on) == (calibrated(0.25), None)
    assert not evaluation.threshold_fitted_on_same_clips
    assert evaluation.confusion == ((3, 2), (0, 3))


def test_precision_is_undefined_where_nothing_is_called_positive(predictions: Path) -> None:
    evaluation = evaluate(predictions, threshold=1.0)
    assert evaluation.precision is None
    assert (evaluation.mcc, evaluation.recall, evaluation.f1) == (0, 0, 0)


def test_an_interval_says_how_few_clips_there_are(tmp_path: Path, predictions: Path) -> None:
    """Where no clip is wrong, every draw of the bootstrap gives the same value."""
    mixed = dict(rows(evaluate(predictions)))
    assert mixed["MCC"].endswith(" to 1.000, of only 3 positive clips)")
    right = [("test", label, 0.1 + 0.8 * label) for label in (0, 0, 0, 1, 1)]
    sure = dict(rows(evaluate(write(tmp_path / "sure.csv", [*VAL, *right]))))
    assert sure["MCC"] == "1.000  (no interval: no resample of the only 2 positive clips differs)"
    assert (
        sure["Area under ROC"]
        == "1.000  (no interval: no resample of the only 2 positive clips differs)"
    )


def test_out_holds_the_evaluation(predictions: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "evaluation.json"
    evaluation = evaluate(predictions, out=out)
    assert Evaluation.model_validate_json(out.read_bytes()) == evaluation
    first = out.read_bytes()
    evaluate(predictions, out=out)
    assert out.read_bytes() == first


def test_calibration_errors_are_of_their_own_columns(predictions: Path) -> None:
    evaluation = evaluate(predictions)
    frame = read_predictions(predictions)
    test = frame[(frame.split == "test") & frame.label.notna()]
    # Eight clips in ten bins: a bin a clip.
    for value, column in (
        (evaluation.raw, "probability"),
        (evaluation.calibrated, "calibrated"),
    ):
        far = (test[column] - test["label"]).abs()
        assert value.ece == pytest.approx(far.mean())
        assert value.brier == pytest.approx((far**2).mean())
        assert value.log_loss == pytest.approx(-np.log(1 - far).mean())
    assert evaluation.calibration is None


def test_the_mapping_is_in_the_evaluation_with_its_figures_on_val(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    label, probability = (random.random(60) < 0.4).astype(int), random.random(60)
    val = [("val", int(y), float(p)) for y, p in zip(label, probability, strict=True)]
    predictions = write(tmp_path / "predictions.csv", [*val, *TEST])
    fitted = fit(probability, label, batches_share=0.25, prior=0.05)
    frame = pd.read_csv(predictions)
    frame["calibrated"] = fitted.apply(frame["probability"])
    frame.to_csv(predictions, index=False)
    file = predictions.parent / "calibration.json"
    # Not the mapping of these predictions, or not of these val clips.
    for forged in (
        {"clips": 600},
        {"prior": 0.9},
        {"prior": 2.0},
        {"method": "isotonic"},
        {"method": "isotonic", "points": ((1.0, 0.1), (0.0, 0.9))},
    ):
        file.write_text(fitted.model_copy(update=forged).model_dump_json())
        with pytest.raises(RunError, match=r"not a calibration|calibration of other predictions"):
            evaluate(predictions)
    file.write_text(fitted.model_dump_json())
    evaluation = evaluate(predictions)
    assert evaluation.calibration == fitted
    told = dict(rows(evaluation))
    assert told["Calibration"].startswith("temperature ")
    assert "60 val clips, " in told["Calibration"]
    assert told["Calibration"].endswith("positives to 5.0%")
    by_folds = fitted.cross_validated[fitted.method]
    assert f"{by_folds.log_loss:.3f} calibrated" in told["Log loss on val, cross-validated"]
    assert f"{evaluation.calibrated.brier:.3f} calibrated" in told["Brier score on test"]


def test_values_are_read_exactly(tmp_path: Path) -> None:
    """Probabilities to the last bit, and labels also where they are written as floats."""
    values = np.random.default_rng(0).random(2000)
    labels = [0, "", "1.0", "0.0"] * 500
    rows = [("val", label, float(p)) for label, p in zip(labels, values, strict=True)]
    table = read_predictions(write(tmp_path / "p.csv", rows))
    assert np.array_equal(table["probability"], values)
    assert table["label"].fillna(-1)[:4].tolist() == [0, -1, 1, 0]


def test_table_for_the_terminal(predictions: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(table(evaluate(predictions)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("8 clips, 3 positive", "fitted on val", "2 TP  1 FN  1 FP  4 TN", "0.867"):
        assert part in text


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (UNKNOWN, "no clip has a label"),
        ([("val", 0, 0.1), ("val", 0, 0.2)], "the 2 labelled val clips are all negative"),
        ([*VAL, ("test", 1, 0.2)], "the 1 labelled test clips are all positive"),
        ([*VAL, ("val", 1, 1.25)], "clip4: probability is '1.25', not a number between 0 and 1"),
        ([*VAL, ("val", 1, float("nan"))], "clip4: probability is 'nan'"),
        ([*VAL, ("val", 2, 0.5)], "clip4: label is '2', not 0, 1 or empty"),
        ([*VAL, ("train", 1, 0.5)], "clip4: split is 'train', not val or test"),
    ],
)
def test_unusable_clips_are_named(
    tmp_path: Path, clips: list[tuple[str, object, object]], message: str
) -> None:
    path = write(tmp_path / "predictions.csv", clips)
    with pytest.raises(RunError) as caught:
        evaluate(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.fix


def test_predictions_of_another_store_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(",".join(COLUMNS) + "\na,a.mp4,g,,1,0.5,0.5,8\n")
    with pytest.raises(RunError, match="another store, whose clips have no split"):
        evaluate(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there are no predictions.*dist-train predict"),
        (b"", "no table of predictions"),
        (b"\xff\xfe\x00\x80", "no table of predictions"),
        (b'key\n"a', "no table of predictions"),
        (b"key,filename,group,split,label,probability\n", "no column calibrated, frames"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        evaluate(path)


def test_threshold_must_be_a_probability(predictions: Path) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        evaluate(predictions, threshold=1.5)


def test_a_clip_that_is_there_twice_is_refused(predictions: Path) -> None:
    lines = predictions.read_text().splitlines(keepends=True)
    predictions.write_text("".join([*lines, *lines[5:6] * 1000]))
    with pytest.raises(RunError, match="clip clip4: 1000 rows are of a clip that has a row alread"):
        read_predictions(predictions)
