"""Where the time of a training step goes: a trace, and the slowest kernels.

    python tools/profile_step.py [--config FILE] [key=value ...] [--out DIR]

The trace opens at https://ui.perfetto.dev. Clips are noise, so no store is needed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import Marks, Row, make_batch
from measuring import new_table, synchronize
from rich.console import Console
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dist_train.config import load_config
from dist_train.data.loading.collate import Batch
from dist_train.errors import DistTrainError

TRACE = "trace.json.gz"


class Named(Marks):
    """Marks that name the parts of a step in the trace."""

    NAMES = ("forward", "backward", "optimizer")

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.open: Any = None

    def mark(self) -> None:
        if self.open is not None:
            self.open.__exit__(None, None, None)
            self.open = None
        if len(self.points) < len(self.NAMES):
            self.open = record_function(self.NAMES[len(self.points)])
            self.open.__enter__()
        super().mark()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="settings of a run; default: the defaults")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings on top of them")
    parser.add_argument("--clips", type=int, default=4, help="of a step (default 4)")
    parser.add_argument("--frames", type=int, help="of a clip; default 16 on a CPU, else 60")
    parser.add_argument("--steps", type=int, default=2, help="in the trace (default 2)")
    parser.add_argument("--top", type=int, default=20, help="rows of the table (default 20)")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"), help="trace's folder")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    frames = arguments.frames or (60 if cuda else 16)
    # No store is read.
    settings = [each for each in arguments.settings if not each.startswith("store=")]
    try:
        config = load_config(arguments.config, [*settings, "store=none"])
        row = Row(config)
    except DistTrainError as error:
        raise SystemExit(f"error: {error}") from None
    batch = make_batch(np.full(arguments.clips, frames), config, cuda=cuda)
    profiled = profile_steps(row, batch, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trace = arguments.out / TRACE
    profiled.export_chrome_trace(str(trace))
    rows = top_kernels(profiled.key_averages(), cuda=cuda, steps=arguments.steps)
    calls = host_calls(profiled.key_averages(), steps=arguments.steps)
    net = f"{config.model.name}, {arguments.clips} clips of {frames} frames"
    table = new_table(
        f"{net}, {row.device}", "kernel or operation", "calls a step", "ms a step", "share"
    )
    for name, count, milliseconds, share in rows[: arguments.top]:
        table.add_row(name[:70], str(count), f"{milliseconds:.2f}", f"{share:.1%}")
    Console().print(table)
    if cuda:
        print("host calls a step: {launches} launches, {waits} waits".format(**calls))
    print(f"trace: {trace} (open it at https://ui.perfetto.dev)")


def profile_steps(row: Row, batch: Batch, steps: int) -> profile:
    """Profile steps of a row after warming it up."""
    row.warm_up(batch)
    cuda = row.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiled = profile(activities=activities)
    with profiled:
        for _ in range(steps):
            row.step(batch, Named(row.device))
        synchronize(row.device)
    return profiled


def top_kernels(
    events: Iterable[Any], *, cuda: bool, steps: int
) -> list[tuple[str, int, float, float]]:
    """Name, calls a step, ms a step and share of each kernel, or of each operation on a CPU.

    Times do not include the operations that an operation calls.

    Args:
        events: averages by name, as ``profile.key_averages`` gives them.
    """
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [
        (event.key, event.count, float(getattr(event, own)))
        for event in events
        # On CUDA an operation repeats the time of its kernels, which are events themselves.
        if event.key not in Named.NAMES and (event.device_type == DeviceType.CUDA) == cuda
    ]
    total = sum(time for *_, time in found) or 1.0
    rows = [(name, count // steps, t / steps / 1e3, t / total) for name, count, t in found]
    return sorted(rows, key=lambda row: -row[2])


def host_calls(events: Iterable[Any], *, steps: int) -> dict[str, float]:
    """How often a step launches kernels or graphs, and how often the host waits for the device.

    ``cudaDeviceSynchronize`` is not counted, as only the profiler calls it.
    """
    found = {"launches": 0, "waits": 0}
    for event in events:
        if re.match(r"cu(da)?(Launch|GraphLaunch)", event.key):
            found["launches"] += event.count
        elif re.match(r"cu(da)?((Stream|Event)Synchronize|Memcpy)$", event.key):
            found["waits"] += event.count
    return {name: count / steps for name, count in found.items()}


if __name__ == "__main__":
    main()
