"""The time between frames: fixed, variable or unknown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import said
from hypothesis import given
from hypothesis import strategies as st
from make_media import grey_frames, write_manifest, write_video

from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.frame_times import interval_of


@given(
    st.fractions(min_value=1, max_value=240),
    st.sampled_from([1000, 90_000, 12_800]),
    st.integers(2, 200),
    st.integers(-5000, 5000),
)
def test_rounded_stamps_of_a_fixed_rate(rate: float, unit: int, count: int, start: int) -> None:
    stamps = [start + round(k * unit / rate) for k in range(count)]
    interval, varies = interval_of(stamps, 1 / unit)
    assert interval is not None
    assert not varies
    # Both ends are rounded.
    assert interval == pytest.approx(float(1 / rate), rel=1e-6, abs=1 / unit / (count - 1))


@given(st.integers(3, 50), st.data())
def test_one_stamp_off_by_more_than_a_hundredth(count: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(1, count - 2))
    off = data.draw(st.integers(11, 400))
    stamps = [1000 * k for k in range(count)]
    stamps[place] += off
    assert interval_of(stamps, 1e-3) == (None, True)


def test_unknown() -> None:
    assert interval_of([], 1.0) == interval_of([3], 1.0) == interval_of([0, None], 1.0)
    assert interval_of([0, None], 1.0) == (None, False)
    assert interval_of([5, 5], 1.0) == interval_of([5, 3], 1.0) == (None, True)
    # It slows down.
    assert interval_of([0, 3, 6, 9, 13, 17, 21], 0.01) == (None, True)


KINDS = {"mp4": {}, "mkv": {"codec": "ffv1"}, "avi": {"codec": "mpeg4"}} | {
    "webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "gif": {"codec": "gif", "pix_fmt": "gray"},
    "mov": {"options": {"bf": "2"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_records_tell_the_interval(tmp_path: Path, kind: str) -> None:
    settings = PrepareSettings(roi="none")
    path = write_video(tmp_path / f"a.{kind}", grey_frames(), rate=25, **KINDS[kind])
    _, record = read_clip(path, path.name, "here", settings)
    assert record["interval"] == 0.04
    assert "frame_rate" not in record
    times = [0, 1, 2, 3, 40, 41, 341, 342]
    write_video(path, grey_frames(), rate=100, times=times, **KINDS[kind])
    _, record = read_clip(path, path.name, "here", settings)
    assert "interval" not in record
    assert record["frame_rate"] == "variable"
    # A store of an earlier release is continued with its own records.
    _, record = read_clip(path, path.name, "here", PrepareSettings(roi="none", record_version=1))
    assert set(record) == {"frames_declared", "box"}


def test_a_cut_video_keeps_its_interval(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", noise, codec="ffv1")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    settings = PrepareSettings(roi="none", truncated="keep")
    clip, record = read_clip(path, path.name, "here", settings)
    assert 2 < len(clip) < 12
    assert record["interval"] == 0.05


def test_variable_rates_are_told(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", grey_frames())
    write_video(tmp_path / "b.mp4", grey_frames(4), times=[0, 1, 2, 9])
    for names in (["a.mp4"], ["a.mp4", "b.mp4"]):
        write_manifest(tmp_path / "t.csv", names, labels=[1] * len(names))
        common = ("prepare", "--manifest", tmp_path / "t.csv", "--source", tmp_path)
        told = said(*common, "--roi", "none", "--out", tmp_path / f"s{len(names)}")
        assert ("variable frame rate: 1 clips" in told) == (len(names) == 2)


def test_one_frame_has_no_interval(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", grey_frames(1))
    _, record = read_clip(path, path.name, "here", PrepareSettings(roi="none"))
    assert np.all([name not in record for name in ("interval", "frame_rate")])
