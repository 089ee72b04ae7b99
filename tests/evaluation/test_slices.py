"""Names of classes and metadata, from the clip table to the report."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import ended, said, tiny_config
from make_media import store_of

from dist_train.data.store.build_spec import read_job
from dist_train.data.store.reader import Store
from dist_train.errors import RunError
from dist_train.evaluation.evaluate import Evaluation, evaluate
from dist_train.evaluation.evaluation_text import slice_rows
from dist_train.evaluation.prediction_table import COLUMNS
from dist_train.evaluation.slices import MOST_SLICES
from dist_train.run.record import read_record
from dist_train.training.train import train

# (label, probability, site): "a" has one mistake, "b" one class, and one clip has no site.
CLIPS = [
    *((0, 0.1, "a"), (0, 0.6, "a"), (1, 0.9, "a"), (1, 0.8, "a"), (1, 0.7, "a")),
    *((0, 0.2, "b"), (0, 0.1, "b"), (0, 0.3, "")),
]


def write(path: Path, clips: list[tuple[int, float, str]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*COLUMNS, "class", "meta:site"])
        for split in ("val", "test"):
            for number, (label, p, site) in enumerate(clips):
                name = ("flowing", "stalled")[label]
                key = f"{split}{number}"
                table.writerow(
                    [key, f"{key}.mp4", f"g{number % 2}", split, label, p, p, 8, name, site]
                )
    return path


def test_metrics_of_each_value_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.csv", CLIPS)
    found = evaluate(path, threshold=0.5, by="site", out=tmp_path / "evaluation.json")
    assert found.classes == ("flowing", "stalled")
    assert [(s.value, s.clips, s.positives) for s in found.slices] == [
        ("a", 5, 3), ("b", 2, 0), ("", 1, 0),
    ]  # fmt: skip
    first, *others = found.slices
    assert first.confusion == ((1, 1), (0, 3))
    assert first.mcc == pytest.approx((3 * 1 - 0) / np.sqrt(4 * 3 * 2 * 1))
    assert first.ap == pytest.approx(1.0)
    assert first.mcc_ci95 is not None
    assert first.mcc_ci95[0] < first.mcc <= first.mcc_ci95[1]
    assert all(s.mcc is s.mcc_ci95 is s.ap is None for s in others)
    assert slice_rows(found)[2] == ["(missing)", "1", "0", "1", "0", "–", "–", "–"]
    assert Evaluation.model_validate_json((tmp_path / "evaluation.json").read_text()) == found
    assert [s.value for s in evaluate(path, by="group").slices] == ["g0", "g1"]
    assert evaluate(path).slices == ()
    with pytest.raises(RunError, match=r"no column 'sites'. Did you mean 'site'\?"):
        evaluate(path, by="sites")
    # A column of the predictions themselves is no metadata.
    with pytest.raises(RunError, match=r"There are: site, group\. The clip table's further c"):
        evaluate(path, by="frames")


def test_the_most_frequent_values_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = [(number % 2, 0.1, f"s{number // 2}") for number in range(2 * MOST_SLICES + 10)]
    path = write(tmp_path / "predictions.csv", [*clips, (0, 0.1, "")])
    found = evaluate(path, threshold=0.5, by="site")
    assert len(found.slices) == MOST_SLICES + 1
    assert found.slices[-1].value == ""
    assert f"of the {MOST_SLICES + 6} values of 'site' the {MOST_SLICES} with the" in caplog.text


@pytest.mark.slow
def test_names_and_metadata_from_the_table_to_the_report(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = [int(number % 4 == 0) for number in range(48)]
    clips = [random.integers(0, 120, (8, 16, 16), dtype=np.uint8) for _ in labels]
    for clip, label in zip(clips, labels, strict=True):
        clip[:, 5:11, 5:11] += np.uint8(100 * label)
    splits = ["val" if n < 8 else "test" if n < 16 else "train" for n in range(48)]
    sites = [("=1+1", "b <i>", "")[n % 3] for n in range(48)]
    store_of(tmp_path, clips, split=splits, label=[("flowing", "stalled")[n] for n in labels],
             site=sites, positive=["stalled"])  # fmt: skip
    store = Store(tmp_path / "store")
    assert store.info["classes"] == {"0": "flowing", "1": "stalled"}
    assert read_job(store.folder).classes == {"0": "flowing", "1": "stalled"}
    assert store.table["meta:site"].tolist() == sites
    said("verify", store.folder)
    printed = said("info", store.folder)
    assert "stalled" in printed
    assert "positive" not in printed
    assert re.search(r"site\W+2\W+16\W+=1\+1 \(16\), b <i> \(16\)", printed)

    run = tmp_path / "run"
    lines: list[str] = []
    train(tiny_config(store.folder, run), say=lines.append)
    assert "clips: train 8 stalled, 24 flowing; val 2 stalled, 6 flowing;" in "\n".join(lines)
    assert read_record(run)["store"]["classes"] == {"0": "flowing", "1": "stalled"}
    said("predict", run)
    table = pd.read_csv(run / "predictions.csv", keep_default_na=False)
    assert list(table) == [*COLUMNS, "class", "meta:site"]
    assert (table["class"] == table["label"].map({0: "flowing", 1: "stalled"})).all()
    assert sorted(set(table["meta:site"])) == ["", "'=1+1", "b <i>"]
    printed = said("evaluate", run, "--by", "site")
    assert "test: 8 clips, 2 stalled" in printed
    assert "(missing)" in printed
    assert json.loads((run / "evaluation.json").read_text())["by"] == "site"
    assert "no column 'place'" in ended("evaluate", run, "--by", "place")[2]
    said("evaluate", run, "--by", "site")
    said("report", run)
    page = (run / "report.html").read_text()
    assert "called stalled" in page
    assert "By site" in page
    assert "b &lt;i&gt;" in page
    # The same predictions of another store go to a folder that is known as one of predictions.
    for _ in range(2):
        said("predict", run, "--store", store.folder, "--out", tmp_path / "other")
