"""What TensorBoard shows of a run: curves, settings, precision against recall, training clips.

``metrics.jsonl`` is the record of a run. These files only show it: without the tensorboard package,
or after a failed write, training continues without them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dist_train.data.pictures import stacked

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS = "events.out.tfevents."
#: Clips of each class in a picture of a training batch.
MOST_CLIPS = 24
#: Metrics in TensorBoard's table of hyper-parameters.
COMPARED = ("val/loss", "val/mcc@0.5", "val/ap")
log = logging.getLogger(__name__)


class TensorBoardWriter:
    """Writes one event file per session of a run. No method raises; the first failure is logged.

    Args:
        folder: holds the event files of all sessions; None shows nothing.
        first_step: first step of the session. TensorBoard ignores what an earlier, killed session
            wrote for this step and later ones.
        settings: settings of the run: a nested mapping of JSON types.
    """

    def __init__(self, folder: Path | None, first_step: int, settings: Mapping[str, Any]) -> None:
        self._writer: SummaryWriter | None = None
        self._hook = threading.excepthook
        if folder is None:
            return
        threading.excepthook = self._quiet_hook
        try:
            from torch.utils.tensorboard import SummaryWriter

            _number_files(folder)
            # A queue that is never full, so that a slow disk does not delay the training.
            self._writer = SummaryWriter(str(folder), purge_step=first_step, max_queue=10**6)
        except ImportError:
            log.warning(
                "tensorboard is not installed, so metrics go to metrics.jsonl alone: "
                "pip install tensorboard"
            )
        except Exception as error:
            self._give_up(error)
        if settings:
            self._try(lambda writer: _add_settings(writer, settings, first_step - 1))

    @property
    def shows(self) -> bool:
        """Whether anything is written."""
        return self._writer is not None

    def scalars(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Show the metrics of a step. ``time`` is seconds since 1970."""

        def add(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step, time)

        self._try(add)

    def pr_curve(
        self, step: int, labels: np.ndarray, scores: np.ndarray, name: str = "val"
    ) -> None:
        """Show precision against recall, from labels (0 or 1) and probabilities, [N] each."""
        self._try(lambda writer: writer.add_pr_curve(name, labels, scores, step))

    def clips(
        self, step: int, frames: np.ndarray, parts: Mapping[str, np.ndarray], colours: str = ""
    ) -> None:
        """Show a picture of each part of the clips.

        Args:
            frames: one frame of each clip, uint8 [N, H, W] or [N, H, W, 3].
            parts: which clips are in a part, bool [N], by its name.
            colours: what the colours show.
        """
        told = f" ({colours})" if colours else ""

        def add(writer: SummaryWriter) -> None:
            for name, are_in in parts.items():
                shown = frames[are_in][:MOST_CLIPS]
                shown = shown[..., None] if shown.ndim == 3 else shown
                if len(shown):
                    tag = f"training clips/{name}{told}"
                    writer.add_images(tag, shown, step, dataformats="NHWC")

        self._try(add)

    def strips(self, step: int, strips: Mapping[str, np.ndarray]) -> None:
        """Show the wrong clips of the val split as one picture, one below the other, and their
        titles as a text in the same order, with the same tag at every step. Without clips nothing
        is shown.

        Args:
            strips: by title, all uint8 [H, W] or all [H, W, 3].
        """
        tag = "wrong clips/val"

        def add(writer: SummaryWriter) -> None:
            shown = np.atleast_3d(stacked(list(strips.values())))
            writer.add_image(tag, shown, step, dataformats="HWC")
            writer.add_text(tag, "\n".join(f"    {title}" for title in strips), step)

        if strips:
            self._try(add)

    def flush(self) -> None:
        """Write all events to the file, without syncing it."""
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        self._try(lambda writer: writer.close())
        threading.excepthook = self._hook

    def _try(self, write: Callable[[SummaryWriter], None]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        # If TensorFlow is installed, it writes the file, and raises its own errors.
        except Exception as error:
            failed, self._writer = self._writer, None
            with suppress(Exception):
                # This ends the writer's thread while the quiet hook is in place.
                failed.close()
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning(
            "TensorBoard gets nothing more of this session, and metrics.jsonl has all: %s", error
        )

    def _quiet_hook(self, args: threading.ExceptHookArgs) -> None:
        """Hide errors of SummaryWriter's thread, which its next call raises again."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._hook(args)


def _number_files(folder: Path) -> None:
    """Rename the files of earlier sessions, so that their names sort before the next one's.

    TensorBoard reads files by name, and SummaryWriter names them by the time of their creation. If
    the clock was set back, a resumed session would be read first.
    """
    for number, path in enumerate(sorted(folder.glob(f"{EVENTS}*")), 1):
        numbered = folder / f"{EVENTS}{number:010d}"
        # A file of another writer may have the name, and rename would replace it.
        if not os.path.lexists(numbered):
            path.rename(numbered)


def _add_settings(writer: SummaryWriter, settings: Mapping[str, Any], step: int) -> None:
    """Show settings as a text and in the table of hyper-parameters."""
    from torch.utils.tensorboard.summary import hparams

    (flat,) = pd.json_normalize(dict(settings)).to_dict("records")
    plain = {
        str(name): value if isinstance(value, bool | int | float) else str(value)
        for name, value in flat.items()
    }
    rows = "\n".join(f"    {name}: {value}" for name, value in plain.items())
    writer.add_text("settings", rows, step)
    events: Any = writer.file_writer
    # ``add_hparams`` would begin a second file.
    for summary in hparams(plain, dict.fromkeys(COMPARED, 0)):  # type: ignore[no-untyped-call]
        events.add_summary(summary)
