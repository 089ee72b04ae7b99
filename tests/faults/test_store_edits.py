"""Every file of a store edited at random: one message, or the right result, and always curable."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from helpers import contents
from stores import small_medmnist

from dist_train import cli
from dist_train.data.store.build import prepare_npz
from dist_train.data.store.build_spec import JOB, Job, read_job
from dist_train.data.store.clip_table import TABLE
from dist_train.data.store.reader import INDEX, MANIFEST, MARKER, REJECTED, SHARDS, Store
from dist_train.data.store.shards import shard_name
from dist_train.errors import DistTrainError

SHARD = f"{SHARDS}/{shard_name(1)}"
FILES = (
    MARKER,
    JOB,
    MANIFEST,
    REJECTED,
    INDEX,
    TABLE,
    SHARD,
    SHARD.replace(".tar", ".rejected.csv"),
)
# What the store cannot be judged or mended without: `prepare` writes these again.
NEEDED = (JOB, MANIFEST)
VALUES = (
    *(b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"1.5", b'""', b"[]", b"{}"),
    *(b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b'"\\ud800"', b'"\x00"', b"\xff\xfe", b"\0" * 600),
)


def flip(rng: random.Random, content: bytes) -> bytes:
    edited = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 40))):
        edited[rng.randrange(len(edited))] ^= 1 << rng.randrange(8)
    return bytes(edited)


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def replace_piece(rng: random.Random, content: bytes) -> bytes:
    begin = rng.randrange(len(content))
    return content[:begin] + rng.choice(VALUES) + content[begin + rng.randrange(200) :]


def replace_value(rng: random.Random, content: bytes) -> bytes:
    """In JSON and CSV: a whole value."""
    begin = rng.randrange(len(content))
    ends = [end for mark in (b",", b"\n", b"}") if (end := content.find(mark, begin)) >= 0]
    start = max(content.rfind(mark, 0, begin) for mark in (b":", b",", b"\n")) + 1
    return content[:start] + rng.choice(VALUES) + content[min(ends, default=begin) :]


def repeat_piece(rng: random.Random, content: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:end] + content[begin:]


def zero_page(rng: random.Random, content: bytes) -> bytes:
    begin = 512 * rng.randrange(len(content) // 512 + 1)
    size = rng.choice((512, 4096))
    return content[:begin] + bytes(len(content[begin : begin + size])) + content[begin + size :]


EDITS = (flip, cut, replace_piece, replace_value, repeat_piece, zero_page)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of ten clips in three shards, and the file that it was made from."""
    folder = tmp_path_factory.mktemp("edits")
    small_medmnist(folder / "small.npz")
    prepare_npz(folder / "small.npz", folder / "store", shard_clips=4)
    return folder


def outcome(command: Callable[..., None], *arguments: object, **options: object) -> str | None:
    """The message that a command ends with; None where it succeeds.

    Called as a function, since the command line itself takes longer than all that it calls here. An
    exception that it would not turn into one message comes through.
    """
    if command is cli.verify:
        options["workers"] = 1
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            command(*arguments, **options)
        except DistTrainError as error:
            return str(error)
        except OSError as error:
            if error.filename is None:
                raise
            return str(error)
    return None


def read_all(store: Path) -> dict[str, tuple[object, ...]]:
    """As training opens and reads it: facts and pixels of each clip that can be read."""
    opened = Store(store)
    found = {}
    for clip, row in enumerate(opened.table.frame().itertuples()):
        try:
            found[str(row.key)] = row.label, row.split, opened.read(clip).tobytes()
        except DistTrainError:
            continue
    return found


def check(made: Path, store: Path, right: dict[str, bytes], what: str) -> None:
    """No command calls a store whole that is not, and what it reads of it is right."""
    whole = contents(store) == right
    try:
        found = read_all(store)
    except DistTrainError:
        found = {}
    assert found.items() <= read_all(made / "store").items(), what
    assert found or not whole, what
    for command in (cli.info, cli.verify):
        message = outcome(command, store)
        if command is cli.verify:
            assert (message is None) == whole, (what, message)
    message = outcome(cli.verify, store, repair=str(made / "small.npz"))
    needed = any(contents(store).get(name) != right[name] for name in NEEDED)
    assert (message is not None) == needed, (what, message)
    if needed:
        for name in NEEDED:
            (store / name).unlink(missing_ok=True)
        assert outcome(cli.prepare_npz, made / "small.npz", out=store, shard_clips=4) is None, what
    assert contents(store) == right, what


def edited(made: Path, folder: Path, name: str, count: int, seed: int) -> None:
    right = contents(made / "store")
    rng = random.Random(f"{name} {seed}")
    store = folder / "store"
    shutil.copytree(made / "store", store)
    for number in range(count):
        edit: Callable[[random.Random, bytes], bytes] = EDITS[number % len(EDITS)]
        content = edit(rng, right[name])
        (store / name).write_bytes(content)
        check(made, store, right, f"{name}: {edit.__name__} number {number} of seed {seed}")


@pytest.mark.parametrize("name", FILES)
def test_edits(made: Path, tmp_path: Path, name: str) -> None:
    edited(made, tmp_path, name, 20 if name in (INDEX, TABLE) else 7, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FILES)
def test_many_edits(made: Path, tmp_path: Path, name: str) -> None:
    edited(made, tmp_path, name, 1000, seed=1)


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_plain_file(made: Path, tmp_path: Path, name: str) -> None:
    """Above all a FIFO, which nobody writes to."""
    store = tmp_path / "store"
    shutil.copytree(made / "store", store)
    (store / name).unlink()
    for kind in ("FIFO", "folder", "device"):
        if kind == "FIFO":
            os.mkfifo(store / name)
        elif kind == "folder":
            (store / name).mkdir()
        else:
            (store / name).symlink_to("/dev/zero")
        mode = (store / name).lstat().st_mode
        npz = made / "small.npz"
        if outcome(cli.info, store) is None:
            assert read_all(store).items() <= read_all(made / "store").items()
        assert outcome(cli.verify, store) is not None, kind
        message = outcome(cli.verify, store, repair=str(npz)) or ""
        assert name in message, (kind, message)
        outcome(cli.prepare_npz, npz, out=store, shard_clips=4)
        assert (store / name).lstat().st_mode == mode, kind
        (store / name).rmdir() if kind == "folder" else (store / name).unlink(missing_ok=True)


def test_a_store_that_was_made_to_deceive(made: Path, tmp_path: Path) -> None:
    """Rows with the checksum that they should have, and settings with a fingerprint."""
    store = tmp_path / "store"
    shutil.copytree(made / "store", store)
    job = read_job(store)
    bad: list[dict[str, object]] = [
        {"settings": job.made_from["settings"] | {"shard_clips": value}}
        for value in (0, -1, 1.5, True, "4", None, 1 << 40)
    ]
    bad += [{"settings": job.made_from["settings"] | {"roi": "both"}}, {"settings": []}]
    bad += [{"pixels_version": "2"}, {"pixels_version": None}, {"npz": 3}, {"manifest": "x"}]
    for change in bad:
        content = Job(job.table, job.made_from | change)
        text = json.dumps(content.made_from | {"fingerprint": content.fingerprint})
        (store / JOB).write_text(text)
        assert "job.json: its '" in str(outcome(cli.verify, store)), change
