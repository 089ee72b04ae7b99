"""Videos that are cut, damaged, or trimmed by an edit list, and files in disguise."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import said
from make_media import write_manifest, write_video

from dist_train.data.raw.clip import PrepareSettings, read_clip
from dist_train.data.raw.video import Video
from dist_train.errors import DecodeError

WHOLE = PrepareSettings(roi="none")
# Coarse noise, of which each frame takes about as many bytes.
FRAMES = np.random.default_rng(0).integers(0, 255, (30, 6, 8, 3), dtype=np.uint8)
FRAMES = FRAMES.repeat(8, axis=1).repeat(8, axis=2)
# Fine noise, of which each frame takes many bytes: a decoder stumbles when these are wrong.
NOISE = np.random.default_rng(1).integers(0, 255, (12, 96, 128, 3), dtype=np.uint8)
TIMES = [0, 1, 2, 3, 40, 41, 341, *range(400, 423)]
KINDS = {
    "mkv": {},
    "mkv, frames out of order": {"options": {"bf": "3"}},
    "mkv, gaps": {"codec": "ffv1", "rate": 100, "times": TIMES},
    "webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "mpg": {"codec": "mpeg2video", "rate": 25},
    "mpg, frames out of order": {"codec": "mpeg2video", "rate": 25, "options": {"bf": "2"}},
    "mpeg": {"codec": "mpeg1video", "rate": 25},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "full_range": True},
    "mp4": {"container_options": {"movflags": "faststart"}},
    "mov, fragments": {
        "options": {"g": "5"},
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
    },
}


def read(path: Path, **settings: str) -> tuple[np.ndarray, dict[str, object]]:
    return read_clip(path, path.name, str(path), replace(WHOLE, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_cut_video_is_rejected(tmp_path: Path, kind: str) -> None:
    path = write_video(tmp_path / f"a.{kind.split(',')[0]}", FRAMES, **KINDS[kind])
    whole, record = read(path)
    assert len(whole) == 30
    assert "frames_damaged" not in record
    content = path.read_bytes()
    for part in (10, 25, 41, 50, 66, 83):
        path.write_bytes(content[: len(content) * part // 100])
        with pytest.raises(DecodeError) as raised:
            read(path)
        assert "\n" not in raised.value.reason
        if part in (50, 66):
            clip, _ = read(path, truncated="keep", damaged="keep")
            assert 0 < len(clip) < 30


@pytest.mark.parametrize("kind", ["mkv, frames out of order", "webm", "gif"])
def test_the_last_bytes_are_missed(tmp_path: Path, kind: str) -> None:
    """The frame coded last is not the one shown last, whose end is declared."""
    path = write_video(tmp_path / f"a.{kind.split(',')[0]}", FRAMES, **KINDS[kind])
    content = path.read_bytes()
    for fewer in (1, 100):
        path.write_bytes(content[:-fewer])
        with pytest.raises(DecodeError, match=r"the video stops after (29|30)"):
            read(path)


def packet_of(path: Path, number: int) -> tuple[int, int]:
    """The place and the size of a coded frame."""
    with av.open(str(path)) as container:
        packet = [one for one in container.demux(video=0) if one.size][number]
        return packet.pos, packet.size


def with_noise(path: Path) -> None:
    """Write random bytes into the middle of the ninth coded frame."""
    at, size = packet_of(path, 8)
    content = bytearray(path.read_bytes())
    first, last = at + size // 4, at + 3 * size // 4
    content[first:last] = np.random.default_rng(1).bytes(last - first)
    path.write_bytes(content)


DAMAGED = {
    "mp4": {"options": {"g": "30", "bf": "0"}},
    "mkv": {"options": {"g": "30", "bf": "0"}},
    "mov": {"options": {"g": "30", "bf": "0"}},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_frame_is_seen(tmp_path: Path, kind: str) -> None:
    """The decoder guesses the rest of it, and others may build on it."""
    path = write_video(tmp_path / f"a.{kind.split(',')[0]}", NOISE, **DAMAGED[kind])
    whole, _ = read(path)
    with_noise(path)
    with pytest.raises(DecodeError, match=r"[1-9] of 12 frames are damaged.*--damaged keep"):
        read(path)
    clip, record = read(path, damaged="keep")
    assert record["frames_damaged"] >= 1
    assert clip.shape == whole.shape
    assert (clip != whole).any(axis=(1, 2)).tolist()[:9] == [False] * 8 + [True]


@pytest.mark.parametrize(("suffix", "pix_fmt"), [("mkv", "gray"), ("avi", "yuv420p")])
def test_one_wrong_bit_of_ffv1_is_seen(tmp_path: Path, suffix: str, pix_fmt: str) -> None:
    """Its checksum is wrong; the decoder reports it, and marks no frame."""
    how = {"options": {"level": "3", "slicecrc": "1"}}
    path = write_video(tmp_path / f"a.{suffix}", NOISE, codec="ffv1", pix_fmt=pix_fmt, **how)
    at, size = packet_of(path, 8)
    content = bytearray(path.read_bytes())
    content[at + size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DecodeError, match="1 of 12 frames are damaged"):
        read(path)


def test_damaged_frames_are_counted_and_told(tmp_path: Path) -> None:
    for name in ("a.mkv", "b.mkv"):
        write_video(tmp_path / name, NOISE, options={"bf": "0"})
    with_noise(tmp_path / "b.mkv")
    write_manifest(tmp_path / "t.csv", ["a.mkv", "b.mkv"])
    common = ("prepare", "--manifest", tmp_path / "t.csv", "--source", tmp_path, "--roi", "none")
    assert "kept" not in said(*common, "--out", tmp_path / "s", "--max-rejected", "50%")
    assert "of 12 frames are damaged" in (tmp_path / "s" / "rejected.csv").read_text()
    printed = said(*common, "--out", tmp_path / "kept", "--damaged", "keep")
    assert "kept with damaged frames: 1 clips" in printed


def trimmed(source: Path, path: Path, first: int, last: int) -> Path:
    """Frames ``first`` to ``last`` of an mp4 of 20 frames a second, by an edit list alone."""
    with av.open(str(source)) as before, av.open(str(path), "w") as after:
        stream = before.streams.video[0]
        copy = after.add_stream_from_template(stream)
        for packet in before.demux(stream):
            if packet.size:
                packet.stream = copy
                shift = round(first / 20 / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                after.mux(packet)
    content = bytearray(path.read_bytes())
    # ISO/IEC 14496-12: version 0 of both; the duration of the first edit, in the movie's units.
    (units,) = struct.unpack_from(">I", content, content.index(b"mvhd") + 16)
    edit = content.index(b"elst") + 12
    struct.pack_into(">I", content, edit, units * (last - first) // 20)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("first", "last", "suffix"), [(5, 30, "mov"), (0, 11, "mp4"), (12, 29, "mp4")]
)
@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_what_an_edit_list_hides_is_not_missed(
    tmp_path: Path, suffix: str, first: int, last: int, b_frames: str
) -> None:
    options = {"g": "10", "qp": "0", "bf": b_frames}
    source = write_video(tmp_path / f"whole.{suffix}", FRAMES, options=options)
    whole, _ = read(source)
    path = trimmed(source, tmp_path / f"a.{suffix}", first, last)
    with av.open(str(path)) as container:
        shown = sum(1 for _ in container.decode(video=0))
    assert shown < 30
    clip, record = read(path)
    assert record["frames_declared"] == len(clip) == shown
    # Players differ by one frame at the rim.
    assert min(abs(shown - (last - first)), 2) < 2
    start = next(t for t in range(30) if (whole[t] == clip[0]).all())
    assert abs(start - first) < 2
    np.testing.assert_array_equal(clip, whole[start : start + shown])
    # What is cut from the file is missed as before.
    content = path.read_bytes()
    if suffix == "mp4":
        with av.open(str(path)) as container:
            packets = [one for one in container.demux(video=0) if one.size and not one.is_discard]
        at = packets[shown // 2].pos
        path.write_bytes(content[:at] + bytes(len(content[at:])))
        with pytest.raises(DecodeError):
            read(path)


IN_DISGUISE = {
    "a script of files": "ffconcat version 1.0\nfile b.mkv\n",
    "a playlist": "#EXTM3U\n#EXTINF:1,\nb.mkv\n#EXT-X-ENDLIST\n",
    "a manifest": '<?xml version="1.0"?><MPD><BaseURL>b.mkv</BaseURL></MPD>',
}


@pytest.mark.parametrize("kind", IN_DISGUISE)
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_no_other_file_is_opened(tmp_path: Path, kind: str, suffix: str) -> None:
    write_video(tmp_path / "b.mkv", FRAMES[:2])
    path = tmp_path / f"a{suffix}"
    path.write_text(IN_DISGUISE[kind])
    with pytest.raises(DecodeError, match="first bytes are those of no video file"):
        read(path)


def test_a_name_is_never_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(Path("y.gif"), FRAMES[:2], codec="gif", pix_fmt="rgb8")
    write_video(Path("z.gif"), FRAMES[:5], codec="gif", pix_fmt="rgb8").rename("file:y.gif")
    assert len(list(Video(Path("file:y.gif")))) == 5
    for name in ("file:z.gif", "concat:y.gif|y.gif", "subfile,,start,0,end,0,,:y.gif"):
        with pytest.raises(DecodeError, match="No such file"):
            list(Video(Path(name)))


def test_a_container_by_another_name(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", FRAMES[:3]).rename(tmp_path / "a.mp4")
    assert len(list(Video(path))) == 3


def of_two_streams(path: Path, *, cover: bool) -> None:
    with av.open(str(path), "w") as output:
        streams = [output.add_stream(codec, rate=20) for codec in ("mpeg4", "mjpeg")]
        for stream, pix_fmt in zip(streams, ("yuv420p", "yuvj420p"), strict=True):
            stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
        streams[1].codec_context.color_range = 2
        if cover:
            streams[1].disposition = av.stream.Disposition.attached_pic
        for number, picture in enumerate(FRAMES[:4]):
            for stream in streams[: 1 if cover and number else 2]:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                output.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        for stream in streams:
            output.mux(stream.encode())


def test_two_videos_in_one_file(tmp_path: Path) -> None:
    """A cover is no video."""
    of_two_streams(path := tmp_path / "a.mp4", cover=False)
    with pytest.raises(DecodeError, match="holds 2 video streams"):
        read(path)
    of_two_streams(path, cover=True)
    assert len(read(path)[0]) == 4
