"""A run's copy behind a URL, from which it goes on on another machine."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsspec import AbstractFileSystem
from helpers import (
    InterruptedSessionError,
    contents,
    environment,
    interrupt_at,
    losses_of,
    metrics_of,
    tiny_config,
)

from dist_train import objects
from dist_train.checkpoint.format import by_step, check_checkpoint, read_marker
from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.errors import RemoteError, RunError
from dist_train.run.folder import MICRO_BATCH
from dist_train.run.mirror import Mirror
from dist_train.training.micro_batch_note import conditions, write_note
from dist_train.training.train import train
from dist_train.training.trainer import Trainer

SETTINGS = ("checkpoint.every_steps=3", "snapshots.at=[3]")
KEEP = RetentionPolicy(2)
URL = "s3://lab/runs/first"


def there(bucket: AbstractFileSystem) -> set[str]:
    return {name.removeprefix("lab/runs/first/") for name in bucket.find("lab/runs/first")}


def steps_there(bucket: AbstractFileSystem) -> list[int]:
    marked = [name for name in there(bucket) if name.endswith("checkpoint.json")]
    return sorted(int(name.split("/")[1].removeprefix("step-")) for name in marked)


@pytest.mark.slow
def test_goes_on_on_another_machine_bit_for_bit(
    store: Path, tmp_path: Path, bucket: AbstractFileSystem
) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    train(tiny_config(store, whole, *SETTINGS))
    mirrored = (*SETTINGS, f"checkpoint.mirror={URL}")
    with pytest.raises(InterruptedSessionError):
        train(tiny_config(store, first, *mirrored), progress=interrupt_at(8))
    train(tiny_config(store, second, *mirrored), resume="auto")
    assert losses_of(second) == losses_of(whole)
    assert [row["step"] for row in metrics_of(second)] == [row["step"] for row in metrics_of(whole)]
    newest = [step for step, _ in by_step(second / "checkpoints")]
    assert steps_there(bucket) == newest
    left_out = (".lock", "checkpoints/", "superseded/", "tensorboard/")
    assert {n for n in contents(second) if not n.startswith(left_out)} <= there(bucket)
    # A third machine has it all, and nothing to do.
    train(tiny_config(store, tmp_path / "third", *mirrored), resume="auto")
    assert losses_of(tmp_path / "third") == losses_of(whole)
    with pytest.raises(RunError, match="holds a run already"):
        train(tiny_config(store, tmp_path / "fourth", *mirrored))


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of all its steps."""
    out = tmp_path_factory.mktemp("mirrored") / "run"
    train(tiny_config(store, out, *SETTINGS, "checkpoint.keep_last=9"))
    return out


def copied(run: Path, step: int, mirror: Mirror) -> None:
    mirror._copy(run / f"checkpoints/step-{step}")


def test_what_is_cut_off_leaves_the_checkpoint_before(
    run: Path, tmp_path: Path, bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection ends for good before each of the objects in turn."""
    put, left = objects.Objects.put, [0]

    def ending(self: objects.Objects, name: str, content: object) -> None:
        if not left[0]:
            raise RemoteError("is gone")
        left[0] -= 1
        put(self, name, content)  # type: ignore[arg-type]

    steps = [step for step, _ in by_step(run / "checkpoints")][:2]
    copied(run, steps[0], Mirror(run, URL, KEEP))
    monkeypatch.setattr(objects.Objects, "put", ending)
    ends = 0
    for number in range(99):
        left[0] = number
        try:
            copied(run, steps[1], Mirror(run, URL, KEEP))
            break
        except RemoteError:
            ends += 1
        assert steps_there(bucket) == steps[:1]
    assert ends > 3
    assert steps_there(bucket) == steps
    Mirror(here := tmp_path / "here", URL, KEEP).fetch()
    check_checkpoint(here / f"checkpoints/step-{steps[1]}")


KILLED = """
import os, signal, sys
from pathlib import Path
from dist_train import objects
from dist_train.checkpoint.retention import RetentionPolicy
from dist_train.run.mirror import Mirror

put, run, step, last = objects.Objects.put, Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def killed(self, name, content):
    if name.endswith(last):
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, content)

objects.Objects.put = killed
Mirror(run, sys.argv[4], RetentionPolicy(2))._copy(run / f"checkpoints/step-{step}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", ["rank-00000.safetensors", "run.json", "checkpoint.json"])
def test_a_kill_leaves_the_checkpoint_before(
    run: Path, tmp_path: Path, bucket: AbstractFileSystem, last: str
) -> None:
    first, second = [step for step, _ in by_step(run / "checkpoints")][:2]
    copied(run, first, Mirror(run, URL, KEEP))
    command = [sys.executable, "-c", KILLED, str(run), str(second), last, URL]
    ended = subprocess.run(command, env=environment(), check=False)
    assert ended.returncode == -signal.SIGKILL
    Mirror(here := tmp_path / "here", URL, KEEP).fetch()
    assert [step for step, _ in by_step(here / "checkpoints")] == [first]
    check_checkpoint(here / f"checkpoints/step-{first}")


def test_a_damaged_object_is_not_gone_on_from(
    run: Path, tmp_path: Path, bucket: AbstractFileSystem
) -> None:
    first, second = [step for step, _ in by_step(run / "checkpoints")][:2]
    for step in (first, second):
        copied(run, step, Mirror(run, URL, KEEP))
    name = f"lab/runs/first/checkpoints/step-{second}/rank-00000.safetensors"
    content = bytearray(bucket.cat(name))
    content[-1] ^= 1
    bucket.pipe(name, bytes(content))
    Mirror(here := tmp_path / "here", URL, KEEP).fetch()
    assert [step for step, _ in by_step(here / "checkpoints")] == [first]


def test_a_run_that_is_older_here_is_set_aside(
    run: Path, tmp_path: Path, bucket: AbstractFileSystem
) -> None:
    step = by_step(run / "checkpoints")[1][0]
    copied(run, step, Mirror(run, URL, KEEP))
    here = tmp_path / "here"
    (here / "checkpoints/step-1").mkdir(parents=True)
    (here / "run.json").write_text("older")
    Mirror(here, URL, KEEP).fetch()
    assert (here / "run.json").read_bytes() == (run / "run.json").read_bytes()
    assert (here / "superseded/run.json").read_text() == "older"


def test_without_a_server_training_goes_on_and_says_so_at_its_end(
    store: Path, tmp_path: Path, bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def gone(self: objects.Objects, name: str, content: object) -> None:
        raise RemoteError("the server cannot be reached", where=name)

    monkeypatch.setattr(objects.Objects, "put", gone)
    out = tmp_path / "out"
    with pytest.raises(RemoteError, match="the server cannot be reached"):
        train(tiny_config(store, out, *SETTINGS, f"checkpoint.mirror={URL}"))
    assert "is not in checkpoint.mirror" in caplog.text
    check_checkpoint(by_step(out / "checkpoints")[-1][1])


def test_markers_are_read_once_and_the_best_stays(
    run: Path, bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, asked = objects.Objects.get, []

    def counted(self: objects.Objects, name: str, *, most_bytes: int) -> bytes:
        asked.append(name)
        return get(self, name, most_bytes=most_bytes)

    monkeypatch.setattr(objects.Objects, "get", counted)
    found = by_step(run / "checkpoints")
    validated = [step for step, path in found if read_marker(path)["facts"]["metrics"]]
    best, later = validated[0], [step for step, _ in found if step > validated[0]]
    keep = RetentionPolicy(1, best="val/loss")
    copied(run, best, Mirror(run, URL, keep))
    mirror = Mirror(run, URL, keep)
    for step in later:
        if step not in validated:
            copied(run, step, mirror)
    assert asked == [f"checkpoints/step-{best}/checkpoint.json"]
    assert best in steps_there(bucket)
    assert len(steps_there(bucket)) == 2


def test_the_noted_size_of_micro_batches_is_here_before_the_first_step(
    run: Path, store: Path, tmp_path: Path, bucket: AbstractFileSystem
) -> None:
    copied(run, by_step(run / "checkpoints")[0][0], Mirror(run, URL, KEEP))
    config = tiny_config(store, tmp_path / "here", *SETTINGS, f"checkpoint.mirror={URL}")
    write_note(tmp_path, 4, conditions(config, torch.device("cpu")))
    bucket.pipe(f"lab/runs/first/{MICRO_BATCH}", (tmp_path / MICRO_BATCH).read_bytes())
    accumulated = []

    def before_step(trainer: Trainer, coming: int) -> None:
        accumulated.append(trainer.micro.accumulate)
        raise InterruptedSessionError

    with pytest.raises(InterruptedSessionError):
        train(config, resume="auto", before_step=before_step)
    assert accumulated == [2]


def test_the_web_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written to"):
        Mirror(tmp_path, "https://example.org/run", KEEP).fetch()


def test_what_an_earlier_session_left_there_spoils_no_checkpoint(
    run: Path, tmp_path: Path, bucket: AbstractFileSystem
) -> None:
    """An upload by more processes was cut off, and others never got their marker."""
    first, second = [step for step, _ in by_step(run / "checkpoints")][:2]
    bucket.pipe(f"lab/runs/first/checkpoints/step-{second}/rank-00003.safetensors", b"left")
    bucket.pipe("lab/runs/first/checkpoints/step-1/rank-00000.safetensors", b"left")
    for step in (first, second):
        copied(run, step, Mirror(run, URL, KEEP))
    assert not any("step-1/" in name or "rank-00003" in name for name in there(bucket))
    Mirror(here := tmp_path / "here", URL, KEEP).fetch()
    check_checkpoint(here / f"checkpoints/step-{second}")


def test_a_torn_checkpoint_here_does_not_hide_the_whole_one_there(
    run: Path, tmp_path: Path, bucket: AbstractFileSystem
) -> None:
    step = by_step(run / "checkpoints")[1][0]
    copied(run, step, Mirror(run, URL, KEEP))
    here = tmp_path / "here"
    shutil.copytree(run / f"checkpoints/step-{step}", here / f"checkpoints/step-{step}")
    (here / f"checkpoints/step-{step}/rank-00000.safetensors").write_bytes(b"torn")
    Mirror(here, URL, KEEP).fetch()
    check_checkpoint(here / f"checkpoints/step-{step}")


def test_any_failure_is_told_at_the_end(
    run: Path, bucket: AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: objects.Objects, name: str, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects.Objects, "put", full)
    mirror = Mirror(run, URL, KEEP)
    mirror.add(by_step(run / "checkpoints")[0][1])
    with pytest.raises(RemoteError, match=r"cannot be copied .*No space left"):
        mirror.finish()
