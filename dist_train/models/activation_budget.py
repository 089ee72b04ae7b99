"""Choose the cheapest recompute modes whose activations fit into a budget of bytes.

Each part of the network runs forward and backward in each mode, on tensors without data (torch's
FakeTensorMode), which needs no memory and no GPU. The costs of the parts add up, and there are few
enough combinations to try all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dist_train.errors import ModelError
from dist_train.models.recompute import Recompute, Step, run_part
from dist_train.models.trunk import RecomputePlan, Trunk

MODES: tuple[Recompute, ...] = get_args(Recompute)
#: Floating point operations that take as long as moving one byte. Data sheets of GPUs with tensor
#: cores give 100 (V100), 150 (A100) and 200 (H100); practice gives less.
OPERATIONS_A_BYTE = 100


@dataclass(frozen=True)
class Cost:
    """Cost of one part of the network in one mode.

    ``kept`` bytes live between its forward and backward pass, with its input, without its output.
    At most ``peak`` bytes live while it runs. ``work`` of both passes is in bytes moved.
    """

    kept: int
    peak: int
    work: float


#: Costs by part, then by mode.
Costs = Sequence[Mapping[Recompute, Cost]]


@dataclass(frozen=True)
class Choice:
    """One mode for each part, the most bytes of activations that it keeps alive at once,
    and its work relative to the plan that recomputes nothing."""

    plan: RecomputePlan
    bytes: int
    work: float


def choose_plan(costs: Costs, budget: int) -> Choice:
    """The plan of least work that fits into ``budget`` bytes; if none fits, that of fewest."""
    plans = product(MODES, repeat=len(costs))
    choices = [weigh(plan, costs) for plan in plans]
    fitting = [choice for choice in choices if choice.bytes <= budget]
    if not fitting:
        return min(choices, key=lambda choice: (choice.bytes, choice.work))
    return min(fitting, key=lambda choice: (choice.work, choice.bytes))


def weigh(plan: RecomputePlan, costs: Costs) -> Choice:
    """The bytes and the work of a plan."""
    kept, peak, work = 0, 0, 0.0
    for mode, part_costs in zip(plan, costs, strict=True):
        cost = part_costs[mode]
        # While a part runs backward, the later parts have been freed.
        peak = max(peak, kept + cost.peak)
        kept += cost.kept
        work += cost.work
    return Choice(plan, peak, work / sum(part_costs["none"].work for part_costs in costs))


def measure_parts(
    make_model: Callable[[], nn.Module], shape: Sequence[int], precision: torch.dtype | None = None
) -> Costs:
    """Measure each part of a ``Trunk`` in each mode.

    Args:
        shape: [B, C, D, H, W] of clips without padding; padded clips keep no more.
        precision: the dtype of autocast, if any.

    Raises:
        ModelError: the model has no parts to recompute.
    """
    costs: list[dict[Recompute, Cost]] = []
    with FakeTensorMode():
        model = make_model()
        if not isinstance(model, Trunk):
            raise ModelError(
                f"{type(model).__name__} has no parts that can be recomputed",
                where="model.activation_memory",
                fix="Leave this setting out for this model.",
            )
        for parameter in model.parameters():
            # The budget covers activations, not gradients of parameters.
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        x = torch.empty(shape)
        for steps in model.parts()[0]:
            measured = {mode: _measure(mode, steps, x, precision) for mode in MODES}
            costs.append({mode: cost for mode, (cost, _) in measured.items()})
            shape, dtype = measured["none"][1]
            x = torch.empty(shape, dtype=dtype).requires_grad_()
    return costs


def _measure(
    mode: Recompute, steps: Sequence[Step], x: Tensor, precision: torch.dtype | None
) -> tuple[Cost, tuple[torch.Size, torch.dtype]]:
    """The cost, and the shape and dtype of the output."""
    with _Meter() as meter:
        meter.note(x)
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            y = run_part(mode, steps, x)
        output, edge = (y.shape, y.dtype), get_gradient_edge(y)
        # The output counts for the next part, as its input.
        kept = meter.live - y.untyped_storage().nbytes()
        gradient = torch.empty_like(y)
        del y
        torch.autograd.backward([edge], [gradient])
        x.grad = None
    return Cost(kept, meter.peak, meter.work), output


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the work, and the live bytes of tensors made inside this context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.work = 0.0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        storages = {t.untyped_storage()._cdata for t in inputs}
        # The other outputs are views of an input, or an input updated in place.
        new = [t for t in outputs if t.untyped_storage()._cdata not in storages]
        for tensor in new:
            self.note(tensor)
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            self.work += flops / OPERATIONS_A_BYTE
        if new:
            self.work += sum(t.numel() * t.element_size() for t in (*inputs, *new))
        return result

    def note(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def in_units(size: float) -> str:
    """Bytes as text, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
