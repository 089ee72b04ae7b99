"""What TensorBoard shows of a run: curves, settings, precision against recall, training clips.

``metrics.jsonl`` is the record of a run. These files only show it: without the tensorboard package,
or after a write that failed, training goes on without them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS = "events.out.tfevents."
#: Rows of clips in a picture of a training batch, and columns of negatives.
ROWS, NEGATIVES = 8, 3
#: The curves that the table of hyper-parameters compares runs by.
COMPARED = ("val/loss", "val/mcc@0.5", "val/ap")
log = logging.getLogger(__name__)


class TensorBoardWriter:
    """Writes one event file per session of a run. No method raises; the first failure is logged.

    Args:
        folder: holds the event files of all sessions.
        first_step: the first step of the session. TensorBoard then drops what an earlier, killed
            session wrote of this step and later ones.
        settings: settings of the run: a nested mapping of JSON types.
    """

    def __init__(self, folder: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        self._writer: SummaryWriter | None = None
        self._hook = threading.excepthook
        with self._failure_survived():
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams

            threading.excepthook = self._quiet_hook
            _number(folder)
            # The queue is never full, so that a slow disk does not hold up the training.
            self._writer = SummaryWriter(str(folder), purge_step=first_step, max_queue=10**6)
            if settings:
                flat = dict(_flattened(settings))
                rows = "\n".join(f"    {name}: {value}" for name, value in flat.items())
                self._writer.add_text("settings", rows, first_step - 1)
                events: Any = self._writer.file_writer
                # ``add_hparams`` would begin a second file.
                for summary in hparams(flat, dict.fromkeys(COMPARED, 0)):  # type: ignore[no-untyped-call]
                    events.add_summary(summary)

    def scalars(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Metrics of one step.

        Args:
            time: seconds since 1970, for TensorBoard's axis of time alone.
        """
        with self._failure_survived():
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step, time)

    def pr_curve(self, step: int, labels: np.ndarray, scores: np.ndarray) -> None:
        """Precision against recall of the val split: 0 or 1, and probabilities, [N] each."""
        with self._failure_survived():
            if self._writer is not None:
                self._writer.add_pr_curve("val", labels, scores, step)

    def clips(self, step: int, frames: np.ndarray, labels: np.ndarray) -> None:
        """A picture of training clips: positives left of a white line, negatives right of it.

        Args:
            frames: uint8 [N, H, W], one frame of each clip.
            labels: 0 or 1, [N].
        """
        with self._failure_survived():
            if self._writer is not None:
                positives, negatives = frames[labels == 1][:ROWS], frames[labels == 0]
                rows = max(len(positives), 1)
                line = np.full((rows * frames.shape[1], 4), 255, np.uint8)
                picture = [_grid(positives, rows), line, _grid(negatives[: NEGATIVES * rows], rows)]
                self._writer.add_image(
                    "training clips", np.concatenate(picture, axis=1), step, dataformats="HW"
                )

    def flush(self) -> None:
        """Hand all events to the system."""
        with self._failure_survived():
            if self._writer is not None:
                self._writer.flush()

    def close(self) -> None:
        with self._failure_survived():
            if self._writer is not None:
                self._writer.close()
        threading.excepthook = self._hook

    @contextmanager
    def _failure_survived(self) -> Iterator[None]:
        try:
            yield
        except ImportError:
            log.warning(
                "tensorboard is not installed, so metrics go to metrics.jsonl alone: "
                "pip install tensorboard"
            )
        # TensorFlow, where it is installed, writes the file and has its own errors.
        except Exception as error:
            failed, self._writer = self._writer, None
            if failed is not None:
                with suppress(Exception):
                    # Closing ends the writer's thread while the quiet hook is in place.
                    failed.close()
            log.warning(
                "TensorBoard gets nothing more of this session, and metrics.jsonl has all: %s",
                error,
            )

    def _quiet_hook(self, args: threading.ExceptHookArgs) -> None:
        """Without the traceback of SummaryWriter's thread, whose error its next call raises."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._hook(args)


def _number(folder: Path) -> None:
    """Rename the files of earlier sessions, so that their names sort before those of later ones.

    TensorBoard reads files in the order of their names, and SummaryWriter names a file by the
    second in which it was begun. After the clock went back, a resumed session would be read first.
    """
    for number, path in enumerate(sorted(folder.glob(f"{EVENTS}*")), 1):
        numbered = folder / f"{EVENTS}{number:010d}"
        # A file that is not of this writer may have the name; rename would replace it.
        if not os.path.lexists(numbered):
            path.rename(numbered)


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names such as ``optim.lr``, and values that the table of hyper-parameters takes."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, bool | int | float) else str(value)


def _grid(frames: np.ndarray, rows: int) -> np.ndarray:
    """Frames, [N, H, W], side by side in so many rows; black where there are too few."""
    count, height, width = frames.shape
    columns = -(-count // rows)
    cells = np.zeros((columns * rows, height, width), frames.dtype)
    cells[:count] = frames
    grid = cells.reshape(rows, columns, height, width).transpose(0, 2, 1, 3)
    return grid.reshape(rows * height, columns * width)
