"""What a session reports after each step: metrics, trackers, the progress bar, its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

from dist_train.class_metrics import main_metric
from dist_train.config import Config
from dist_train.data.loading.collate import Batch
from dist_train.data.pictures import as_picture, legend
from dist_train.data.plan.plan import Plan
from dist_train.data.types import GREY
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.backends.trackers import check_trackers
from dist_train.distributed.collectives import on_main
from dist_train.progress import Progress
from dist_train.run.data import RunData
from dist_train.run.model import as_input
from dist_train.targets import Target
from dist_train.training.console import Speed, visits_of
from dist_train.training.metrics_log import EventWriter
from dist_train.training.mistakes import strips_of_mistakes
from dist_train.training.step import Values
from dist_train.training.tracking import services

Say = Callable[[str], None]
#: Classes whose curves are shown.
MOST_CURVES = 12


class Reporter:
    """Reports on rank 0, and does nothing on the others.

    Attributes:
        say: prints a line.
    """

    def __init__(self, config: Config, backend: Backend, plan: Plan, target: Target) -> None:
        self._config, self._backend, self._plan = config, backend, plan
        self._target, (metric, self._told) = target, main_metric(target.kind)
        self._metric = f"val/{metric}"
        if tracked := services(config.track):
            on_main(backend, lambda: check_trackers(tracked))
        self._events: EventWriter | None = None
        self._speed = Speed(visits_of(config, plan))
        self.say: Say = lambda line: None

    @contextmanager
    def open_files(self, done: int) -> Iterator[None]:
        """In the block, metrics of steps later than ``done`` are written. A collective call."""
        with ExitStack() as opened:

            def begin() -> None:
                settings = self._config.model_dump(mode="json")
                track = self._config.track
                writer = EventWriter(self._config.out, settings, after=done, track=track)
                self._events = opened.enter_context(writer)

            on_main(self._backend, begin)
            yield

    def write(self, done: int, values: Values) -> None:
        """Write the metrics of the step that was just done."""
        if self._events is not None:
            # The clock can jump, so its time is for display only.
            self._events.write(done, self._plan.epoch_of(done - 1), time.time(), values)

    def flush(self) -> None:
        """Sync the metrics to the disk. A collective call."""
        on_main(self._backend, lambda: None if self._events is None else self._events.flush())

    def show_clips(self, done: int, batch: Batch, config: Config) -> None:
        """Show the middle frames of a micro-batch, as the model saw them, in TensorBoard."""
        if self._events is None:
            return
        volumes = as_input(batch.volumes, config)
        count, _, depth, *_ = volumes.shape
        depths = torch.full((count,), depth) if batch.frames is None else batch.frames
        frames = volumes[torch.arange(count), :, (depths // 2).cpu()].movedim(1, -1).cpu().numpy()
        channels = config.model.channels or GREY
        frames = frames[..., 0] if len(channels) == 1 else frames
        self._events.tensorboard.clips(
            done, as_picture(frames, channels), self._shown(batch.labels), legend(channels)
        )

    def _shown(self, labels: Tensor) -> dict[str, np.ndarray]:
        """Which clips of a batch are shown together, bool [B], by name: those of a class."""
        target, values = self._target, labels.cpu().numpy()
        if target.kind == "binary":
            return {"negatives": values == 0, "positives": values == 1}
        if target.kind == "regression":
            return {"all": np.ones(len(values), np.bool_)}
        if not target.is_coded:
            return {name: values[:, k] == 1 for k, name in enumerate(target.classes)}
        return {target.classes[k]: values == k for k in np.unique(values).astype(int).tolist()}

    def show_curve(self, done: int, labels: np.ndarray, scores: np.ndarray) -> None:
        """Show precision against recall of the val split, if it has clips, in TensorBoard: of
        several classes, of each against the rest."""
        target = self._target
        if self._events is None or not len(labels) or target.kind == "regression":
            return
        board = self._events.tensorboard
        if target.kind == "binary":
            board.pr_curve(done, labels, scores)
            return
        for k, name in enumerate(target.classes[:MOST_CURVES]):
            own = labels == k if target.is_coded else labels[:, k]
            board.pr_curve(done, own.astype(np.int64), scores[:, k], f"val/{name}")

    def show_mistakes(
        self, done: int, data: RunData, labels: np.ndarray, scores: np.ndarray
    ) -> None:
        """Show the most confidently wrong clips of the val split in TensorBoard."""
        if self._events is not None and self._target.is_coded and self._events.tensorboard.shows:
            self._events.tensorboard.strips(done, strips_of_mistakes(data, labels, scores))

    def tell(self, done: int, values: Values, progress: Progress | None) -> None:
        """Advance the progress bar, and print the speed once it is known."""
        if progress is not None:
            steps = self._plan.first_step(self._config.train.epochs)
            progress(done, steps, self._headline(done, values))
        line = self._speed.after_step(self._plan.clips_at(done - 1))
        if line is not None:
            self.say(line)

    def _headline(self, done: int, values: Values) -> str:
        epoch = self._plan.epoch_of(done - 1) + 1
        text = (
            f"epoch {epoch}/{self._config.train.epochs}  loss {values['train/loss'] or 0:.3f}  "
            f"{values.get('speed/clips_per_second') or 0:.1f} clips/s"
        )
        value = values.get(self._metric)
        return text if value is None else f"{text}  val {self._told} {value:.3f}"
