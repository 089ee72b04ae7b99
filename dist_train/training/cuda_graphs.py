"""CUDA graphs: the passes of each batch shape are captured once, then replayed by one launch.

A few clips keep a large GPU busy for milliseconds, in which the host must launch about a thousand
kernels. A graph holds them all with the addresses that they read and write, so inputs, outputs and
gradients must stay at the same addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dist_train.distributed.backends.base import Backend
from dist_train.training.forward_backward import NO_EXTRAS, ForwardBackward, Outputs
from dist_train.training.losses import LOSSES, Loss

#: Runs of a shape before it is captured: libraries choose their kernels, and loops are compiled.
UNRECORDED = 2
#: The most graphs that are kept. Depths of batches are usually fewer.
MOST = 256


def make_forward_backward(
    backend: Backend, loss: Loss = LOSSES["bce"], *, outputs: int = 1, device_knows_frames: bool
) -> ForwardBackward:
    """Return the passes; for ``train.graphs``, those of ``GraphedForwardBackward``."""
    if not backend.settings.graphs:
        return ForwardBackward(backend, loss, outputs=outputs)
    return GraphedForwardBackward(
        backend,
        Recorder(backend.device),
        loss,
        outputs=outputs,
        device_knows_frames=device_knows_frames,
    )


class Recorder:
    """Captures work of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        # Libraries keep handles for each stream, which must exist before the capture.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Graphs are replayed one after the other, so they share the memory of intermediate values.
        self._memory = torch.cuda.graph_pool_handle()

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Run the block in the stream that ``record`` captures, without capturing it."""
        around = torch.cuda.current_stream()
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            yield
        around.wait_stream(self._stream)

    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Capture ``run``, which computes nothing yet, and return a function that replays it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy meanwhile: loaders, and the writer of checkpoints.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class _Recording(NamedTuple):
    """A captured graph, and the tensors that it reads its inputs from."""

    x: Tensor
    frames: Tensor | None
    labels: Tensor
    extras: dict[str, Tensor]
    replay: Callable[[], Outputs]


class GraphedForwardBackward(ForwardBackward):
    """``ForwardBackward``, captured for each batch shape when it comes the third time.

    Gradients must be set to zero and not dropped, as graphs add to their memory.

    Args:
        device_knows_frames: whether the model needs the true depths on the device alone. If not,
            padded batches are not captured.
    """

    def __init__(
        self,
        backend: Backend,
        recorder: Recorder,
        loss: Loss = LOSSES["bce"],
        *,
        outputs: int = 1,
        device_knows_frames: bool,
    ) -> None:
        super().__init__(backend, loss, outputs=outputs)
        self._recorder, self._device_knows_frames = recorder, device_knows_frames
        self._weight = torch.zeros((), device=backend.device)
        self._input = torch.empty(0, device=backend.device)
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(
        self,
        x: Tensor,
        frames: Tensor | None,
        labels: Tensor,
        weight: float | Tensor,
        extras: Mapping[str, Tensor] = NO_EXTRAS,
    ) -> Outputs:
        key = (*x.shape, frames is None)
        self._seen[key] += 1
        if self._seen[key] <= UNRECORDED or not (frames is None or self._device_knows_frames):
            with self._recorder.unrecorded():
                return super().__call__(x, frames, labels, weight, extras)
        if key not in self._recordings:
            if len(self._recordings) == MOST:
                self._recordings.clear()
            self._recordings[key] = self._record(x, frames, labels, extras)
        recording = self._recordings[key]
        recording.x.copy_(x)
        recording.labels.copy_(labels)
        for name, tensor in extras.items():
            recording.extras[name].copy_(tensor)
        if frames is not None:
            assert recording.frames is not None
            recording.frames.copy_(frames, non_blocking=True)
        self._weight.fill_(weight)
        logits, loss = recording.replay()
        return logits.clone(), loss.clone()

    def _record(
        self,
        x: Tensor,
        frames: Tensor | None,
        labels: Tensor,
        extras: Mapping[str, Tensor],
    ) -> _Recording:
        run = super().__call__
        x, labels = self._shared_input(x), labels.clone()
        own = {name: tensor.clone() for name, tensor in extras.items()}
        depths = None if frames is None else frames.to(x.device, copy=True)
        replay = self._recorder.record(lambda: run(x, depths, labels, self._weight, own))
        return _Recording(x, depths, labels, own, replay)

    def _shared_input(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x`` in memory that all graphs share."""
        if self._input.numel() < x.numel():
            # Doubled, as older graphs keep the smaller memory alive.
            self._input = x.new_empty(max(x.numel(), 2 * self._input.numel()))
        return self._input[: x.numel()].as_strided(x.shape, x.stride())
