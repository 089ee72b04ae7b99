"""Batch normalisation with sum and ReLU: the compiled loops of `norm.fused` against torch's own.

Every kind of normalisation in the network runs alone, forward and backward, in the shape that it
has there, plainly and compiled in turns; the total counts each as often as the network has it.

    python tools/bench_norm.py [--model NAME] [--clips N] [--frames N] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from roofline import DTYPES, synchronize
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_train.models.norm import BatchNorm3d, fuse, norms
from dist_train.models.registry import build_model

WAYS = ("plain_ms", "fused_ms")


class Layer(NamedTuple):
    """Shape [C, D, H, W] of what is normalised, and what comes after it."""

    channels: int
    depth: int
    height: int
    width: int
    plus: bool
    relu: bool

    def __str__(self) -> str:
        after = ("+ sum " if self.plus else "") + ("+ ReLU" if self.relu else "")
        return f"{self.channels} x {self.depth} x {self.height} x {self.width} {after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet3d-101", help="default resnet3d-101")
    parser.add_argument("--clips", type=int, default=4, help="default 4")
    parser.add_argument("--frames", type=int, help="default 16 on a CPU, else 60")
    parser.add_argument("--side", type=int, default=160, help="of a frame, in pixels (default 160)")
    parser.add_argument("--rounds", type=int, default=10, help="default 10")
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    parser.add_argument("--json", type=Path, help="write the figures there, under 'summary'")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    frames = arguments.frames or (60 if cuda else 16)
    layers = layers_of(arguments.model, arguments.clips, frames, arguments.side)
    result = measure(
        layers,
        arguments.clips,
        torch.device("cuda" if cuda else "cpu"),
        DTYPES["bf16" if cuda else "fp32"],
        2 if arguments.quick else arguments.rounds,
    )
    title = f"{arguments.model}, {arguments.clips} clips of {frames} frames"
    Console(width=100).print(as_table(result, title))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def layers_of(model: str, clips: int, frames: int, side: int) -> Counter[Layer]:
    """The normalisations of a network, and how many there are of each kind."""
    found: Counter[Layer] = Counter()

    def note(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        plus, relu = kwargs.get("shortcut") is not None, kwargs.get("relu", False)
        channels, depth, height, width = args[0].shape[1:]
        found[Layer(channels, depth, height, width, plus, relu)] += 1

    with FakeTensorMode(), torch.no_grad():
        net = build_model(model)
        for norm in norms(net):
            norm.register_forward_pre_hook(note, with_kwargs=True)
        net(torch.empty(clips, 1, frames, side, side))
    return found


def measure(
    layers: Counter[Layer], clips: int, device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Median milliseconds of each kind by both ways, and the ratio of their sums."""
    lines: list[dict[str, Any]] = []
    for layer, count in layers.items():
        ways = [pass_of(layer, clips, device, dtype, fused=fused) for fused in (False, True)]
        times: tuple[list[float], list[float]] = [], []
        for number in range(rounds + 1):
            for way, of_way in zip(ways, times, strict=True):
                taken = seconds(way, device)
                # The first one compiles.
                if number:
                    of_way.append(taken)
        plain, fused = (1e3 * statistics.median(of_way) for of_way in times)
        lines.append({"layer": str(layer), "count": count, "plain_ms": plain, "fused_ms": fused})
    plain, fused = (sum(line["count"] * line[way] for line in lines) for way in WAYS)
    return {
        "summary": {"fused_vs_plain": plain / fused, "plain_ms": plain, "fused_ms": fused},
        "layers": lines,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype),
        "versions": {"torch": torch.__version__},
    }


def pass_of(
    layer: Layer, clips: int, device: torch.device, dtype: torch.dtype, *, fused: bool
) -> Callable[[], None]:
    """A pass forward and backward."""
    norm = BatchNorm3d(layer.channels).to(device)
    if fused:
        fuse(norm)
    shape = clips, *layer[:4]
    x, plus, grad = (
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last_3d)
        for _ in range(3)
    )
    inputs = [x.requires_grad_(), *norm.parameters()]
    if layer.plus:
        inputs.append(plus.requires_grad_())

    def run() -> None:
        y = norm(x, shortcut=plus if layer.plus else None, relu=layer.relu)
        torch.autograd.grad(y, inputs, grad)

    return run


def seconds(work: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def as_table(result: dict[str, Any], title: str) -> Table:
    table = Table(title=f"{title}, {result['device']}, {result['dtype']}")
    table.add_column("layer")
    for column in ("layers", "plain ms", "fused ms", "plain / fused"):
        table.add_column(column, justify="right")
    for line in result["layers"]:
        plain, fused = (line[way] for way in WAYS)
        figures = f"{plain:.2f}", f"{fused:.2f}", f"{plain / fused:.2f}"
        table.add_row(line["layer"], str(line["count"]), *figures)
    plain, fused, ratio = (result["summary"][name] for name in (*WAYS, "fused_vs_plain"))
    table.add_section()
    table.add_row("all", "", f"{plain:.0f}", f"{fused:.0f}", f"{ratio:.2f}")
    return table


if __name__ == "__main__":
    main()
