"""How training speeds up with processes, where a step's time goes, and what N ranks would do.

Trains a 3D ResNet on synthetic clips with 1, 2 and 4 processes, by gloo on CPUs and NCCL on CUDA:
the package's own loop for clips a second, and then the same step taken apart. Measured parts and a
model of the exchange give a projection. benchmarks/scaling.md says how to read the figures.

    python tools/bench_scaling.py [--worlds 1 2 4] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import Config, load_config
from dist_train.data.collate import Batch
from dist_train.data.loader import Loader
from dist_train.data.prepare import prepare_npz
from dist_train.data.sampler import PlanSampler
from dist_train.engine.backends import make_backend
from dist_train.engine.backends.base import Backend
from dist_train.models.norm import share_statistics
from dist_train.run import as_input
from dist_train.train import Trainer

#: Clips of a rank at a step in weak scaling, and least in strong scaling: 1 positive, 3 negatives.
CLIPS = 4
#: Steps of each run that are not counted.
WARM_UP = 3
#: Bytes of DDP's buckets of gradients (torch's default).
BUCKET = 25 * 2**20
#: Bytes of the all-reduces that latency and bandwidth of a link are taken from.
SMALL, LARGE = 64, 2**24
PROJECTED = (1, 2, 4, 8, 16, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4")
    parser.add_argument("--model", default="resnet3d-18", help="default resnet3d-18")
    parser.add_argument("--width", type=int, default=32, help="of the model (default 32)")
    parser.add_argument("--frames", type=int, default=16, help="of a clip (default 16)")
    parser.add_argument("--side", type=int, default=64, help="of a frame, in pixels (default 64)")
    parser.add_argument("--steps", type=int, default=12, help="that are counted (default 12)")
    parser.add_argument("--quick", action="store_true", help="4 steps")
    parser.add_argument("--bandwidth", type=float, help="GB/s of a link, for the projection")
    parser.add_argument("--latency", type=float, help="microseconds of a link, for the projection")
    parser.add_argument("--json", type=Path, help="write the figures there, under 'summary'")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        be_a_rank(json.loads(arguments.rank_of))
        return
    worlds = sorted({1, *arguments.worlds})
    if torch.cuda.is_available() and max(worlds) > torch.cuda.device_count():
        parser.error(f"--worlds: there are {torch.cuda.device_count()} CUDA devices")
    steps = 4 if arguments.quick else arguments.steps
    workload = Workload(
        arguments.model, arguments.width, arguments.frames, arguments.side, steps
    )
    with tempfile.TemporaryDirectory(prefix="bench_scaling.") as folder:
        result = measure(Path(folder), workload, worlds, arguments.bandwidth, arguments.latency)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for what in (split_table(result), projection_table(result), *result["assumptions"]):
        Console().print(what, highlight=False)


@dataclass(frozen=True)
class Workload:
    """What is trained: a model, clips of ``frames`` x ``side`` x ``side``, and for how long."""

    model: str
    width: int
    frames: int
    side: int
    steps: int


@dataclass(frozen=True)
class Case:
    """So many processes, each with so many clips at a step."""

    world: int
    clips: int

    @property
    def batch(self) -> int:
        return self.world * self.clips


def measure(
    folder: Path,
    workload: Workload,
    worlds: Sequence[int],
    bandwidth: float | None,
    latency: float | None,
) -> dict[str, Any]:
    batch = CLIPS * math.lcm(*worlds)
    weak = {world: Case(world, CLIPS) for world in worlds}
    strong = {world: Case(world, batch // world) for world in worlds}
    cases = {}
    for case in sorted({*weak.values(), *strong.values()}, key=lambda case: (case.world, case.clips)):
        say(f"{case.world} processes x {case.clips} clips")
        cases[case] = run_case(folder, workload, case)
    cores = cores_in_use()
    rows = [
        row(kind, case, cases[case], cases[of_world[1]], cores)
        for kind, of_world in (("weak", weak), ("strong", strong))
        for case in of_world.values()
    ]
    # Where ranks share a core, none of them is as it would be on a machine of its own.
    apart = max(world for world in worlds if world <= cores)
    projection: list[dict[str, float]] = []
    assumptions = ["No projection: it takes 2 processes that share no core."]
    if apart > 1:
        link = Link.measured(cases[weak[apart]], bandwidth, latency)
        own_link = Link.measured(cases[weak[apart]], None, None)
        basis = cases[weak[apart]]
        for line in rows:
            if line["processes"] > 1:
                line["predicted_s"] = projected(
                    cases[Case(line["processes"], line["clips"])],
                    basis,
                    own_link,
                    line["processes"],
                )
        projection = [project(basis, link, ranks) for ranks in PROJECTED]
        assumptions = assumptions_of(basis, link, apart)
    summary: dict[str, float] = {}
    for line in rows:
        if line["processes"] > 1:
            summary[f"efficiency_{line['scaling']}_{line['processes']}"] = line["efficiency"]
    for line in projection:
        summary[f"projected_{line['ranks']:.0f}"] = line["efficiency"]
    return {
        "summary": summary,
        "cases": rows,
        "projection": projection,
        "assumptions": assumptions,
        "parts": {f"{case.world}x{case.clips}": parts for case, parts in cases.items()},
        "workload": asdict(workload),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cores": cores,
        "versions": {"torch": torch.__version__},
    }
