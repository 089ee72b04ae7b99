"""What each mode of recomputing keeps for the backward pass, and what it costs in time.

Kept bytes are counted by hooks on saved tensors, each storage once, without weights and buffers, in
a forward pass of tensors without data; peak bytes come from the package's own estimate. Time is of
forward and backward passes, all four modes in turn. benchmarks/recompute.md explains the results.

    python tools/bench_recompute.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring import CPU, finish, in_turns, new_table, options, say, seconds, versions
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from dist_train.models.activation_budget import measure_parts, weigh
from dist_train.models.recompute import Recompute
from dist_train.models.resnet3d import ResNet3D

MODES: tuple[Recompute, ...] = ("none", "cheap", "block", "stage")


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = options(__doc__, "time 1 x 16 x 64 x 64, for 2 rounds")
    parser.add_argument("--depth", type=int, default=101, help="layers of the ResNet")
    axes = ("CLIPS", "FRAMES", "HEIGHT", "WIDTH")
    parser.add_argument("--shape", type=int, nargs=4, default=(4, 64, 160, 160), metavar=axes)
    parser.add_argument(
        "--timed",
        type=int,
        nargs=4,
        metavar=axes,
        help="shape of the timed clips; default on CUDA the same, on a CPU 1 64 160 160",
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16" if cuda else "fp32")
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.timed is None:
        arguments.timed = arguments.shape if cuda else (1, 64, 160, 160)
    if arguments.quick:
        arguments.timed, arguments.rounds = (1, 16, 64, 64), 2
    result = measure(arguments, torch.device("cuda" if cuda else "cpu"))
    finish(arguments.json, result, as_table(result))


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    bfloat16 = arguments.precision == "bf16"
    say("counting bytes")
    with FakeTensorMode():
        # Only shapes and dtypes matter, so the device does not.
        fake = Bench(arguments.depth, arguments.shape, CPU, bfloat16=bfloat16)
        kept = {mode: fake.kept_bytes(mode) for mode in MODES}
    clips, *size = arguments.shape
    costs = measure_parts(
        partial(ResNet3D, arguments.depth), (clips, 1, *size), torch.bfloat16 if bfloat16 else None
    )
    peaks = {mode: weigh((mode, mode, mode, mode, mode), costs).bytes for mode in MODES}
    bench = Bench(arguments.depth, arguments.timed, device, bfloat16=bfloat16)
    say("warming up")
    for mode in MODES:
        bench.seconds(mode)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in in_turns(MODES, arguments.rounds):
        times[mode].append(bench.seconds(mode))
    ratios = {mode: kept[mode] / kept["none"] for mode in MODES}

    def slower(mode: str) -> float:
        """Median over rounds of the time relative to "none" in the same round."""
        return median(a / b for a, b in zip(times[mode], times["none"], strict=True))

    return {
        "summary": {
            "full_bytes_ratio": min(ratios["block"], ratios["stage"]),
            **{f"{mode}_bytes_ratio": ratios[mode] for mode in MODES[1:]},
            **{f"{mode}_time_ratio": slower(mode) for mode in MODES[1:]},
        },
        "kept_bytes": kept,
        "peak_bytes": peaks,
        "seconds": times,
        "case": {
            "depth": arguments.depth,
            "shape": list(arguments.shape),
            "timed": list(arguments.timed),
            "precision": arguments.precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
        "versions": versions("torch"),
    }


class Bench:
    """Forward and backward pass of a training step, in any mode."""

    def __init__(
        self, depth: int, shape: Sequence[int], device: torch.device, *, bfloat16: bool
    ) -> None:
        torch.manual_seed(0)
        clips, *size = shape
        with device:
            self.clips = torch.rand(clips, 1, *size)
            self.model = ResNet3D(depth)
        self.bfloat16 = bfloat16
        # The layout in which bf16 is fast. Tensors without data cannot take it, and need not.
        if bfloat16 and not isinstance(self.clips, FakeTensor):
            layout = torch.channels_last_3d
            self.clips = self.clips.to(memory_format=layout)
            self.model = self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.own = set(map(storage_id, (*self.model.parameters(), *self.model.buffers())))

    def forward(self, mode: Recompute) -> Tensor:
        self.model.recompute = mode
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.clips.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits: Tensor = self.model(self.clips)
        return logits.square().mean()

    def kept_bytes(self, mode: Recompute) -> int:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[storage_id(tensor)] = tensor
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward(mode)
        assert loss.requires_grad
        return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in self.own)

    def seconds(self, mode: Recompute) -> float:
        return seconds(lambda: self.forward(mode).backward(), self.clips.device)  # type: ignore[no-untyped-call]


def storage_id(tensor: Tensor) -> int:
    """Identity of a tensor's storage, also of a tensor without data."""
    return int(tensor.untyped_storage()._cdata)


def as_table(result: dict[str, Any]) -> Table:
    case, kept, times = result["case"], result["kept_bytes"], result["seconds"]
    shape, timed = (" x ".join(map(str, case[name])) for name in ("shape", "timed"))
    table = new_table(
        f"ResNet-{case['depth']}, {case['precision']}: kept at {shape}; "
        f"timed at {timed} on {case['device']}",
        *("recompute", "kept", "of none", "at once", "time", "of none", "goal"),
    )
    goals = {"cheap": f"<= 60 %, {112 if case['device'] == 'cpu' else 105} %", "stage": "<= 15 %"}
    for mode in MODES:
        slower = 1.0 if mode == "none" else result["summary"][f"{mode}_time_ratio"]
        table.add_row(
            mode,
            f"{kept[mode] / 2**30:.3f} GiB",
            f"{kept[mode] / kept['none']:.1%}",
            f"{result['peak_bytes'][mode] / 2**30:.2f} GiB",
            f"{median(times[mode]):.2f} s",
            f"{slower:.1%}",
            goals.get(mode, ""),
        )
    return table


if __name__ == "__main__":
    main()
