"""Names in a run's folder, and whether a training may begin there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.checkpoint.format import by_step
from dist_train.checkpoint.superseded import SUPERSEDED
from dist_train.errors import RunError
from dist_train.files import open_lock
from dist_train.run.splits import LARGE_SPLITS, SPLITS
from dist_train.system.file_locks import go_on_unlocked

LOCK = ".lock"

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

CONFIG = "config.yaml"
RECORD = "run.json"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
SNAPSHOT = ".safetensors"
PREDICTIONS = "predictions.csv"
SUBMISSION = "submission.csv"
EVALUATION = "evaluation.json"
CALIBRATION = "calibration.json"
SUSPECTS = "suspects.csv"
ORIGIN = "predictions.json"
MICRO_BATCH = "micro_batch.json"
#: The run's ids at MLflow and W&B, and what W&B writes.
TRACKED = ("mlflow.json", "wandb.json", "wandb")
#: Written by ``dist-train check --json`` on request, for the report.
CHECK = "check.json"

#: Written before the first step, so without any result of the training.
BEFORE_THE_FIRST_STEP = (CONFIG, RECORD)
_FILES = (*BEFORE_THE_FIRST_STEP, METRICS, PREDICTIONS, SUBMISSION, EVALUATION)
#: Files and folders that no command writes on request.
OWN = (
    *_FILES, LOCK, SPLITS, LARGE_SPLITS, CALIBRATION, ORIGIN, MICRO_BATCH, SUSPECTS,
    CHECKPOINTS, SNAPSHOTS, TENSORBOARD, SUPERSEDED, *TRACKED,
)  # fmt: skip


def parts_of_run(folder: Path) -> list[str]:
    """Names of a run's files and folders in ``folder``; empty if there is no run."""
    found = [name for name in _FILES if os.path.lexists(folder / name)]
    if any((folder / TENSORBOARD).glob("events.out.tfevents.*")):
        found.append(TENSORBOARD)
    if by_step(folder / SNAPSHOTS, SNAPSHOT):
        found.append(SNAPSHOTS)
    # A broken link may lead to a disk that is not mounted.
    checkpoints = folder / CHECKPOINTS
    if by_step(checkpoints) or (checkpoints.is_symlink() and not checkpoints.exists()):
        found.append(CHECKPOINTS)
    return found


def check_folders(folder: Path) -> None:
    """Refuse, hours before the first checkpoint, names that cannot become folders of the run.

    Raises:
        RunError: a file, or a broken link, has the name of a folder of the run.
    """
    for name in (CHECKPOINTS, SNAPSHOTS, TENSORBOARD):
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise RunError(
                "has the name of a folder of the run, but is not a folder",
                where=folder / name,
                fix="Move it away, or choose another 'out'.",
            )


def refuse_own_place(run: Path, out: Path) -> None:
    """Refuse to write a command's output over a file of the run.

    Raises:
        RunError: ``out`` has the name of a file of the run, or is in a folder of the run.
    """
    own, place = run.resolve(), out.resolve()
    if not place.is_relative_to(own) or place == own:
        return
    name = place.relative_to(own).parts[0]
    if name in OWN:
        raise RunError(f"the run itself keeps its {name} there", where=out, fix="Choose another.")


def refuse_existing(folder: Path) -> None:
    """Check the folder for ``--resume never``.

    Raises:
        RunError: it holds files of a run, with which a new run would mix.
    """
    if found := parts_of_run(folder):
        raise RunError(
            f"the folder holds a run already ({', '.join(found)})",
            where=folder,
            fix="Go on with it by --resume auto, choose another 'out', or move the folder away.",
        )


def refuse_lost_checkpoints(folder: Path, *, checkpointed: bool | None) -> None:
    """Check a folder without checkpoints for ``--resume auto``.

    A run begins again at step 0 only if it never completed a checkpoint. Otherwise its checkpoints
    were deleted, or are on a disk that is not mounted, and a new run would replace it.

    Args:
        checkpointed: whether the run ever completed a checkpoint; None if unknown.

    Raises:
        RunError: the run has, or may have, completed a checkpoint.
    """
    found = parts_of_run(folder)
    if checkpointed is False or not found:
        return
    if checkpointed is None and set(found) <= set(BEFORE_THE_FIRST_STEP):
        return
    raise RunError(
        f"the folder holds a run ({', '.join(found)}) but no checkpoint to go on from",
        where=folder,
        fix=f"Put its {CHECKPOINTS}/ back, or mount the disk that it is on. To begin a new run, "
        "choose another 'out' or move the folder away.",
    )


@contextmanager
def only_session(run: Path, work: str = "training") -> Iterator[None]:
    """Create a folder, and lock it against a second ``work`` in it.

    The kernel drops the lock when its owner ends, in whatever way.

    Raises:
        RunError: another one is at work in it.
        FileError: the lock file is a link, or not a plain file.
        MachineError: it cannot be locked, and the user has not allowed going on without.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open_lock(run / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another {work} is at work in this folder",
                where=run,
                fix="Wait for it, or choose another 'out'.",
            ) from None
        except OSError as error:
            go_on_unlocked(run, error)
        yield
