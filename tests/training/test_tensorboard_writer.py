"""TensorBoard's files: what they show, and that their failure costs nothing else."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dist_train.training.tensorboard_writer import EVENTS, TensorBoardWriter
from dist_train.training.train import train


def shown(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def picture(board: EventAccumulator, name: str, mode: str = "L") -> np.ndarray:
    (image,) = board.Images(f"training clips/{name}")
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert(mode))


def test_positives_and_negatives_have_a_picture_each(tmp_path: Path) -> None:
    frames = np.stack([np.full((2, 3), value, np.uint8) for value in (10, 90, 20, 80, 70)])
    writer = TensorBoardWriter(tmp_path, 1, {})
    labels = np.array([1, 0, 1, 0, 0])
    writer.clips(1, frames, {"negatives": labels == 0, "positives": labels == 1})
    writer.close()
    board = shown(tmp_path)
    assert set(picture(board, "positives").ravel()) == {10, 20}
    assert set(picture(board, "negatives").ravel()) == {90, 80, 70}


def test_pictures_of_channels_are_in_colour(tmp_path: Path) -> None:
    frames = np.zeros((2, 4, 3, 3), np.uint8)
    frames[0] = 10, 20, 30
    writer = TensorBoardWriter(tmp_path, 1, {})
    labels = np.array([1, 0])
    parts = {"negatives": labels == 0, "positives": labels == 1}
    writer.clips(1, frames, parts, "dapi red, gfp green")
    writer.close()
    given = picture(shown(tmp_path), "positives (dapi red, gfp green)", "RGB")
    assert (given == (10, 20, 30)).all()


def test_a_run_shows_settings_clips_and_a_curve_each_epoch(store: Path, tmp_path: Path) -> None:
    config = tiny_config(store, tmp_path / "run", "snapshots.at=[2]", "train.epochs=2")
    train(config)
    (file,) = (config.out / "tensorboard").iterdir()
    board = shown(file.parent)
    (settings,) = board.Tensors("settings/text_summary")
    assert f"optim.lr: {config.optim.lr}" in settings.tensor_proto.string_val[0].decode()
    start = HParamsPluginData.FromString(
        board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    assert start.session_start_info.hparams["optim.lr"].number_value == config.optim.lr
    val_steps = [event.step for event in board.Scalars("val/loss")]
    assert [event.step for event in board.Tensors("val")] == val_steps
    assert len(val_steps) == 2
    assert picture(board, "positives").std() > 0


def test_a_failure_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook = threading.excepthook
    (tmp_path / "file").touch()
    writer = TensorBoardWriter(tmp_path / "file", 1, {"seed": 0})
    writer.scalars(1, 1.0, {"a": 1.0})
    writer.flush()
    writer.close()
    (warning,) = caplog.records
    assert "TensorBoard gets nothing more of this session" in warning.getMessage()
    assert threading.excepthook is hook


def test_no_file_of_another_writer_is_replaced(tmp_path: Path) -> None:
    """Files of earlier sessions are numbered anew, but not over a file that has the number."""
    names = ["0000000000", "0000000001", "1764000000.host.1.0"]
    for name in names:
        (tmp_path / f"{EVENTS}{name}").write_text(name)
    TensorBoardWriter(tmp_path, 1, {}).close()
    contents = sorted(path.read_bytes() for path in tmp_path.iterdir())
    assert [name.encode() for name in names] == [text for text in contents if len(text) < 30]
