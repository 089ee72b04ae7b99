"""``dist-train check`` names every planted fault of a store, and nothing in a sound one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_store import array_store
from capillaries import capillaries
from helpers import ended, fails, said, tiny_config
from make_media import store_of, write_manifest, write_video

from dist_train.config import CacheSettings
from dist_train.data.check import check as module
from dist_train.data.check.check import check_records, check_store
from dist_train.data.check.clips import recorded
from dist_train.data.check.measure import _confirmed, _opened, _place_of, _statistics
from dist_train.data.check.result import CheckResult, read_result
from dist_train.data.check.text import leak_cells, leak_head
from dist_train.data.store.index import read_index
from dist_train.data.store.reader import SHARDS, Store
from dist_train.data.store.shard_task import _size_of
from dist_train.data.target_labels import TargetLabels
from dist_train.errors import FileError
from dist_train.targets import Kind, Target

CLIPS = 60
GROUPS = [f"g{n % 5}" for n in range(CLIPS)]
LABELS = [int(n % 3 == 0) for n in range(CLIPS)]


def noise() -> list[np.ndarray]:
    """Clips of noise around blobs that differ from clip to clip."""
    random = np.random.default_rng(1)
    blobs = random.uniform(60, 140, (CLIPS, 1, 6, 6)).repeat(4, axis=2).repeat(4, axis=3)
    clips = np.clip(blobs + random.normal(0, 9, (CLIPS, 8, 24, 24)), 0, 254).astype(np.uint8)
    return list(clips)


def found(result: CheckResult) -> dict[str, int]:
    """Number of clips by kind, without kinds that none has, and without thresholds."""
    return {one.kind.split(":")[0]: one.clips for one in result.findings if one.clips}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of(tmp_path_factory.mktemp("sound"), noise(), label=LABELS, group=GROUPS).folder


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips: list[Any] = noise()
    clips[0] = np.zeros_like(clips[0])
    clips[1] = np.full_like(clips[1], 80)
    clips[2] = clips[2] // 32 * 32
    clips[3][:, :4] = 255
    clips[4] = np.repeat(clips[4][:2], 4, axis=0)
    clips[5][3, 14:] = 200
    # Copies: of equal and unequal labels.
    clips[9], clips[10] = clips[6], clips[6]
    clips[12] = (clips[7] * 0.9).astype(np.uint8)
    for n in range(CLIPS):
        if GROUPS[n] == "g4" and n > 12:
            clips[n] = np.clip(clips[n].astype(int) + 70, 0, 250).astype(np.uint8)
    folder = tmp_path_factory.mktemp("faulty")
    return store_of(folder, clips, label=LABELS, group=GROUPS).folder


@pytest.mark.slow
def test_every_fault_is_named(faulty: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "check.json"
    printed = said("check", faulty, "--json", out, "--workers", 2, "seed=1")
    result = read_result(out)
    counts = found(result)
    splits = {kind: counts.pop(kind, 0) for kind in list(counts) if "split" in kind}
    assert counts == {
        "black": 1,
        "constant": 1,
        "fewer than 16 grey levels": 1,
        "saturated": 1,
        "frozen": 1,
        "torn": 1,
        "identical clips": 3,
        "identical clips with unequal labels": 2,
        "near-identical clips": 2,
        "near-identical clips with unequal labels": 2,
    }
    names = {one.kind.split(":")[0]: one.names for one in result.findings}
    assert names["torn"] == ["clip005.npy"]
    (pair,) = names["near-identical clips with unequal labels"]
    assert pair.startswith("'clip007.npy' (")
    assert "'clip012.npy' (" in pair
    assert pair.endswith("positive)")
    assert "clip000.npy" in printed
    # By another seed, copies are in other splits.
    seeds = [check_store(Store(faulty), tiny_config(faulty, tmp_path, f"seed={n}")) for n in (2, 3)]
    assert len({json.dumps(splits)} | {json.dumps(found(one)) for one in seeds}) > 1
    shifted = {(shift.of, shift.name) for shift in result.shifts if shift.statistic == "mean grey"}
    assert shifted == {("group", "g4")}
    assert not result.is_clean
    assert ended("check", faulty, "--strict", "--quick")[0] == 1


def test_a_sound_store_is_clean(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, printed, err = ended("check", sound, "--strict", "--workers", 1)
    assert (code, err) == (0, "")
    assert "fold 0 of 5" in printed
    config = tiny_config(sound, Path("out"))
    result = check_store(Store(sound), config, workers=1)
    assert result.is_clean
    assert found(result) == {}
    assert {leak.columns[0] for leak in result.leaks} == {"group", "mean grey", "spread of grey"}
    # A quick check reads a part of the pixels, and says so.
    monkeypatch.setattr(module, "QUICK", 50)
    quick = check_store(Store(sound), config, quick=True)
    assert (quick.sampled, quick.clips) == (50, CLIPS)
    assert any("50 random clips" in note for note in quick.notes)
    assert not any("near" in one.kind for one in quick.findings)
    # Without the optional library the rest is there.
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    without = check_store(Store(sound), config)
    assert without.leaks == []
    assert any("pip install 'dist_train[check]'" in note for note in without.notes)
    assert without.findings == result.findings


def test_info_tells_what_the_records_say(tmp_path: Path, sound: Path) -> None:
    assert "can be told" not in (printed := said("info", sound))
    assert "'dist-train check' looks for" in printed
    # Positives are wider than negatives.
    clips = [clip[:, :, : 16 + 8 * label] for clip, label in zip(noise(), LABELS, strict=True)]
    store = store_of(tmp_path, clips, label=LABELS)
    (line,) = check_records(store)
    assert line == "the label can be told from width, bytes (file): MCC 1.00 (1.00 to 1.00)"
    assert line in said("info", store.folder).replace("\n", " ")


def test_frames_that_are_not_there_are_told(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, clip, container_options={"movflags": "faststart"})
    content = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(content[: len(content) // 2])
    write_manifest(tmp_path / "t.csv", ["a.mp4", "b.mp4"])
    common = ("prepare", "--manifest", tmp_path / "t.csv", "--source", tmp_path, "--roi", "none")
    said(*common, "--out", tmp_path / "store", "--truncated", "keep", "--damaged", "keep")
    lines = check_records(Store(tmp_path / "store"))
    assert lines[0] == "1 clips: other number of frames than declared"


def test_brightness_that_gives_the_label_away_is_named(tmp_path: Path) -> None:
    clips = [np.clip(c + 30.0 * label, 0, 250) for c, label in zip(noise(), LABELS, strict=True)]
    store = store_of(tmp_path, [clip.astype(np.uint8) for clip in clips], label=LABELS)
    result = check_store(store, tiny_config(store.folder, tmp_path), workers=1)
    assert next(leak.columns for leak in result.leaks if leak.is_leak) == ["mean grey"]
    assert not result.leaks[0].apart


def test_leaks_of_classes_and_values_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips of the third class are wider, and bright ones are fast."""
    clips = []
    for n, clip in enumerate(noise()):
        bright, width = (n * 7) % CLIPS, 24 if n % 3 == 2 else 16
        columns = {"label": "abc"[n % 3], "speed": 1.5**bright, "slow": int(bright < CLIPS // 2)}
        clips.append(((clip // 2 + bright)[:, :, :width], columns | {"odd": n // 3 % 2}))
    store = Store(array_store(tmp_path / "store", clips))

    def leaks(*settings: str) -> tuple[CheckResult, set[tuple[str, str]]]:
        result = check_store(store, tiny_config(store.folder, tmp_path, *settings), workers=1)
        named = {(leak.columns[0], leak.of) for leak in result.leaks if leak.is_leak}
        assert read_result(_written(result, tmp_path)) == result
        return result, named

    result, named = leaks()
    assert {("width", "c"), ("bytes (stored)", "c")} <= named
    assert {of for _, of in named} == {"c"}
    assert any("width (c)" in cell for leak in result.leaks for cell in leak_cells(leak))
    assert "c can be told from width, bytes (stored), odd, slow, speed: MCC 1.00" in " ".join(
        check_records(store)
    )
    values, named = leaks("target.kind=regression", "target.columns=[speed]")
    assert {("mean grey", ""), ("slow", "")} <= named
    assert leak_head(values.leaks)[1] == "rank correlation"
    assert "speed" not in {name for leak in values.leaks for name in leak.columns}
    _, named = leaks("target.kind=multilabel", "target.columns=[odd, slow]")
    assert ("mean grey", "slow") in named
    assert {of for _, of in named} == {"slow"}
    # Of many classes the most frequent are told.
    monkeypatch.setattr(module, "MOST_LABELS_BRIEFLY", 2)
    assert not any(line.startswith("c can") for line in check_records(store))


def _written(result: CheckResult, folder: Path) -> Path:
    (folder / "check.json").write_text(result.model_dump_json())
    return folder / "check.json"


def test_labels_that_the_store_has_not_are_told(tmp_path: Path, sound: Path) -> None:
    config = tiny_config(sound, tmp_path, "target.kind=regression", "target.columns=[speed]")
    result = check_store(Store(sound), config, workers=1)
    assert result.leaks == []
    assert "leaks: not looked for (the store has no column 'speed')" in result.notes


def test_what_is_not_tried_is_told(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, half = recorded(Store(sound)), np.arange(CLIPS) % 2
    monkeypatch.setattr("dist_train.data.check.leaks.find_leaks", lambda *_, **__: [])

    def notes(kind: Kind, *values: Any, most: int = CLIPS) -> list[str]:
        names, found = tuple("abcd"[: len(values)]), []
        labels = TargetLabels(Target(kind, names), np.stack(values, axis=1).astype(np.float32))
        module._leaks(clips, labels, None, found, most=most, most_labels=3)
        return [note.removeprefix("leaks: ") for note in found if "groups" not in note]

    # Of a sample, the other notes are of its clips.
    assert notes("multilabel", half, half, most=30) == [
        "looked for among 30 random clips of 60",
        "not looked for, as a class or label has fewer than 20 of these clips",
    ]
    assert notes("multilabel", 0 * half) == [
        "not looked for, as a class or label has fewer than 20 clips"
    ]
    assert notes("regression", 0 * half) == [
        "not looked for, as values do not differ, or there are fewer than 20 clips"
    ]
    assert notes("regression", half, 0 * half, half, half) == [
        "not tried for b: fewer than 20 clips, or no differences",
        "tried for 3 of 4 classes, labels or values",
    ]


def test_a_damaged_clip_is_a_finding_and_the_rest_goes_on(tmp_path: Path) -> None:
    store = store_of(tmp_path, capillaries(4), label=[0, 1, 0, 1])
    shard = next((store.folder / SHARDS).glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[int(store.table["offset"][2]) + 5] ^= 1
    shard.write_bytes(content)
    result = check_store(Store(store.folder), tiny_config(store.folder, tmp_path), workers=1)
    assert found(result) == {"cannot be read": 1}
    assert "clip 'clip002'" in result.findings[0].names[0]
    # Too few clips for splits and for leaks: both are told.
    assert sorted(note.split(":")[0] for note in result.notes) == ["leaks", "splits"]


def test_what_cannot_be_done_is_refused_in_one_line(tmp_path: Path, sound: Path) -> None:
    assert "there is no store here" in fails("check", tmp_path / "none")
    (tmp_path / "folder").mkdir()
    assert "is a folder" in fails("check", sound, "--json", tmp_path / "folder")
    assert "unknown setting 'split.fld'" in fails("check", sound, "split.fld=2")
    (tmp_path / "other.json").write_text('{"format": "dist_train check 1"}')
    with pytest.raises(FileError, match="not the result of a check"):
        read_result(tmp_path / "other.json")


def test_the_class_of_several_is_no_leak_and_classes_have_their_names(tmp_path: Path) -> None:
    clips, kinds = noise(), ["stall" if n % 3 == 0 else f"flow {n % 2}" for n in range(CLIPS)]
    clips[1] = clips[0]
    store = store_of(tmp_path, clips, positive=["stall"], label=kinds)
    result = check_store(store, tiny_config(store.folder, tmp_path), workers=1)
    tried = {name for leak in result.leaks for name in leak.columns}
    assert "meta:class" in recorded(store)
    assert "class" not in tried
    pair = next(one.names for one in result.findings if one.kind.startswith("identical"))
    assert "stall)" in pair[0]
    assert "positive)" not in pair[0]


def test_the_size_of_a_file_is_tried(tmp_path: Path) -> None:
    store = store_of(tmp_path, noise()[:3], label=[0, 1, 0])
    sizes = recorded(store)["file_bytes"].tolist()
    assert sizes == [path.stat().st_size for path in sorted((tmp_path / "raw").iterdir())]
    folder = tmp_path / "pictures"
    (folder / "part").mkdir(parents=True)
    (folder / "a").write_bytes(b"12")
    (folder / "part" / "b").write_bytes(b"345")
    assert _size_of(folder) == 5


def test_a_store_may_have_a_number_for_a_name(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "2024").symlink_to(sound)
    monkeypatch.chdir(tmp_path)
    assert "60 clips" in said("check", "2024", "--quick", "--workers", 1)


def test_workers_open_the_store_with_its_cache(sound: Path, tmp_path: Path) -> None:
    cache = CacheSettings(dir=tmp_path / "cache")
    opened = _opened(_place_of(Store(sound, cache)))
    assert opened.cache == cache


def test_columns_are_those_of_the_records(sound: Path) -> None:
    store = Store(sound)
    clips = recorded(store)
    for clip, (_, record) in enumerate(read_index(store.index())):
        row = clips.loc[clip]
        assert [row["depth"], row["height"], row["width"]] == record["shape"]
        assert (row["bytes"], row["declared"]) == (record["length"], record["frames_declared"])
        for name in ("filename", "label", "group", "shard", "offset"):
            assert row[name] == record[name]


def test_a_batch_is_asked_for_before_it_is_read(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(Store, "prefetch", lambda _, clips: asked.append(list(clips)))
    place = _place_of(Store(sound))
    _statistics((place, [2, 5]))
    _confirmed((place, [(1, 3), (1, 4)]))
    assert asked == [[2, 5], [1, 3, 4]]
