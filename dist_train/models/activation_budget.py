"""The cheapest plan of recomputing whose activations fit into so many bytes.

Each part of the network runs forward and backward once in each mode, on tensors that have shapes
but no data (torch's FakeTensorMode), so that no memory and no GPU is needed. Counted are the bytes
that are alive at each moment, and the work. How parts add up is then a sum, and there are few
enough plans to look at all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dist_train.errors import ModelError
from dist_train.models.recompute import Recompute, run_part
from dist_train.models.resnet3d import PARTS, RecomputePlan, ResNet3D

MODES: tuple[Recompute, ...] = get_args(Recompute)
#: Floating point operations that take as long as moving one byte: about what GPUs with tensor
#: cores come to (V100 100, A100 150, H100 200 by their data sheets, and less in practice).
OPERATIONS_A_BYTE = 100


@dataclass(frozen=True)
class Cost:
    """One part of the network in one mode.

    Attributes:
        kept: bytes that are alive between its forward and its backward pass, with what goes into
            it, but not what comes out.
        peak: the most bytes that are alive while it runs, forward or backward, of what is its own.
        work: of both passes, in bytes moved.
    """

    kept: int
    peak: int
    work: float


#: By part, and then by mode.
Costs = Sequence[Mapping[Recompute, Cost]]


@dataclass(frozen=True)
class Choice:
    """``plan`` with the most bytes that its activations take at once, and what it costs: the work
    of forward and backward pass over that of keeping all."""

    plan: RecomputePlan
    bytes: int
    work: float


def choose_plan(costs: Costs, budget: int) -> Choice:
    """The plan of least work of those whose activations fit into ``budget`` bytes; where there is
    none, the one that takes the fewest bytes."""
    plans = product(MODES, repeat=len(costs))
    choices = [weigh(cast(RecomputePlan, plan), costs) for plan in plans]
    fitting = [choice for choice in choices if choice.bytes <= budget]
    if not fitting:
        return min(choices, key=lambda choice: (choice.bytes, choice.work))
    return min(fitting, key=lambda choice: (choice.work, choice.bytes))


def weigh(plan: RecomputePlan, costs: Costs) -> Choice:
    """What a plan takes."""
    before, most, work = 0, 0, 0.0
    for mode, of_part in zip(plan, costs, strict=True):
        cost = of_part[mode]
        # While a part runs backward, those behind it have been freed.
        most = max(most, before + cost.peak)
        before += cost.kept
        work += cost.work
    return Choice(plan, most, work / sum(of_part["none"].work for of_part in costs))


def measure_parts(
    make_model: Callable[[], nn.Module],
    shape: Sequence[int],
    precision: torch.dtype | None = None,
) -> Costs:
    """The costs of each part of ``PARTS`` for clips of ``shape`` [B, C, D, H, W], none of which is
    padded: padded ones keep no more.

    Args:
        precision: the dtype of autocast, if any.

    Raises:
        ModelError: the model has no parts to recompute.
    """
    costs: list[dict[Recompute, Cost]] = []
    with FakeTensorMode():
        model = make_model()
        if not isinstance(model, ResNet3D):
            raise ModelError(
                f"{type(model).__name__} has no parts of which a budget could choose",
                where="model.activation_memory",
                fix="Leave it out for this model.",
            )
        for parameter in model.parameters():
            # The budget is that of activations.
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        x = torch.empty(shape)
        parts, _ = model.parts()
        for number, steps in enumerate(parts):
            of_part = {}
            for mode in MODES:
                of_part[mode], output = _measure(mode, steps, x, precision)
            costs.append(of_part)
            last = number == len(parts) - 1
            if not last:
                x = torch.empty(output, dtype=precision).requires_grad_()
    assert len(costs) == len(PARTS)
    return costs


def _measure(
    mode: Recompute,
    steps: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    precision: torch.dtype | None,
) -> tuple[Cost, torch.Size]:
    with _Meter() as meter:
        meter.note(x)
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            y = run_part(mode, steps, x)
        shape, edge = y.shape, get_gradient_edge(y)
        # The output is kept by the next part, as what goes into it.
        kept = meter.live - y.untyped_storage().nbytes()
        gradient = torch.empty_like(y)
        del y
        torch.autograd.backward([edge], [gradient])
        x.grad = None
    return Cost(kept, meter.peak, meter.work), shape


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that were made within it and are alive, and the work."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.work = 0.0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        used = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = {t.untyped_storage()._cdata for t in used}
        # Others are views of what was there, as of weights, or are updated in place.
        outputs = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        new = [t for t in outputs if t.untyped_storage()._cdata not in places]
        for tensor in new:
            self.note(tensor)
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=made)
            self.work += flops / OPERATIONS_A_BYTE
        if new:
            self.work += sum(t.numel() * t.element_size() for t in (*used, *new))
        return made

    def note(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size


def in_units(size: float) -> str:
    """Bytes, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
