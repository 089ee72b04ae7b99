"""What is captured of a training step, and when.

Without a GPU a replay calls the captured function again. That the passes can be captured is seen
from what they ask the device for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.config import TrainSettings
from dist_train.distributed.backends import make_backend
from dist_train.distributed.backends.base import Backend
from dist_train.models.norm import fuse, share_statistics
from dist_train.models.resnet3d import ResNet3D
from dist_train.training.cuda_graphs import (
    UNRECORDED,
    GraphedForwardBackward,
    make_forward_backward,
)
from dist_train.training.forward_backward import ForwardBackward, Outputs

Inputs = tuple[Tensor, Tensor | None, Tensor, float]


class CallAgain:
    """``Recorder`` for a CPU: a replay calls the function again. As with a graph, its outputs are
    always in the same memory."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def unrecorded(self) -> Any:
        return nullcontext()

    def record(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        self.recorded += 1
        places: list[Tensor] = []

        def replay() -> Outputs:
            self.replayed += 1
            outputs = run()
            if not places:
                places.extend(map(torch.empty_like, outputs))
            for place, output in zip(places, outputs, strict=True):
                place.copy_(output)
            return places[0], places[1]

        return replay


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch.manual_seed(0)
    backend = make_backend(TrainSettings(precision="fp32"), clip_norm=None)
    model = ResNet3D(10, width=4).to(memory_format=torch.channels_last_3d)
    backend.wrap(model, lambda wrapped: torch.optim.SGD(wrapped.parameters(), lr=0.05))
    backend.model.train()
    yield backend
    backend.close()


def inputs(depth: int, *, shorter: bool = False, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 1, depth, 24, 20, generator=generator)
    frames = torch.tensor([depth, depth - 1, depth, depth - seed % 3]) if shorter else None
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0]).roll(seed)
    return x.contiguous(memory_format=torch.channels_last_3d), frames, labels, 1 / (1 + seed)


#: Shapes in turn, the deepest last, so that earlier recordings must outlive the room they share.
BATCHES = [
    inputs(depth, shorter=shorter, seed=seed)
    for seed in range(UNRECORDED + 3)
    for depth, shorter in [(4, False), (6, True), (6, False), (9, True)]
]


def state(backend: Backend) -> list[Tensor]:
    tensors = [*backend.module.buffers(), *(p.grad for p in backend.module.parameters())]
    return [tensor.clone() for tensor in tensors if tensor is not None]


def run(backend: Backend, step: ForwardBackward) -> list[Tensor]:
    """Train on ``BATCHES``, with an update after every second one; return all outputs."""
    found = []
    for number, batch in enumerate(BATCHES):
        found += [*step(*batch), *state(backend)]
        if number % 2:
            backend.update()
    return found


@pytest.mark.parametrize("device_knows_frames", [True, False])
def test_replays_are_the_passes_on_the_new_batch(
    backend: Backend, device_knows_frames: bool
) -> None:
    start = {name: tensor.clone() for name, tensor in backend.module.state_dict().items()}
    expected = run(backend, ForwardBackward(backend))
    backend.module.load_state_dict(start)
    backend.drop_gradients()
    recorder: Any = CallAgain()
    found = run(
        backend,
        GraphedForwardBackward(backend, recorder, device_knows_frames=device_knows_frames),
    )
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)
    shapes = 4 if device_knows_frames else 2
    assert (recorder.recorded, recorder.replayed) == (shapes, 3 * shapes)


def test_without_the_setting_nothing_is_recorded(backend: Backend) -> None:
    assert type(make_forward_backward(backend, device_knows_frames=True)) is ForwardBackward


class OnMeta(TorchDispatchMode):
    """Notes operations on tensors of other devices, which a graph would not repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.elsewhere: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.seen += 1
        if any(tensor.device.type != "meta" for tensor in tensors):
            self.elsewhere.append(str(func))
        return out


# Shared norms that are not fused take an operation that has no meta kernel.
@pytest.mark.parametrize(
    ("fused", "shared", "padded", "folded"),
    [
        (False, False, False, False),
        (True, False, False, True),
        (True, False, True, False),
        (True, True, True, True),
    ],
)
def test_the_passes_ask_the_device_for_nothing(
    monkeypatch: pytest.MonkeyPatch, fused: bool, padded: bool, folded: bool, shared: bool
) -> None:
    """On the meta device there are no values, so that reading one fails. So the host need not wait
    for the device either."""
    mode = recorded_on_meta(monkeypatch, fused=fused, padded=padded, folded=folded, shared=shared)
    assert mode.seen > 300
    assert not mode.elsewhere


def test_padding_needs_norms_that_know_it_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match="nonzero"):
        recorded_on_meta(monkeypatch, padded=True)


def recorded_on_meta(
    monkeypatch: pytest.MonkeyPatch,
    *,
    fused: bool = False,
    padded: bool = False,
    folded: bool = False,
    shared: bool = False,
) -> OnMeta:
    # The meta device has no autocast. In float32 it does nothing.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"):
        model = ResNet3D(50, width=4, stem_folded=folded, dropout=0.1).train()
        x = torch.empty(4, 1, 10, 40, 40).to(memory_format=torch.channels_last_3d)
        frames = torch.empty(4, dtype=torch.int64) if padded else None
        labels, weight = torch.empty(4), torch.empty(())
    if fused:
        fuse(model)
    if shared:
        share_statistics(model, lambda sums: None)
    backend: Any = SimpleNamespace(model=model, backward=lambda loss: loss.backward())
    step = ForwardBackward(backend)
    with torch.compiler.set_stance("force_eager"), OnMeta() as mode:
        step(x, frames, labels, weight)
    assert all(parameter.grad is not None for parameter in model.parameters())
    return mode
