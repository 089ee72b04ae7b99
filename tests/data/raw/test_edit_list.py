"""An edit list of MP4 and MOV: what a player shows, in its order, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_media import with_edits, write_video

from dist_train.data.raw.video import Video
from dist_train.errors import DecodeError

# Frame k is of grey 10 k + 5, and shown at k / 20 seconds.
FRAMES = np.broadcast_to(
    np.uint8(10) * np.arange(20, dtype=np.uint8)[:, None, None, None] + np.uint8(5), (20, 32, 48, 3)
)


@pytest.fixture(scope="module", params=["0", "2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With and without frames that are coded in another order."""
    options = {"qp": "0", "g": "5", "bf": request.param}
    return write_video(tmp_path_factory.mktemp("edits") / "a.mp4", FRAMES, options=options)


def shown(path: Path) -> list[int]:
    video = Video(path)
    numbers = [round((int(frame.luma[5, 5]) - 5) / 10) for frame in video]
    assert not video.truncated
    assert video.frames_declared == len(numbers)
    assert video.interval == 0.05
    return numbers


PLAYED = {
    "all": ([(1.0, 0.0, 1)], [*range(20)]),
    "a part": ([(0.5, 0.25, 1)], [*range(5, 15)]),
    "longer than the video": ([(2.0, 0.5, 1)], [*range(10, 20)]),
    "late": ([(1.0, None, 1), (1.0, 0.0, 1)], [*range(20)]),
    "two parts, the later first": ([(0.25, 0.5, 1), (0.25, 0.0, 1)], [*range(10, 15), *range(5)]),
    "a part twice": ([(0.25, 0.0, 1)] * 2, [*range(5), *range(5)]),
    "overlapping": ([(0.5, 0.0, 1), (0.5, 0.25, 1)], [*range(10), *range(5, 15)]),
}


@pytest.mark.parametrize("kind", PLAYED)
def test_parts_come_as_they_are_played(source: Path, tmp_path: Path, kind: str) -> None:
    edits, expected = PLAYED[kind]
    assert shown(with_edits(source, tmp_path / "b.mp4", edits)) == expected


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([(0.25, 0.0, 1), (1, None, 1), (0.25, 0.25, 1)], "a pause after its first frames"),
        ([(0.5, 0.0, 2)], "at 2 times the speed"),
        ([(1.0, 0.25, 0)], "at 0 times the speed"),
        ([(0.25, 0.0, 1), (2.0, 0.5, 0.5)], "at 0.5 times the speed"),
        ([(1.0, 0.0, -1)], "at -1 times the speed"),
    ],
)
def test_what_ffmpeg_would_play_otherwise(
    source: Path, tmp_path: Path, edits: list[tuple[float, float | None, float]], message: str
) -> None:
    path = with_edits(source, tmp_path / "b.mp4", edits)
    with pytest.raises(DecodeError, match=rf"b\.mp4: its edit list .*{message}.*ffmpeg -i"):
        list(Video(path))


def test_damaged_boxes_are_left_to_the_decoder(source: Path, tmp_path: Path) -> None:
    """Wherever the file is cut or changed near the edit list, there are frames or a DecodeError."""
    content = source.read_bytes()
    at = content.index(b"edts")
    rng = np.random.default_rng(0)
    for place in (*range(at - 120, at + 60, 5), len(content) - 3):
        for damaged in (
            content[:place],
            content[:place] + bytes(rng.bytes(4)) + content[place + 4 :],
            content[:place] + b"\0\0\0\1" + content[place + 4 :],
        ):
            (path := tmp_path / "b.mp4").write_bytes(damaged)
            try:
                list(Video(path))
            except DecodeError:
                continue
