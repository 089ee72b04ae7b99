"""The strip of wrong clips: which clips, their titles, and that they are in TensorBoard."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_config
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_train.data.pictures import film_strip, stacked
from dist_train.data.store.reader import Store
from dist_train.errors import StoreError
from dist_train.run.data import open_data
from dist_train.training import mistakes
from dist_train.training.mistakes import most_wrong, strips_of_mistakes
from dist_train.training.train import train

TAG = "wrong clips/val"


def test_the_most_confident_mistakes_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.array([1, 0, 1, 0, 0, 1], np.float32)
    scores = np.array([0.4, 0.9, 0.9, 0.2, 0.5, 0.05], np.float32)
    assert list(most_wrong(labels, scores)) == [5, 1, 0]
    assert list(most_wrong(labels, np.stack([1 - scores, scores], 1))) == [5, 1, 0]
    three = np.array([[0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4]])
    assert list(most_wrong(np.array([0, 2, 1]), three)) == [0, 2]
    monkeypatch.setattr(mistakes, "MOST", 2)
    assert list(most_wrong(labels, scores)) == [5, 1]


def test_tensorboard_shows_them_of_each_validation(store: Path, tmp_path: Path) -> None:
    config = tiny_config(
        store, tmp_path / "run", "snapshots.at=[1]", "train.epochs=2", "optim.lr=1e-6"
    )
    train(config)
    board = EventAccumulator(str(config.out / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [t for t in board.Tags()["images"] if t.startswith("wrong clips")] == [TAG]
    data, images = open_data(config), board.Images(TAG)
    texts = board.Tensors(f"{TAG}/text_summary")
    assert len({image.step for image in images}) == 2
    for image, text in zip(images, texts, strict=True):
        assert image.step == text.step
        shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("L"))
        titles = text.tensor_proto.string_val[0].decode().splitlines()
        assert 0 < len(titles) <= mistakes.MOST
        # A strip of 16 rows, and a gap of 2.
        assert len(shown) == 18 * len(titles) - 2
        for number, title in enumerate(titles):
            found = shown[18 * number : 18 * number + 16]
            (label,) = (code for code, n in data.store.classes.items() if f" {n} called" in title)
            assert re.search(r"called \w+ [01]\.\d\d$", title)
            clips = data.numbers("val", label)
            strips = [film_strip(data.store.read(clip), ("grey",))[0] for clip in clips]
            assert any(np.array_equal(found, strip) for strip in strips), title


def test_strips_of_unequal_width_are_stacked() -> None:
    wide, narrow = np.full((3, 5), 7, np.uint8), np.full((1, 2), 9, np.uint8)
    both = stacked([wide, narrow])
    assert both.tolist() == [[7] * 5] * 3 + [[255] * 5] * 2 + [[9, 9, 0, 0, 0]]
    colours = stacked([np.stack([each] * 3, 2) for each in (wide, narrow)])
    assert (colours == both[..., None]).all()


def test_a_clip_that_cannot_be_read_is_left_out(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_data(tiny_config(store, tmp_path / "run"))
    labels = data.store.table["label"][np.sort(data.numbers("val"))].astype(np.float32)
    read, first = Store.read, most_wrong(labels, 1 - labels)[0]
    damaged = np.sort(data.numbers("val"))[first]

    def failing(self: Store, clip: int) -> np.ndarray:
        if clip == damaged:
            raise StoreError("a clip is damaged")
        return read(self, clip)

    monkeypatch.setattr(Store, "read", failing)
    strips = strips_of_mistakes(data, labels, 1 - labels)
    assert len(strips) == mistakes.MOST - 1
    assert all("called" in title and title.endswith("1.00") for title in strips)
    assert "a clip is not shown in TensorBoard" in caplog.text
