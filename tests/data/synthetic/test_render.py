"""Synthetic clips: in the challenge's form, the same every time, told apart by motion alone."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import av
import cv2
import numpy as np
import pytest
from helpers import contents

from dist_train.data.raw.outline import Box, OutlineColour, crop_to_outline
from dist_train.data.raw.video import Video
from dist_train.data.synthetic import challenge_stats
from dist_train.data.synthetic.drawing import ClipSpec, draw_clip, render_clip, vessel_mask
from dist_train.data.synthetic.render import (
    HELD_OUT,
    filename,
    stalled_indices,
    synthesize,
    write_video,
)
from dist_train.data.table.manifest import read_manifest
from dist_train.errors import ConfigError, StoreError

SEED = 1


@pytest.fixture(scope="module")
def five_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "five"
    synthesize(out, clips=5, seed=SEED, stall_rate=0.4, workers=1)
    return out


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def decode(path: Path) -> np.ndarray:
    """RGB uint8 [D, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def union(boxes: list[Box]) -> Box:
    whole = boxes[0]
    for box in boxes:
        whole = whole.union(box)
    return whole


# --- the form of the challenge ----------------------------------------------------------------


def test_statistics_equal_the_published_histogram(real_data: Path) -> None:
    rows = read_csv(real_data / "clog_loss_depths.csv")
    assert {
        int(row["num_frames"]): int(row["all"]) for row in rows
    } == challenge_stats.CLIPS_BY_DEPTH
    tier1, clips = (sum(int(row[name]) for row in rows) for name in ("tier1", "all"))
    assert tier1 / clips == challenge_stats.TIER1_SHARE


def test_depths_and_boxes_are_distributed_as_in_the_challenge() -> None:
    specs = [draw_clip(SEED, index) for index in range(6000)]
    depths = np.array([spec.depth for spec in specs])
    shares = np.array(list(challenge_stats.CLIPS_BY_DEPTH.values())) / sum(
        challenge_stats.CLIPS_BY_DEPTH.values()
    )
    expected = np.cumsum(shares)
    found = (depths[:, None] <= np.array(list(challenge_stats.CLIPS_BY_DEPTH))).mean(axis=0)
    # Kolmogorov-Smirnov bound at a significance of 0.001.
    assert np.abs(found - expected).max() < 1.95 / len(depths) ** 0.5
    assert depths.mean() == pytest.approx(59.5, abs=1)

    heights = np.array([spec.box.bottom - spec.box.top for spec in specs])
    widths = np.array([spec.box.right - spec.box.left for spec in specs])
    for sides, (smallest, mean, largest) in (
        (heights, challenge_stats.BOX_HEIGHT),
        (widths, challenge_stats.BOX_WIDTH),
    ):
        assert sides.mean() == pytest.approx(mean, abs=2)
        assert sides.min() >= smallest
        assert 200 < sides.max() <= largest
    sizes = {(spec.frame_height, spec.frame_width) for spec in specs}
    assert sizes == set(challenge_stats.FRAME_SIZES)
    for spec in specs:
        frame = Box(0, 0, spec.frame_height, spec.frame_width)
        assert frame.contains(spec.box)


def test_tables_have_the_challenges_columns_and_name_every_video(five_clips: Path) -> None:
    metadata = read_csv(five_clips / "train_metadata.csv")
    labels = read_csv(five_clips / "train_labels.csv")
    submission = read_csv(five_clips / "submission_format.csv")
    columns = "filename,url,project_id,num_frames,crowd_score,tier1,micro,nano"
    assert ",".join(metadata[0]) == columns
    assert list(labels[0]) == list(submission[0]) == ["filename", "stalled"]
    names = [filename(index) for index in range(5)]
    assert [row["filename"] for row in metadata] == [row["filename"] for row in labels] == names
    assert sorted(row["stalled"] for row in labels) == ["0", "0", "0", "1", "1"]
    assert [dict(row) for row in submission] == [{"filename": filename(HELD_OUT), "stalled": "0"}]
    videos = sorted(path.name for path in (five_clips / "videos").iterdir())
    assert videos == sorted([*names, filename(HELD_OUT)])
    assert read_manifest(five_clips / "train_metadata.csv").table["label"].sum() == 2
    for row in metadata:
        with av.open(str(five_clips / "videos" / row["filename"])) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert (stream.height, stream.width) in challenge_stats.FRAME_SIZES
            assert sum(1 for _ in container.decode(stream)) == int(row["num_frames"])


@pytest.mark.parametrize(("clips", "rate"), [(400, 0.25), (7, 0.5), (10, 0.0)])
def test_exactly_the_asked_share_is_stalled(clips: int, rate: float) -> None:
    chosen = stalled_indices(range(clips), SEED, rate)
    assert len(chosen) == round(clips * rate)
    if 1 < len(chosen) < clips:
        assert chosen != stalled_indices(range(clips), SEED + 1, rate)


def test_the_outline_keeps_its_colour_and_place_through_compression(tmp_path: Path) -> None:
    line = []
    for index in range(6):
        clip = render_clip(boxed(draw_clip(SEED, index)), stalled=False)
        path = tmp_path / filename(index)
        write_video(path, clip.frames)
        drawn = clip.frames[..., 0].astype(int) - clip.frames[..., 2] > 95
        line.append(decode(path)[drawn])
        _, found = crop_to_outline(Video(path), OutlineColour())
        true = union(clip.boxes)
        assert np.abs(np.subtract(dataclasses.astuple(found), dataclasses.astuple(true))).max() <= 3
    low, middle, high = np.percentile(np.concatenate(line), [5, 50, 95], axis=0)
    assert np.abs(middle - challenge_stats.OUTLINE_COLOUR).max() < 20
    # The challenge's own 5th and 95th percentiles, give or take 10.
    assert (low > np.array([124, 81, 13]) - 10).all()
    assert (high < np.array([244, 118, 75]) + 10).all()


def test_the_true_box_is_the_drawn_one_and_drifts() -> None:
    spec = draw_clip(SEED, 0)
    boxes = render_clip(spec, stalled=True).boxes
    corners = np.array([dataclasses.astuple(box) for box in boxes])
    assert np.abs(corners - dataclasses.astuple(spec.box)).max() <= 4
    assert len(set(boxes)) > 1


# --- the same every time ----------------------------------------------------------------------


def test_cells_move_in_the_vessel_and_nowhere_else() -> None:
    for index in range(3):
        spec = draw_clip(4, index)
        changes = render_clip(spec, stalled=False).frames[..., 1].std(axis=0)
        vessel = vessel_mask(spec)
        rows, columns = np.nonzero(vessel)
        assert spec.box.top < rows.min() <= rows.max() < spec.box.bottom - 1
        assert spec.box.left < columns.min() <= columns.max() < spec.box.right - 1
        assert np.median(changes[vessel]) > 1.5 * np.median(changes[~vessel])


def test_a_clip_is_rendered_the_same_twice_and_each_is_different() -> None:
    spec = boxed(draw_clip(SEED, 0))
    first = render_clip(spec, stalled=True)
    assert np.array_equal(first.frames, render_clip(spec, stalled=True).frames)
    other_seed = dataclasses.replace(spec, seed=SEED + 1)
    assert not np.array_equal(first.frames, render_clip(other_seed, stalled=True).frames)
    flowing = render_clip(spec, stalled=False)
    assert not np.array_equal(first.frames, flowing.frames)
    assert first.boxes == flowing.boxes


def test_files_depend_neither_on_workers_nor_on_the_number_of_clips(
    five_clips: Path, tmp_path: Path
) -> None:
    progress = Mock()
    out = tmp_path / "three"
    synthesize(out, clips=3, seed=SEED, stall_rate=0.4, workers=2, progress=progress)
    assert progress.call_args_list == [call(done, 4) for done in (1, 2, 3, 4)]
    labels = {row["filename"]: row["stalled"] for row in read_csv(five_clips / "train_labels.csv")}
    rows = read_csv(out / "train_labels.csv")
    same = [row["filename"] for row in rows if labels[row["filename"]] == row["stalled"]]
    assert len(same) >= 2
    for name in same:
        ours, theirs = ((folder / "videos" / name).read_bytes() for folder in (out, five_clips))
        assert ours == theirs


# --- the folder -------------------------------------------------------------------------------


def test_a_killed_run_leaves_only_whole_clips_and_is_finished_by_the_next(
    five_clips: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    script = (
        "from pathlib import Path; from dist_train.data.synthetic.render import synthesize\n"
        f"synthesize(Path({str(out)!r}), clips=5, seed={SEED}, stall_rate=0.4, workers=1,"
        " progress=lambda done, total: print(done, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.stdout.readline()
        run.kill()
    whole = {path.name: path.read_bytes() for path in (out / "videos").glob("*.mp4")}
    assert 2 <= len(whole) < 6
    for name, video in whole.items():
        assert video == (five_clips / "videos" / name).read_bytes()
    assert not (out / "train_labels.csv").exists()
    progress = Mock()
    synthesize(out, clips=5, seed=SEED, stall_rate=0.4, workers=1, progress=progress)
    assert progress.call_args_list == [call(done, 6) for done in range(len(whole) + 1, 7)]
    assert contents(out) == contents(five_clips)


@pytest.mark.parametrize("change", [{"clips": 6}, {"seed": SEED + 1}, {"stall_rate": 0.5}])
def test_a_folder_of_other_settings_is_refused(five_clips: Path, change: dict[str, float]) -> None:
    before = contents(five_clips)
    settings = {"clips": 5, "seed": SEED, "stall_rate": 0.4, **change}
    with pytest.raises(StoreError, match="made with other settings"):
        synthesize(five_clips, **settings)
    assert contents(five_clips) == before


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(StoreError, match="not made by synth"):
        synthesize(tmp_path, clips=1, seed=0)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="cannot be written"):
        synthesize(file, clips=1, seed=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("clips", 0), ("clips", HELD_OUT + 1), ("seed", -1), ("stall_rate", 1.5), ("workers", 0)],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        synthesize(tmp_path, **{"clips": 1, "seed": 0, name: value})
    assert not list(tmp_path.iterdir())


# --- motion alone tells the classes apart -----------------------------------------------------

SIDE = 64
CLIPS = 400


def boxed(spec: ClipSpec) -> ClipSpec:
    """The same clip in a frame little larger than the box: less to draw and encode."""
    margin = 8
    height, width = spec.box.bottom - spec.box.top, spec.box.right - spec.box.left
    return dataclasses.replace(
        spec,
        frame_height=(height + 2 * margin + 1) // 2 * 2,
        frame_width=(width + 2 * margin + 1) // 2 * 2,
        box=Box(margin, margin, margin + height, margin + width),
    )


@dataclasses.dataclass(frozen=True)
class Views:
    """What different observers see of N clips, decoded from the compressed video.

    ``single``, ``mean`` float32 [N, SIDE, SIDE]: the middle frame and the mean frame of the crop.
    ``inside`` bool [N, SIDE, SIDE]: inside the outline. ``motion`` [N, 2]. ``form`` [N, 3]: depth,
    height, width. ``label`` bool [N].
    """

    single: np.ndarray
    mean: np.ndarray
    inside: np.ndarray
    motion: np.ndarray
    form: np.ndarray
    label: np.ndarray


def view(folder: Path, deepest: int, index: int, stalled: bool) -> tuple[np.ndarray, ...]:
    cv2.setNumThreads(1)
    spec = boxed(draw_clip(SEED, index))
    depth, spec = spec.depth, dataclasses.replace(spec, depth=min(spec.depth, deepest))
    clip = render_clip(spec, stalled=stalled)
    path = folder / filename(index)
    write_video(path, clip.frames)
    box = union(clip.boxes)
    crop = decode(path)[:, box.top : box.bottom, box.left : box.right]
    path.unlink()
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in crop]).astype(np.float32)
    inside = inside_outline(clip.frames[:, box.top : box.bottom, box.left : box.right])
    views = (grey[len(grey) // 2], grey.mean(axis=0), inside.astype(np.float32))
    small = (cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in views)
    return (*small, persistence(grey, inside), np.array([depth, *crop.shape[1:3]]))


def inside_outline(crop: np.ndarray) -> np.ndarray:
    """Pixels enclosed by the outline that it comes near in no frame, bool [H, W].

    Taken from the clip before compression: the compressed colour of the outline depends on the
    motion near it.
    """
    orange = (crop[..., 0].astype(np.int16) - crop[..., 2]).max(axis=0) > 30
    line = np.pad(orange, 1).astype(np.uint8)
    outside = line.copy()
    cv2.floodFill(outside, None, (0, 0), 2)
    near = cv2.dilate((outside != 0).astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.asarray(near[1:-1, 1:-1] == 0)


def persistence(grey: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Correlation of the changing part of the picture with itself one and two frames later."""
    light = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.6) for frame in grey])[:, inside]
    light = light / light.mean(axis=1, keepdims=True)
    light -= light.mean(axis=0)
    return np.array([(light[:-lag] * light[lag:]).mean() for lag in (1, 2)]) / light.var()


@pytest.fixture(
    scope="module", params=[20, pytest.param(1000, marks=pytest.mark.soak)], ids="{} frames".format
)
def views(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Views:
    """Of clips of so many frames at the most."""
    folder = tmp_path_factory.mktemp("views")
    stalled = stalled_indices(range(CLIPS), SEED, 0.5)
    label = np.array([index in stalled for index in range(CLIPS)])
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        one = partial(view, folder, request.param)
        seen = pool.map(one, range(CLIPS), label.tolist(), chunksize=10)
        single, mean, inside, motion, form = (
            np.stack(column) for column in zip(*seen, strict=True)
        )
    return Views(single, mean, inside > 0.5, motion, form, label)


def folds(label: np.ndarray) -> np.ndarray:
    """Five folds with equal shares of each class."""
    fold = np.empty(len(label), int)
    for value in (False, True):
        chosen = np.flatnonzero(label == value)
        fold[np.random.default_rng(0).permutation(chosen)] = np.arange(len(chosen)) % 5
    return fold


def mcc(decision: np.ndarray, label: np.ndarray) -> float:
    """Matthews correlation coefficient; 0 where one class is always chosen."""
    if decision.all() or not decision.any():
        return 0.0
    return float(np.corrcoef(decision, label)[0, 1])


def ridge_mcc(features: np.ndarray, label: np.ndarray) -> float:
    """Out-of-fold MCC of ridge regression on standardised features."""
    fold, score = folds(label), np.empty(len(label))
    for held_out in range(5):
        train = fold != held_out
        x = (features - features[train].mean(axis=0)) / (features[train].std(axis=0) + 1e-9)
        x = np.column_stack([x.clip(-3, 3), np.ones(len(x))])
        gram = x[train].T @ x[train] + 0.1 * train.sum() * np.eye(x.shape[1])
        score[~train] = x[~train] @ np.linalg.solve(gram, x[train].T @ (2.0 * label[train] - 1))
    return mcc(score > 0, label)


def texture(images: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Quantiles, contrast at four scales, edges, spectrum, autocorrelation; inside the outline."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    band = np.digitize(frequency, [0.03, 0.06, 0.1, 0.15, 0.25])
    rows = []
    for image, mask in zip(images, inside, strict=True):
        blurred = [image, *(cv2.GaussianBlur(image, (0, 0), sigma) for sigma in (1, 2, 4, 8))]
        contrast = [(a - b)[mask].std() for a, b in itertools.pairwise(blurred)]
        edges = np.hypot(*np.gradient(image))[mask].mean()
        power = np.abs(np.fft.fft2((image - image[mask].mean()) * mask)) ** 2
        spectrum = np.bincount(band.ravel(), power.ravel())
        correlation = np.fft.ifft2(power).real
        lags = [
            correlation[y, x] / correlation[0, 0] for y, x in ((2, 2), (2, -2), (5, 5), (5, -5))
        ]
        quantiles = np.quantile(image[mask], np.linspace(0.02, 0.98, 9))
        rows.append([*quantiles, *np.log([*contrast, edges, *spectrum]), *lags])
    return np.array(rows)


@pytest.mark.slow
def test_motion_tells_the_classes_apart(views: Views) -> None:
    assert ridge_mcc(views.motion, views.label) >= 0.9


@pytest.mark.slow
def test_depth_and_box_do_not(views: Views) -> None:
    assert abs(ridge_mcc(np.log(views.form), views.label)) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "mean"])
def test_neither_a_single_nor_the_mean_frame_does(views: Views, name: str) -> None:
    assert abs(ridge_mcc(texture(getattr(views, name), views.inside), views.label)) < 0.15


@pytest.mark.slow
def test_the_classifier_sees_what_is_there(views: Views) -> None:
    """The same classifier, given the label as a faint change of the mean frame, finds it."""
    marked = np.where(views.label[:, None, None] & views.inside, 1.15, 1) * views.mean
    assert ridge_mcc(texture(marked, views.inside), views.label) > 0.3
