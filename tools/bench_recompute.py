"""What each mode of recomputing keeps for the backward pass, and what it costs in time.

What is kept is counted by hooks on saved tensors, each piece of memory once, without weights and
buffers, in a forward pass of tensors without data; so is what is alive at once. Time is that of
forward and backward passes, of all four modes in turn, for several rounds. benchmarks/recompute.md
says how to read the figures.

    python tools/bench_recompute.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring import finish, options, say, synchronize
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
        help="shape of the clips that are timed; on CUDA the same, on a CPU 1 64 160 160",
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
    say("counting what is kept")
    with FakeTensorMode():
        # On any device the same: only shapes and dtypes matter.
        fake = Bench(arguments.depth, arguments.shape, torch.device("cpu"), bfloat16=bfloat16)
        kept = {mode: fake.kept_bytes(mode) for mode in MODES}
    say("counting what is alive at once")
    clips, *size = arguments.shape
    costs = measure_parts(
        partial(ResNet3D, arguments.depth), (clips, 1, *size), torch.bfloat16 if bfloat16 else None
    )
    peaks = {mode: weigh((mode, mode, mode, mode, mode), costs).bytes for mode in MODES}
    bench = Bench(arguments.depth, arguments.timed, device, bfloat16=bfloat16)
    say("warming up")
    for mode in MODES:
        bench.seconds(mode)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(arguments.rounds):
        say(f"round {number + 1} of {arguments.rounds}")
        # Each round begins elsewhere, so that no mode always comes after the same one.
        turn = number % len(MODES)
        for mode in MODES[turn:] + MODES[:turn]:
            seconds[mode].append(bench.seconds(mode))

    def slower(mode: str) -> float:
        """The median over rounds of the time against that of "none" in the same round."""
        return median(a / b for a, b in zip(seconds[mode], seconds["none"], strict=True))

    return {
        "summary": {
            "full_bytes_ratio": min(kept[mode] / kept["none"] for mode in ("block", "stage")),
            "block_bytes_ratio": kept["block"] / kept["none"],
            "stage_bytes_ratio": kept["stage"] / kept["none"],
            "cheap_bytes_ratio": kept["cheap"] / kept["none"],
            "cheap_time_ratio": slower("cheap"),
            "block_time_ratio": slower("block"),
            "stage_time_ratio": slower("stage"),
        },
        "kept_bytes": kept,
        "peak_bytes": peaks,
        "seconds": seconds,
        "case": {
            "depth": arguments.depth,
            "shape": list(arguments.shape),
            "timed": list(arguments.timed),
            "precision": arguments.precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
        "versions": {"torch": torch.__version__},
    }


class Bench:
    """One training step, without the optimizer's, in any mode."""

    def __init__(
        self, depth: int, shape: Sequence[int], device: torch.device, *, bfloat16: bool
    ) -> None:
        torch.manual_seed(0)
        clips, *size = shape
        with device:
            self.clips = torch.rand(clips, 1, *size)
            self.model = ResNet3D(depth)
        self.bfloat16 = bfloat16
        # What bf16 is fast in. Tensors without data cannot be put into it, nor need to be.
        if bfloat16 and not isinstance(self.clips, FakeTensor):
            layout = torch.channels_last_3d
            self.clips = self.clips.to(memory_format=layout)
            self.model = self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.own = set(map(place, (*self.model.parameters(), *self.model.buffers())))

    def forward(self, mode: Recompute) -> Tensor:
        self.model.recompute = mode
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.clips.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits: Tensor = self.model(self.clips)
        return logits.square().mean()

    def kept_bytes(self, mode: Recompute) -> int:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[place(tensor)] = tensor
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward(mode)
        assert loss.requires_grad
        return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in self.own)

    def seconds(self, mode: Recompute) -> float:
        synchronize(self.clips.device)
        began = time.perf_counter()
        self.forward(mode).backward()  # type: ignore[no-untyped-call]
        synchronize(self.clips.device)
        return time.perf_counter() - began


def place(tensor: Tensor) -> int:
    """Identity of the memory that a tensor is a view of, also of one without data."""
    return int(tensor.untyped_storage()._cdata)


def as_table(result: dict[str, Any]) -> Table:
    case, kept, seconds = result["case"], result["kept_bytes"], result["seconds"]
    shape, timed = (" x ".join(map(str, case[name])) for name in ("shape", "timed"))
    table = Table(
        title=f"ResNet-{case['depth']}, {case['precision']}: kept at {shape}; "
        f"timed at {timed} on {case['device']}"
    )
    for heading in ("recompute", "kept", "of none", "at once", "time", "of none", "goal"):
        table.add_column(heading, justify="left" if heading == "recompute" else "right")
    cuda = case["device"] != "cpu"
    goals = {"cheap": f"<= 60 %, {105 if cuda else 112} %", "stage": "<= 15 %"}
    for mode in MODES:
        slower = 1.0 if mode == "none" else result["summary"][f"{mode}_time_ratio"]
        table.add_row(
            mode,
            f"{kept[mode] / 2**30:.3f} GiB",
            f"{kept[mode] / kept['none']:.1%}",
            f"{result['peak_bytes'][mode] / 2**30:.2f} GiB",
            f"{median(seconds[mode]):.2f} s",
            f"{slower:.1%}",
            goals.get(mode, ""),
        )
    return table


if __name__ == "__main__":
    main()
