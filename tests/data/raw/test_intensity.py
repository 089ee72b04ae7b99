"""Values of any type become black to white by a stated rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refused, said
from hypothesis import given
from hypothesis import strategies as st
from make_media import write_manifest

from dist_train.data.raw.axes import plain_stack
from dist_train.data.raw.clip import PrepareSettings, Values, decoding, to_clip, values_of
from dist_train.data.raw.intensity import Intensity, SetRange, range_of, to_stored
from dist_train.data.raw.stack import Choices
from dist_train.data.store.build import prepare
from dist_train.data.store.index import read_index
from dist_train.data.store.reader import INDEX, Store
from dist_train.errors import ConfigError, DecodeError
from dist_train.run.data import black_and_white, warn_of_other_values

RAMP = np.arange(16 * 16 * 16, dtype=np.uint16).reshape(16, 16, 16)


def stored(array: np.ndarray, **settings: Any) -> tuple[np.ndarray, dict[str, Any]]:
    given = PrepareSettings(roi="none", **settings)
    with decoding("x"):
        return to_clip(values_of(plain_stack(array, given.choices), given), given)


def of_set(folder: Path, arrays: list[np.ndarray], *options: object) -> list[np.ndarray]:
    """The clips of a store made by the command, whose output is in ``printed``."""
    (folder / "raw").mkdir()
    for number, array in enumerate(arrays):
        np.save(folder / f"raw/{number}.npy", array)
    table = folder / "t.csv"
    write_manifest(table, [f"{n}.npy" for n in range(len(arrays))])
    paths = ("--manifest", table, "--source", folder / "raw", "--out", folder / "store")
    printed = said("prepare", *paths, "--roi", "none", *options)
    (folder / "printed").write_text(printed)
    store = Store(folder / "store")
    by_file = dict(zip(store.table["filename"], range(len(arrays)), strict=True))
    return [store.read(by_file[f"{n}.npy"]) for n in range(len(arrays))]


def test_by_default_deep_signed_and_float_values_span_the_range(tmp_path: Path) -> None:
    """A 12-bit camera, a CT in Hounsfield units, and a float image with outliers."""
    rng = np.random.default_rng(0)
    ct = np.clip(rng.normal(40, 300, (8, 32, 32)), -1000, 3000).astype(np.int16)
    image = rng.gamma(2, 1e-3, (8, 32, 32)).astype(np.float32)
    image[0, 0, 0] = 1e6
    for number, array in enumerate((RAMP, ct, image)):
        (tmp_path / str(number)).mkdir()
        (clip,) = of_set(tmp_path / str(number), [array])
        assert (clip.min(), clip.max()) == (0, 255)
        assert 50 < clip.mean() < 200
        assert len(np.unique(clip)) > 200


def test_equal_values_of_two_files_give_equal_grey(tmp_path: Path) -> None:
    low = np.linspace(-1, 0, 4096, dtype=np.float32).reshape(16, 16, 16)
    one, two = of_set(tmp_path, [low, low + 0.5])
    same = np.isclose(low, 0 - 0.25, atol=1e-4), np.isclose(low + 0.5, 0 - 0.25, atol=1e-4)
    assert np.ptp(np.concatenate([one[same[0]], two[same[1]]]).astype(int)) <= 1
    assert one.mean() < two.mean() - 50
    job = json.loads((tmp_path / "store/job.json").read_text())["settings"]
    record = next(record for _, record in read_index(tmp_path / "store" / INDEX))
    assert record["intensity"] == [job["black"], job["white"]]
    assert -1 < job["black"][0] < -0.98
    assert 0.48 < job["white"][0] < 0.5


def test_over_each_clip(tmp_path: Path) -> None:
    dim = np.linspace(0, 1, 4096, dtype=np.float32).reshape(16, 16, 16)
    one, two = of_set(tmp_path, [dim, 100 * dim], "--intensity-over", "clip")
    np.testing.assert_allclose(one.astype(int), two, atol=1)


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("window -100 100", np.array([-200, -100, 0, 100, 200], np.int16), [0, 0, 128, 255, 255]),
        ("window 0 1000", np.array([0, 500, 1000, 65535], np.uint16), [0, 128, 255, 255]),
        ("dtype", np.array([-32768, 0, 32767], np.int16), [0, 128, 255]),
        ("dtype", np.array([0, 32768, 65535], np.uint16), [0, 128, 255]),
        ("dtype", np.array([0, 0.5, 1, 2], np.float32), [0, 128, 255, 255]),
        ("bits", np.array([0, 2048, 4095], np.uint16), [0, 128, 255]),
    ],
)
def test_given_rules(text: str, values: np.ndarray, expected: list[int]) -> None:
    clip, _ = stored(values.reshape(1, -1, 1), intensity=Intensity.parse(text), bits=12)
    assert clip.reshape(-1).tolist() == expected


@pytest.mark.parametrize(
    "text", ["", "bits 8", "window 5", "window 5 5", "percentile -1 50", "window a b", "auto auto"]
)
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no rule for black and white"):
        Intensity.parse(text)


def test_percentiles_of_a_set_of_8_bits(tmp_path: Path) -> None:
    dark = (RAMP % 50).astype(np.uint8)
    (clip,) = of_set(tmp_path, [dark], "--intensity", "percentile 0 100")
    assert (clip.min(), clip.max()) == (0, 255)


@given(st.integers(8, 16), st.sampled_from(["uint8", "uint16", "float16"]))
def test_each_stored_type_holds_the_same_grey(bits: int, dtype: Any) -> None:
    values = np.linspace(0, (1 << bits) - 1, 64).astype(np.uint16).reshape(4, 4, 4)
    clip, _ = to_stored(values, (0.0,), (float((1 << bits) - 1),), dtype)
    top = 1.0 if dtype == "float16" else np.iinfo(dtype).max
    assert clip.dtype == dtype
    np.testing.assert_allclose(clip / top, values / ((1 << bits) - 1), atol=1 / 255)


def test_values_that_are_no_numbers_are_black_and_told(tmp_path: Path) -> None:
    image = np.linspace(0, 1, 4096, dtype=np.float32).reshape(16, 16, 16)
    image[3, 3] = np.nan
    image[4, 4, :2] = np.inf, -np.inf
    (clip,) = of_set(tmp_path, [image])
    assert not clip[3, 3].any()
    assert clip[4, 4, :2].tolist() == [255, 0]
    assert "(NaN), stored as black: 1 clips" in (tmp_path / "printed").read_text()


def test_nothing_but_nan_is_rejected() -> None:
    rule = Intensity("percentile", 1, 99, "clip")
    with pytest.raises(DecodeError, match="x: holds no numbers"):
        stored(np.full((2, 3, 4), np.nan), intensity=rule)


def test_few_levels_and_saturation_are_told(tmp_path: Path) -> None:
    flat = np.full((4, 8, 8), 7, np.uint8)
    bright = (RAMP % 256).astype(np.uint8)
    bright[0] = 255
    of_set(tmp_path, [flat, bright, (RAMP % 255).astype(np.uint8)])
    printed = (tmp_path / "printed").read_text()
    assert "fewer than 16 grey levels: 1 clips (the least: 1)" in printed
    assert "more than 1% of the pixels are white: 1 clips" in printed


def test_clips_to_predict_are_mapped_as_those_of_the_store(tmp_path: Path) -> None:
    image = np.linspace(0, 1, 4096, dtype=np.float32).reshape(16, 16, 16)
    for name in ("train", "new"):
        (tmp_path / name).mkdir()
    (clip,) = of_set(tmp_path / "train", [image])
    (new,) = of_set(tmp_path / "new", [image / 2], "--like", tmp_path / "train/store")
    np.testing.assert_allclose(new.astype(int), clip.astype(int) / 2, atol=2)


def test_channels_of_a_store(tmp_path: Path) -> None:
    colour = np.zeros((4, 8, 8, 3), np.uint8)
    colour[..., 0], colour[..., 2] = 200, 100
    assert stored(colour)[0].shape == (4, 8, 8)
    names = ("red", "green", "blue")
    rgb = {"choices": Choices(channels="rgb"), "channel_names": names}
    np.testing.assert_array_equal(stored(colour, **rgb)[0], colour)
    two = {"choices": Choices(channels="0,2"), "channel_names": ("red", "blue")}
    np.testing.assert_array_equal(stored(colour, **two)[0], colour[..., [0, 2]])
    with pytest.raises(DecodeError, match=r"has 1 channels \(grey\), and the store 3"):
        stored(colour[..., 0], **rgb | {"choices": Choices(channels="all")})


def test_grey_of_16_bit_colour_is_that_of_its_8_bits() -> None:
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 65536, (2, 5, 6, 3), dtype=np.uint16)
    deep, _ = stored(colour, bits=16)
    flat, _ = stored((colour >> 8).astype(np.uint8))
    np.testing.assert_array_equal(deep, flat)


def test_files_that_black_and_white_depend_on_must_be_here(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((2, 3, 4), np.float32))
    table = write_manifest(tmp_path / "t.csv", [f"{n}.npy" for n in range(2)])
    options = {"max_rejected": 0.5}
    with pytest.raises(Exception, match="black and white depend on all files, and 1 of them"):
        prepare(table, tmp_path, tmp_path / "s", PrepareSettings(roi="none"), **options)  # type: ignore[arg-type]


def test_a_rule_that_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="have no number of bits in use"):
        stored(-RAMP.astype(np.int32), intensity=Intensity("bits"))
    write_manifest(tmp_path / "t.csv", ["a.npy"])
    paths = ("--manifest", tmp_path / "t.csv", "--source", tmp_path, "--out", tmp_path / "s")
    message = refused("prepare", *paths, "--intensity", "window 5 1")
    assert "--intensity: 'window 5 1' is no rule" in message


def test_a_store_to_predict_with_other_black_and_white_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores = {}
    for bits in (12, 14):
        (tmp_path / str(bits)).mkdir()
        of_set(tmp_path / str(bits), [RAMP], "--bits", bits)
        stores[bits] = Store(tmp_path / str(bits) / "store")
    record = {"store": {"black_and_white": black_and_white(stores[12])}}
    warn_of_other_values(record, stores[12])
    warn_of_other_values({"store": {}}, stores[14])
    assert not caplog.text
    warn_of_other_values(record, stores[14])
    assert (
        "black and white are {'bits': 14}, and the model was trained with {'bits':" in caplog.text
    )


def test_fewer_bits_than_the_values_have_do_not_wrap() -> None:
    rule = Intensity("bits", over="clip")
    for bits, white in ((10, 4095.0), (12, 4095.0), (14, 16383.0)):
        found = range_of(RAMP, rule, SetRange(), channels=1, bits=bits)
        assert found == ((0.0,), (white,))


def test_values_beyond_16_bits_need_a_window() -> None:
    with pytest.raises(DecodeError, match=r"needs more than 16 bits\. .*window LOW HIGH"):
        stored(RAMP.astype(np.uint32) << 8, intensity=Intensity("bits"))


def test_a_window_for_video_is_in_its_8_bits() -> None:
    pixels = np.array([0, 50, 100, 200], np.uint8).reshape(1, 2, 2)
    deep = pixels.astype(np.uint16) * 257
    for dtype, values in (("uint8", pixels), ("uint16", deep)):
        given = PrepareSettings(roi="none", intensity=Intensity.parse("window 50 150"))
        video = Values(values, ("grey",), None, None, {}, is_full=True)
        clip, _ = to_clip(video, replace(given, store_dtype=dtype))  # type: ignore[arg-type]
        top = np.iinfo(clip.dtype).max
        assert (clip / top).round(1).reshape(-1).tolist() == [0, 0, 0.5, 1]
    with pytest.raises(DecodeError, match="a video of more than 8 bits"):
        to_clip(replace(video, is_deep=True), given)


def test_channels_are_told_by_their_names() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    given = PrepareSettings(roi="none", channel_names=("a", "b", "c"))
    clip, record = to_clip(Values(pixels, ("c", "a", "b"), None, None, {}), given)
    np.testing.assert_array_equal(clip, pixels[..., [1, 2, 0]])
    assert "channels" not in record
    clip, record = to_clip(Values(pixels, ("c", "a", "x"), None, None, {}), given)
    np.testing.assert_array_equal(clip, pixels)
    assert record["channels"] == ["c", "a", "x"]
