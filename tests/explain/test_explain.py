"""Explanations of runs: what is written, what is refused, and that they point at the vessel."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import contents, fails, said
from PIL import Image
from targets import SETTINGS, target_config, target_store
from vessels import vessel_config, vessel_of, vessel_store

from dist_train import extensions
from dist_train.errors import RunError
from dist_train.evaluation.predict import find_snapshots
from dist_train.explain import explain as module
from dist_train.explain import maps
from dist_train.explain.choose import Chosen
from dist_train.explain.explain import explain
from dist_train.explain.maps import Method, find_maps
from dist_train.explain.pictures import as_mp4
from dist_train.run.data import open_run_data
from dist_train.run.record import open_run, read_record
from dist_train.training.train import train


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two classes with predictions."""
    out = tmp_path_factory.mktemp("explained") / "run"
    shutil.copytree(trained, out)
    said("predict", out)
    return out


def listed(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "explanations.json").read_text())
    return found


def test_the_pictures_of_the_chosen_clips(run: Path) -> None:
    folder = run / "explanations"
    assert "clips explained" in said("explain", run, "--count", 2)
    found = listed(folder)
    whys = [one["why"] for one in found]
    assert whys == sorted(whys, reverse=True)
    assert whys.count("most sure") == 2
    for one in found:
        assert {"key", "label", "probability", "method", "strip", "animation"} <= one.keys()
        assert 0.5 <= one["probability"] <= 1
        assert (one["label"] != one["explained"]) is (one["why"] == "most wrong")
        assert cv2.imread(str(folder / one["strip"])).shape[1] == 1000
        with Image.open(folder / one["animation"]) as picture:
            # 16 x 16 pixels eight times as large, twice side by side; some frames may be equal.
            assert picture.size == (256, 128)
            assert picture.n_frames == 8
        with av.open(folder / one["video"]) as video:
            assert len(list(video.decode(video=0))) == 8
        assert len(one["mass"]) == len(one["fall"]) == 8
        assert sum(one["mass"]) == pytest.approx(1)
    # Later explanations take the place of these.
    key = found[0]["key"]
    said("explain", run, key, key, "--method", "integrated-gradients")
    (one,) = listed(folder)
    assert (one["key"], one["why"], one["method"]) == (key, "asked", "integrated-gradients")
    assert one["gap"] < 0.05
    names = {"explanations.json", one["strip"], one["animation"], one["video"]}
    assert {path.name for path in folder.iterdir()} == names


def test_the_probability_is_that_of_the_predictions(run: Path, tmp_path: Path) -> None:
    table = pd.read_csv(run / "predictions.csv", dtype={"key": str}).set_index("key")
    name = open_run_data(run, open_run(run)).target.classes[1]
    found = explain(run, table.index[:3], class_name=name, method="occlusion", out=tmp_path)
    for one in found:
        assert one.probability == pytest.approx(table.loc[one.key, "probability"], rel=1e-4)
        assert one.split == table.loc[one.key, "split"]


def test_many_clips_are_done_part_by_part(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    data = open_run_data(run, open_run(run))
    keys = [data.store.table.text("key", int(clip)) for clip in data.numbers("val")[:5]]
    told: list[tuple[int, int]] = []
    found = explain(
        run, keys, out=tmp_path, progress=lambda done, total, _="", /: told.append((done, total))
    )
    assert told == [(done, 5) for done in range(1, 6)]
    assert [one.key for one in found] == [one["key"] for one in listed(tmp_path)] == keys
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_what_lies_there_is_listed_if_a_later_part_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1)
    data = open_run_data(run, open_run(run))
    keys = [data.store.table.text("key", int(clip)) for clip in data.numbers("val")[:2]]
    # All keys are looked up before the first part is done.
    assert "holds no clip 'nine'" in fails("explain", run, keys[0], "nine", "--out", tmp_path)
    assert not list(tmp_path.iterdir())

    def find(*arguments: Any) -> list[maps.ClipMap]:
        if arguments[4][0].key == keys[1]:
            raise RunError("no more")
        return find_maps(*arguments)

    monkeypatch.setattr(module, "find_maps", find)
    with pytest.raises(RunError, match="no more"):
        explain(run, keys, out=tmp_path)
    assert [one["key"] for one in listed(tmp_path)] == keys[:1]
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_what_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "holds no clip 'nine'" in fails("explain", run, "nine")
    assert fails("explain", run, "--class", "negativ").startswith("--class: there is no 'negativ'")
    assert "no run here" in fails("explain", tmp_path)
    (tmp_path / "explanations.json").write_text("[1]")
    assert "no list of explanations" in fails("explain", run, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["explanations.json"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match="one process"):
        explain(run)


def test_a_lack_of_memory_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explain(run, count=1, out=tmp_path)
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(maps, "grad_cam", fail)
    with pytest.raises(RunError, match=r"single clip \(CUDA out of memory.*--method occlusion"):
        explain(run, count=1, out=tmp_path)
    assert contents(tmp_path) == before
    monkeypatch.setattr(maps, "hidden_places", fail)
    with pytest.raises(RunError, match=r"2.00 GiB\)\. Take a device with more memory"):
        explain(run, count=1, method="occlusion", out=tmp_path)


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("grad-cam", torch.full((8, 16, 16), torch.nan)),
        ("integrated-gradients", (torch.zeros(8, 16, 16), torch.nan)),
    ],
)
def test_gradients_that_are_not_finite(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method, found: object
) -> None:
    monkeypatch.setattr(maps, method.replace("-", "_"), lambda *_: found)
    with pytest.raises(RunError, match=r"gradients of clip '.*' are not finite.*occlusion"):
        explain(run, count=1, method=method, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_predictions_clips_are_named(trained: Path, tmp_path: Path) -> None:
    assert "no predictions" in fails("explain", trained, "--out", tmp_path)
    data = open_run_data(trained, open_run(trained))
    key = data.store.table.text("key", int(data.numbers("train")[0]))
    (one,) = explain(trained, [key], out=tmp_path)
    assert one.split == "train"


def test_an_animation_shows_its_frames() -> None:
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[3, 8:24, 8:24] = 255
    content = as_mp4(frames)
    assert content is not None
    with av.open(io.BytesIO(content)) as video:
        shown = [frame.to_ndarray(format="gray") for frame in video.decode(video=0)]
    assert [frame[16, 16] > 128 for frame in shown] == [False, False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "npz"])
def test_each_kind_of_target(kind: str, tmp_path: Path) -> None:
    store = target_store(tmp_path / "store", kind)
    run = tmp_path / "run"
    train(target_config(store, run, kind, "train.epochs=1", "snapshots.at=[1]"))
    said("predict", run)
    said("explain", run, "--count", 3)
    data = open_run_data(run, open_run(run))
    found = listed(run / "explanations")
    assert len(found) >= 3
    for one in found:
        assert one["explained"] in data.target.classes
        assert one["label"] or kind == "multilabel"
    last = data.target.classes[-1]
    said("explain", run, "--count", 1, "--class", last, "--method", "integrated-gradients")
    assert {one["explained"] for one in listed(run / "explanations")} == {last}


@pytest.fixture(scope="module")
def vessels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vessels")
    extensions.allow(["vessels"])
    train(vessel_config(vessel_store(folder / "store"), folder / "run"))
    return folder / "run"


@pytest.mark.slow
def test_a_map_is_the_mean_over_snapshots(vessels: Path) -> None:
    config = open_run(vessels)
    data, record = open_run_data(vessels, config), read_record(vessels)
    chosen = [Chosen(data.store.table.text("key", int(data.numbers("val")[0])), "asked", 1)]
    snapshots = find_snapshots(vessels)
    both, first, last = (
        find_maps(
            config, record, data, some, chosen, "grad-cam", torch.device("cpu"), lambda *_: None
        )[0]
        for some in (snapshots, snapshots[:1], snapshots[1:])
    )
    assert len(snapshots) == 2
    assert np.abs(first.found - last.found).max() > 0
    for name in ("found", "fall", "scores"):
        mean = (getattr(first, name) + getattr(last, name)) / 2
        np.testing.assert_allclose(getattr(both, name), mean, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "label", "least"),
    [
        ("grad-cam", 1, 1.8),
        ("grad-cam", 0, 3.0),
        ("integrated-gradients", 1, 1.3),
        ("integrated-gradients", 0, 3.0),
        # A hidden vessel is still, so that hiding costs a stalled clip nothing.
        ("occlusion", 0, 4.0),
    ],
)
def test_maps_point_at_the_vessel(vessels: Path, method: Method, label: int, least: float) -> None:
    """In clips that are called rightly: the vessel has so many times the share of the map for the
    clip's class that it has of the area."""
    config = open_run(vessels)
    data = open_run_data(vessels, config)
    table, clips = data.store.table, data.numbers("test", label)[:8]
    chosen = [Chosen(table.text("key", int(clip)), "asked", label) for clip in clips]
    found = find_maps(
        config, read_record(vessels), data, find_snapshots(vessels), chosen, method,
        torch.device("cpu"), lambda done, total: None,
    )  # fmt: skip
    times = []
    for clip, one in zip(clips, found, strict=True):
        vessel, shown = vessel_of(table.text("filename", int(clip))), one.found.clip(min=0)
        if one.scores[label] > 0.5:
            times.append(shown[:, vessel].sum() / shown.sum() / vessel.mean())
    assert len(times) >= 5
    assert np.mean(times) > least, times
