"""Each file of a run, edited and replaced: the right result or one message, never a traceback."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import contents, metrics_of, tiny_config, tiny_store

from dist_train.errors import DistTrainError
from dist_train.evaluation.evaluate import evaluate
from dist_train.evaluation.export import export_run
from dist_train.evaluation.predict import predict
from dist_train.evaluation.prediction_origin import check_origin
from dist_train.evaluation.report_run import read_run
from dist_train.run.record import open_run
from dist_train.run.snapshots import load_snapshot
from dist_train.training.train import train

STEPS = 6
SHORT = ("train.epochs=1", "snapshots.at=[1]", "optim.lr=1e-3")
JUDGED = [
    "run.json",
    "config.yaml",
    "metrics.jsonl",
    "splits.csv",
    "predictions.csv",
    "predictions.json",
    "evaluation.json",
    f"snapshots/step-{STEPS}.safetensors",
]
RESUMED = [
    "run.json",
    "config.yaml",
    "metrics.jsonl",
    "splits.csv",
    "micro_batch.json",
    "checkpoints/step-4/checkpoint.json",
    "checkpoints/step-4/rank-00000.safetensors",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained, predicted and evaluated; not to be changed."""
    folder = tmp_path_factory.mktemp("fuzz")
    out = folder / "run"
    train(tiny_config(tiny_store(folder / "S"), out, *SHORT, "train.probe=always"))
    (out / "micro_batch.json").write_text('{"clips": 4, "of": {}}')
    predict(out)
    evaluate(out / "predictions.csv", out=out / "evaluation.json")
    return out


# Kinds of harm. Each makes of a file's content another, or puts something else in its place.


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_off(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def overwritten(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]


def lacking(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.randrange(1, 60) :]


def digit_changed(content: bytes, rng: random.Random) -> bytes:
    place = rng.choice([match.start() for match in re.finditer(rb"[0-9]", content[:100_000])])
    return content[:place] + str(rng.randrange(10)).encode() + content[place + 1 :]


def line_doubled(content: bytes, rng: random.Random) -> bytes:
    line = rng.choice(content.splitlines(keepends=True))
    return content.replace(line, line + line, 1)


def value_replaced(content: bytes, rng: random.Random) -> bytes:
    """What an attacker would put behind a colon."""
    values = [b"NaN", b"1e999", b"[[]]", b"null", b"true", b'"x"', b"-1", b"9" * 5000, b"{}"]
    after = rng.choice([match.end() for match in re.finditer(rb"[:,]", content[:100_000])] or [1])
    end = content.find(b",", after)
    return content[:after] + rng.choice(values) + content[end if end > 0 else after :]


def nested(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"[", b'{"a":']) * 100_000


def empty(content: bytes, rng: random.Random) -> bytes:
    return b""


HARMS = [flipped, cut_off, overwritten, lacking, digit_changed, line_doubled, value_replaced,
         nested, empty]  # fmt: skip
REPLACED = ["a pipe", "a folder", "a link to nowhere", "nothing"]


def replace(path: Path, by: str) -> None:
    path.unlink()
    if by == "a pipe":
        os.mkfifo(path)
    elif by == "a folder":
        path.mkdir()
    elif by == "a link to nowhere":
        path.symlink_to("/nowhere/at/all")


def right_or_refused(act: Callable[[], object]) -> bool:
    """Whether it was done; an error must be one line for the user. Warnings count as told."""
    try:
        act()
    except DistTrainError:
        return False
    except OSError as error:
        # The command line shows these as one line, too, if they name a file.
        if error.filename is None:
            raise
        return False
    return True


def judge(run: Path, whole: Path, name: str) -> None:
    """All commands that read the run: their results must be those of the unharmed run."""
    if name not in ("predictions.csv", "predictions.json", "evaluation.json", "metrics.jsonl"):
        before = (run / "predictions.csv").read_bytes()
        if right_or_refused(lambda: predict(run, out=run / "again")):
            assert (run / "again" / "predictions.csv").read_bytes() == before
        out = run / "model.safetensors"
        if right_or_refused(lambda: export_run(run, out)):
            expected = load_snapshot(whole / "snapshots" / f"step-{STEPS}.safetensors").weights
            found = load_snapshot(out).weights
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[weight], expected[weight]) for weight in found)

    expected = evaluate(whole / "predictions.csv")

    def evaluated() -> None:
        open_run(run)
        check_origin(run)
        assert evaluate(run / "predictions.csv") == expected

    def reported() -> None:
        open_run(run)
        found = read_run(run).evaluation
        if found is None:
            assert not os.path.lexists(run / "predictions.csv")
        else:
            # Only evaluation.json says whether the threshold was given.
            unsure = {"threshold_fitted_on", "threshold_fitted_on_same_clips"}
            assert found.model_dump(exclude=unsure) == expected.model_dump(exclude=unsure)

    right_or_refused(evaluated)
    right_or_refused(reported)


def fuzz(
    whole: Path, folder: Path, names: list[str], edits: int, act: Callable[[Path, str], None]
) -> None:
    """Harm one file in each of many copies of a run.

    There are 13 kinds of harm, which files meet in turn; 13 times as many edits as files are all.
    """
    rng = random.Random(0)
    kinds = [*HARMS, *REPLACED]
    for number in range(edits):
        name, kind = names[number % len(names)], kinds[number % len(kinds)]
        copy = Path(shutil.copytree(whole, folder / f"{number}"))
        path = copy / name
        if isinstance(kind, str):
            replace(path, kind)
        else:
            path.write_bytes(kind(path.read_bytes(), rng))
        try:
            act(copy, name)
        except Exception as error:
            error.add_note(f"edit {number} of {name}, in {copy}")
            raise
        shutil.rmtree(copy)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("edits", [26, pytest.param(104, marks=pytest.mark.soak)])
def test_a_harmed_file_is_told_or_does_no_harm_to_a_judgement(
    run: Path, tmp_path: Path, edits: int
) -> None:
    fuzz(run, tmp_path, JUDGED, edits, lambda copy, name: judge(copy, run, name))


def resume(copy: Path, whole: Path) -> None:
    """Resume the harmed run: it must become what the unharmed run is."""
    config = tiny_config(whole.with_name("S"), copy, *SHORT, "train.probe=always")

    def resumed() -> None:
        train(config, resume="auto")
        name = f"snapshots/step-{STEPS}.safetensors"
        assert (copy / name).read_bytes() == (whole / name).read_bytes()
        assert metrics_of(copy)[-1] == metrics_of(whole)[-1]
        assert open_run(copy)

    right_or_refused(resumed)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("edits", [13, pytest.param(91, marks=pytest.mark.soak)])
def test_a_harmed_file_is_told_or_does_no_harm_to_a_resumption(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, edits: int
) -> None:
    caplog.set_level(logging.CRITICAL)
    left = Path(shutil.copytree(run, tmp_path / "left"))
    shutil.rmtree(left / "checkpoints" / f"step-{STEPS}")
    fuzz(left, tmp_path, RESUMED, edits, lambda copy, name: resume(copy, run))


@pytest.mark.parametrize(
    ("kind", "told"),
    [("a pipe", r"\.lock: is a FIFO"), ("a link to nowhere", r"\.lock: is a symbolic link")],
)
def test_a_lock_that_is_no_file_is_told(run: Path, tmp_path: Path, kind: str, told: str) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    replace(copy / ".lock", kind)
    before = contents(copy)
    with pytest.raises(DistTrainError, match=told):
        train(tiny_config(run.with_name("S"), copy, *SHORT), resume="auto")
    assert contents(copy) == before
