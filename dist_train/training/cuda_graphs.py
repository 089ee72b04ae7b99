"""CUDA graphs: the passes of a batch shape are recorded once, and replayed by one launch.

Four clips keep a large GPU busy for some milliseconds, in which the host has to launch some
thousand kernels. A recording holds them all, with the addresses that they read and write: so what
goes in and out lies in the same place each time, the gradients too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.distributed.backends.base import Backend
from dist_train.training.forward_backward import MicroStep, Outputs
from dist_train.training.losses import LOSSES, Loss

#: So often a shape is run before it is recorded: libraries choose their kernels then, and loops are
#: compiled.
UNRECORDED = 2
#: Recordings that are held; the depths of clips are fewer.
MOST = 256


def make_micro_step(
    backend: Backend, loss: Loss = LOSSES["bce"], *, device_knows_frames: bool
) -> MicroStep:
    """As the backend's settings say. For the arguments see ``GraphedMicroStep``."""
    if not backend.settings.graphs:
        return MicroStep(backend, loss)
    recorder = Recorder(backend.device)
    return GraphedMicroStep(backend, recorder, loss, device_knows_frames=device_knows_frames)


class Recorder:
    """Records what a CUDA device is given to do."""

    def __init__(self, device: torch.device) -> None:
        # Libraries keep handles for each stream, which must be there before they are recorded.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # One replay follows the other, so that all can use the same memory for what lies between.
        self._memory = torch.cuda.graph_pool_handle()

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Within it work is done in the stream that ``record`` uses."""
        around = torch.cuda.current_stream()
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            yield
        around.wait_stream(self._stream)

    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """What does all that ``run`` gives the device to do, when it is called. ``run`` itself is
        called once, and nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy in the meantime: loaders, and the writer of checkpoints.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class _Recording(NamedTuple):
    """Where the inputs of a recording lie, and what replays it."""

    x: Tensor
    frames: Tensor | None
    labels: Tensor
    replay: Callable[[], Outputs]


class GraphedMicroStep(MicroStep):
    """``MicroStep``, recorded for each shape of batch that comes a third time.

    Gradients must be set to zero rather than dropped, as recordings add to where they lie.

    Args:
        device_knows_frames: the model needs the true depths on the device alone. Where it is False,
            padded batches are not recorded.
    """

    def __init__(
        self,
        backend: Backend,
        recorder: Recorder,
        loss: Loss = LOSSES["bce"],
        *,
        device_knows_frames: bool,
    ) -> None:
        super().__init__(backend, loss)
        self._recorder, self._device_knows_frames = recorder, device_knows_frames
        self._weight = torch.zeros((), device=backend.device)
        self._room = torch.empty(0, device=backend.device)
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(
        self, x: Tensor, frames: Tensor | None, labels: Tensor, weight: float | Tensor
    ) -> Outputs:
        key = (*x.shape, frames is None)
        self._seen[key] += 1
        if self._seen[key] <= UNRECORDED or not (frames is None or self._device_knows_frames):
            with self._recorder.unrecorded():
                return super().__call__(x, frames, labels, weight)
        if key not in self._recordings:
            if len(self._recordings) == MOST:
                self._recordings.clear()
            self._recordings[key] = self._record(x, frames, labels)
        inputs = self._recordings[key]
        inputs.x.copy_(x)
        inputs.labels.copy_(labels)
        if frames is not None:
            assert inputs.frames is not None
            inputs.frames.copy_(frames, non_blocking=True)
        self._weight.fill_(weight)
        logits, loss = inputs.replay()
        return logits.clone(), loss.clone()

    def forget(self) -> None:
        self._recordings.clear()
        self._seen.clear()
        self._room = torch.empty(0, device=self._room.device)

    def _record(self, x: Tensor, frames: Tensor | None, labels: Tensor) -> _Recording:
        run = super().__call__
        at = self._place(x)
        depths = None if frames is None else frames.to(x.device, copy=True)
        wanted = labels.clone()
        return _Recording(
            at,
            depths,
            wanted,
            self._recorder.record(lambda: run(at, depths, wanted, self._weight)),
        )

    def _place(self, x: Tensor) -> Tensor:
        """Memory like that of ``x``, which all recordings share: one is in use at a time."""
        if self._room.numel() < x.numel():
            # Twice as large as before: recordings keep theirs, and shallow batches may come first.
            self._room = x.new_empty(max(x.numel(), 2 * self._room.numel()))
        return self._room[: x.numel()].as_strided(x.shape, x.stride())
