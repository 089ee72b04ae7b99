"""Models by name: parameters, FLOPs of a clip, clips/s of a training step, and its memory.

FLOPs are those of a forward pass of one clip, counted from shapes. A step is a forward and backward
pass of a batch, without the optimizer, in bf16 where the device computes it, else in float32. Each
model runs in its own process. benchmarks/models.md explains the results.

    python tools/bench_models.py [--models A,B] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bench_step import peak_memory
from measuring import finish, new_table, options, say, seconds, versions, write_results
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode

from dist_train.distributed.hardware import lacks_bf16
from dist_train.errors import DistTrainError
from dist_train.models.registry import MODELS, build_model, find_model

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """What every model runs.

    Attributes:
        shape: frames, height and width of a clip, of one channel.
        batch: clips of a step.
        bf16: of autocast; else float32.
        device: "cuda" or "cpu".
        steps: how many are timed, after one that is not.
    """

    shape: Shape
    batch: int
    bf16: bool
    device: str
    steps: int


@dataclass(frozen=True)
class Row:
    """A model's figures.

    Attributes:
        step_s: seconds of each timed step.
        peak_bytes: on CUDA the most that the allocator reserved, weights and gradients included; on
            a CPU what the process grew by, from before the model was made to the peak of a step.
    """

    parameters: int
    flops: int
    step_s: list[float]
    peak_bytes: int


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = options(__doc__, "clips of 8 x 64 x 64, 2 of them, one timed step")
    parser.add_argument("--models", help="names with commas between them; default all registered")
    axes = ("FRAMES", "HEIGHT", "WIDTH")
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 112, 112), metavar=axes)
    parser.add_argument("--batch", type=int, default=32 if cuda else 4)
    parser.add_argument("--steps", type=int, default=20 if cuda else 5, help="that are timed")
    arguments = parser.parse_args()
    names = arguments.models.split(",") if arguments.models else list(MODELS)
    for name in names:
        try:
            find_model(name)
        except DistTrainError as error:
            parser.error(str(error))
    if arguments.quick:
        arguments.shape, arguments.batch, arguments.steps = (8, 64, 64), 2, 1
    case = Case(
        shape=tuple(arguments.shape),
        batch=arguments.batch,
        bf16=cuda or not lacks_bf16(),
        device="cuda" if cuda else "cpu",
        steps=arguments.steps,
    )
    result = measure(names, case, arguments)
    finish(arguments.json, result, as_table(result))


def measure(names: Sequence[str], case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """All models, one after the other. The results are written after each of them."""
    result: dict[str, Any] = {
        "models": {},
        "failed": {},
        "case": asdict(case),
        "machine": {
            "device": torch.cuda.get_device_name() if case.device == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": versions("torch", "monai", "timm"),
    }
    spawn = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    for name in names:
        say(name)
        # A process that has run nothing before: what it grows by is the model's.
        with ProcessPoolExecutor(1, spawn, torch.set_num_threads, threads) as pool:
            try:
                row = pool.submit(run, name, case).result()
            except Exception as error:  # the other models still run
                result["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                rate = case.batch / statistics.median(row.step_s)
                result["models"][name] = asdict(row) | {"clips_per_s": rate}
        write_results(arguments.json, result)
    return result


def run(name: str, case: Case) -> Row:
    """Count and time a model, in this process."""
    flops = forward_flops(name, case.shape)
    device = torch.device(case.device)
    with peak_memory(device) as peak:
        torch.manual_seed(0)
        model = build_model(name).to(device)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 5:
                tensor.data = tensor.data.to(memory_format=torch.channels_last_3d)
        clips = torch.rand(case.batch, 1, *case.shape, device=device)
        clips = clips.to(memory_format=torch.channels_last_3d)
        labels = (torch.arange(case.batch, device=device) % 4 == 0).float()

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(case.device, torch.bfloat16, enabled=case.bf16):
                logits = model(clips, None)
            binary_cross_entropy_with_logits(logits, labels).backward()  # type: ignore[no-untyped-call]

        step()
        times = [seconds(step, device) for _ in range(case.steps)]
    return Row(sum(p.numel() for p in model.parameters()), flops, times, peak[0])


def forward_flops(name: str, shape: Shape) -> int:
    """FLOPs (a multiplication and an addition are two) of one clip, in eval mode; nothing is
    computed."""
    # timm's networks make tensors of the meta device, too.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(name).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 1, *shape), None)
    return int(counter.get_total_flops())


def as_table(result: dict[str, Any]) -> Table:
    case = result["case"]
    shape = " x ".join(map(str, case["shape"]))
    precision = "bf16" if case["bf16"] else "float32"
    table = new_table(
        f"Clips of {shape}, steps of {case['batch']}, {precision}, {result['machine']['device']}",
        *("model", "parameters, M", "GFLOPs a clip", "clips/s", "peak, GiB"),
    )
    for name, row in result["models"].items():
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['clips_per_s']:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
        )
    table.caption = "\n".join(f"{name}: {reason}" for name, reason in result["failed"].items())
    return table


if __name__ == "__main__":
    main()
