"""Near copies are found, whatever was done to them; other clips are not taken for copies."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from capillaries import capillaries
from make_media import store_of, write_video

from dist_train.data.check import near_copies as module
from dist_train.data.check.measure import measure, near_copies
from dist_train.data.check.near_copies import MOST_BITS, similar_hashes
from dist_train.data.raw.clip import PrepareSettings, read_clip


def resized(clip: np.ndarray, factor: float) -> np.ndarray:
    return np.stack([cv2.resize(frame, None, fx=factor, fy=factor) for frame in clip])


def encoded(clip: np.ndarray, path: Path) -> np.ndarray:
    even = clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]
    write_video(path, np.repeat(even[..., None], 3, axis=3), options={"qp": "30"})
    again, _ = read_clip(path, path.name, str(path), PrepareSettings(roi="none"))
    return again


def test_copies_are_found_and_no_others(tmp_path: Path) -> None:
    clips = capillaries(15)
    random = np.random.default_rng(0)
    noisy = np.clip(clips[4] + random.normal(0, 4, clips[4].shape), 0, 255).astype(np.uint8)
    copies = [
        encoded(clips[0], tmp_path / "a.mp4"),
        (clips[1] * 0.8).astype(np.uint8),
        clips[2][1:],
        resized(clips[3], 0.5),
        noisy,
        (255 - clips[5]),
    ]
    store = store_of(tmp_path, clips + copies)
    statistics, _ = measure(store, range(len(clips) + len(copies)), workers=2)
    found, is_cut = near_copies(store, statistics["hash"], workers=2)
    # An inverted clip is no copy.
    assert found == [(n, n + 15) for n in range(5)]
    assert not is_cut


@pytest.mark.parametrize("crowd", [5, 200])
def test_like_hashes_are_found_without_comparing_all(
    crowd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CROWD", crowd)
    random = np.random.default_rng(0)
    hashes = random.integers(0, 256, (400, 24), dtype=np.uint8)
    # Bytes that most clips share make crowds.
    hashes[:, :4] = hashes[0, :4]
    pairs = {}
    for number, bits in enumerate([0, 1, 5, 11, 40] * 20):
        flipped = np.unpackbits(hashes[number])
        flipped[random.choice(np.arange(32, 192), bits, replace=False)] ^= 1
        hashes[300 + number] = np.packbits(flipped)
        pairs[number, 300 + number] = bits
    found, is_cut = similar_hashes(hashes)
    close = sum(bits <= MOST_BITS for bits in pairs.values())
    assert not is_cut
    assert {tuple(pair) for pair in found.tolist()} <= pairs.keys()
    # All of them; where crowds are cut, nearly all.
    assert len(found) == close if crowd == 200 else len(found) >= 0.9 * close
    distances = [pairs[a, b] for a, b in found.tolist()]
    assert distances == sorted(distances)
    monkeypatch.setattr(module, "MOST_PAIRS", 10)
    fewest, is_cut = similar_hashes(hashes)
    assert fewest.tolist() == found[:10].tolist()
    assert is_cut
