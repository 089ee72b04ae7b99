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
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scaling_model import Link, Projection, assumptions, doubts, link_of, project

from dist_train.data.store.build import prepare_npz

RANK = Path(__file__).with_name("scaling_rank.py")
#: Clips of a rank at a step in weak scaling, and the fewest in strong scaling: 1 positive, 3
#: negatives.
CLIPS = 4
#: Steps of each run that are not counted: two with checks, and one after them.
WARM_UP = 3
PROJECTED = (1, 2, 4, 8, 16, 32, 64, 128)
#: What a step is made of, as the tables name it and as the figures do.
PARTS = {
    "data": "data_s",
    "compute": "compute_s",
    "wait": "wait_s",
    "statistics": "statistics_s",
    "gradients": "gradients_s",
    "rest": "rest_s",
}

Parts = dict[str, Any]


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
    arguments = parser.parse_args()
    worlds = sorted({1, *arguments.worlds})
    cuda = torch.cuda.is_available()
    if cuda and max(worlds) > torch.cuda.device_count():
        parser.error(f"--worlds: there are only {torch.cuda.device_count()} CUDA devices")
    workload = Workload(
        arguments.model,
        arguments.width,
        arguments.frames,
        arguments.side,
        steps=4 if arguments.quick else arguments.steps,
        precision="bf16" if cuda else "fp32",
    )
    with tempfile.TemporaryDirectory(prefix="bench_scaling.") as folder:
        cases = measure(Path(folder), workload, worlds)
    # Ranks on CPUs share the cores that this process may use.
    processors = max(worlds) if cuda else len(os.sched_getaffinity(0))
    result = evaluate(cases, worlds, processors, arguments.bandwidth, arguments.latency)
    result |= {
        "workload": asdict(workload),
        "device": "cuda" if cuda else "cpu",
        "versions": {"torch": torch.__version__},
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(cases_table(result))
    if result["projection"]:
        console.print(projection_table(result))
    for line in result["notes"]:
        console.print(f"- {line}", highlight=False)


def say(what: str) -> None:
    print(f"== {what}", file=sys.stderr, flush=True)


# --- what is run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model, clips of ``frames`` x ``side`` x ``side``, and how many steps are counted."""

    model: str
    width: int
    frames: int
    side: int
    steps: int
    precision: str


@dataclass(frozen=True, order=True)
class Case:
    """So many processes, each with so many clips at a step."""

    world: int
    clips: int

    @property
    def batch(self) -> int:
        return self.world * self.clips

    def __str__(self) -> str:
        return f"{self.world}x{self.clips}"


def weak(world: int) -> Case:
    return Case(world, CLIPS)


def strong(world: int, worlds: Sequence[int]) -> Case:
    """The same global batch at every world size."""
    return Case(world, CLIPS * math.lcm(*worlds) // world)


def measure(folder: Path, workload: Workload, worlds: Sequence[int]) -> dict[Case, Parts]:
    cases = {case for world in worlds for case in (weak(world), strong(world, worlds))}
    return {case: measured(folder, workload, case) for case in sorted(cases)}


def measured(folder: Path, workload: Workload, case: Case) -> Parts:
    """Start the processes of a case, each on a core of its own as far as there are enough."""
    say(f"processes x clips: {case}")
    steps = WARM_UP + workload.steps
    store = folder / f"store-{case.batch}"
    if not store.exists():
        make_store(store, workload, steps * case.batch)
    cuda = torch.cuda.is_available()
    out = folder / str(case)
    out.mkdir()
    settings = {
        "store": store,
        "out": out,
        "clip.size": [workload.side, workload.side],
        "plan.batch": case.batch,
        # A rank on a core has no other for its loader.
        "loader.workers": 2 if cuda else 0,
        "model.name": workload.model,
        "model.width": workload.width,
        "train.epochs": 1,
        "train.precision": workload.precision,
        "train.device": "cuda" if cuda else "cpu",
        "checkpoint.every_steps": steps,
    }
    cores = sorted(os.sched_getaffinity(0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    with ExitStack() as stack:
        for rank in range(case.world):
            task = {
                "settings": [f"{name}={value}" for name, value in settings.items()],
                "core": None if cuda else cores[rank % len(cores)],
                "warm_up": WARM_UP,
                "out": str(folder / f"{case}.json"),
            }
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": case.world,
                "LOCAL_WORLD_SIZE": case.world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4") if cuda else 1,
            }
            log = stack.enter_context((folder / f"{case}.{rank}.log").open("w+b"))
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(RANK), json.dumps(task)],
                    env=os.environ | {name: str(value) for name, value in place.items()},
                    stdout=log,
                    stderr=log,
                )
            )
        failed = first_failure(ranks)
        if failed is not None:
            text = (folder / f"{case}.{failed}.log").read_text(errors="replace")
            sys.exit(f"error: process {failed} of {case.world} failed:\n{text[-3000:]}")
    parts: Parts = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))
    return parts


def first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all of them; where one fails, end the others, which would wait for it."""
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            failed = [number for number, code in enumerate(codes) if code]
            if failed or None not in codes:
                return failed[0] if failed else None
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def make_store(folder: Path, workload: Workload, clips: int) -> None:
    """A store whose epoch is ``clips`` long: noise, and a bright middle in the positives."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, positives in (("train", clips // 4), ("val", 1), ("test", 1)):
        labels = np.repeat([1, 0, 0, 0], positives)
        shape = (len(labels), workload.frames, workload.side, workload.side)
        images = rng.integers(0, 120, shape, dtype=np.uint8)
        middle = slice(workload.side // 3, 2 * workload.side // 3)
        images[:positives, :, middle, middle] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    source = folder.with_suffix(".npz")
    np.savez(source, **arrays)
    prepare_npz(source, folder)
    source.unlink()


# --- the figures ----------------------------------------------------------------------------------


def evaluate(
    cases: dict[Case, Parts],
    worlds: Sequence[int],
    processors: int,
    bandwidth: float | None,
    latency: float | None,
) -> dict[str, Any]:
    """Efficiencies, a projection, and what a reader must know of them.

    Args:
        processors: cores or GPUs that ranks run on.
        bandwidth: GB/s of the links of the projection; None: as measured.
        latency: their microseconds; None: as measured.
    """
    lines: list[dict[str, Any]] = []
    for scaling, alone in (("weak", weak(1)), ("strong", strong(1, worlds))):
        for world in worlds:
            case = weak(world) if scaling == "weak" else strong(world, worlds)
            rate, rate_alone = (c.batch / cases[c]["step_s"] for c in (case, alone))
            lines.append(
                {
                    "scaling": scaling,
                    "case": str(case),
                    "processes": world,
                    "clips_per_second": rate,
                    "efficiency": rate / rate_alone / min(world, processors),
                }
            )
    notes: list[str] = []
    measured: dict[str, float] = {}
    if max(worlds) > processors:
        notes.append(
            f"Only {processors} cores are here: more processes share them, and their efficiency is "
            f"taken against {processors} times one process."
        )
    projection: list[Projection] = []
    # Where ranks share a core, none of them is as it would be on a machine of its own.
    apart = [weak(world) for world in worlds if 1 < world <= processors]
    if apart:
        basis = cases[apart[-1]]
        between = link_of(basis)
        measured = {
            "link_gb_per_second": between.bandwidth / 1e9,
            "link_latency_us": between.latency * 1e6,
        }
        link = given_link(between, bandwidth, latency)
        why = doubts(basis)
        if why:
            notes.append(
                f"No projection from {apart[-1]}: {'; '.join(why)}. Measure on an idle machine, "
                "with more --steps."
            )
        else:
            projection = [project(basis, link, ranks) for ranks in PROJECTED]
            notes += assumptions(basis, link)
        for line in lines:
            if projection and line["processes"] > 1:
                line["predicted_s"] = predicted(basis, cases, line)
    summary = {
        f"efficiency_{line['scaling']}_{line['processes']}": line["efficiency"]
        for line in lines
        if line["processes"] > 1
    }
    summary |= measured | {
        f"projected_{there.ranks}": projection[0].step / there.step for there in projection[1:]
    }
    return {
        "summary": summary,
        "lines": lines,
        "projection": [
            asdict(there) | {"step": there.step, "without_overlap": there.without_overlap}
            for there in projection
        ],
        "notes": notes,
        "parts": {str(case): parts for case, parts in cases.items()},
        "processors": processors,
    }


def given_link(measured: Link, bandwidth: float | None, latency: float | None) -> Link:
    return Link(
        measured.latency if latency is None else latency * 1e-6,
        measured.bandwidth if bandwidth is None else bandwidth * 1e9,
    )


def predicted(basis: Parts, cases: dict[Case, Parts], line: dict[str, Any]) -> float:
    """Seconds of a step of a case: its exchange and waiting from ``basis`` and the model, data and
    compute as they were measured in it."""
    own = {str(case): parts for case, parts in cases.items()}[line["case"]]
    known = {name: own[name] for name in ("data_s", "compute_s", "samples_s")}
    return project(basis | known, link_of(basis), line["processes"]).step


# --- the tables -----------------------------------------------------------------------------------


def cases_table(result: dict[str, Any]) -> Table:
    """One column a case."""
    lines = result["lines"]
    parts = [result["parts"][line["case"]] for line in lines]
    table = Table(
        title="{model} of width {width}, clips of {frames}x{side}x{side}, {precision}; "
        "milliseconds of a step".format(**result["workload"])
    )
    table.add_column("ranks x clips of each")
    for line in lines:
        table.add_column(f"{line['scaling']}\n{line['case']}", justify="right")
    table.add_row("clips/s", *(f"{line['clips_per_second']:.1f}" for line in lines))
    table.add_row("efficiency", *(f"{line['efficiency']:.2f}" for line in lines))
    table.add_section()
    table.add_row("step", *(milliseconds(of_case["step_s"]) for of_case in parts))
    for label, name in PARTS.items():
        table.add_row(f"  {label}", *(milliseconds(of_case[name]) for of_case in parts))
    table.add_section()
    predictions = (line.get("predicted_s") for line in lines)
    table.add_row("step by the model", *("" if p is None else milliseconds(p) for p in predictions))
    return table


def projection_table(result: dict[str, Any]) -> Table:
    """One column a number of ranks."""
    projection = result["projection"]
    alone = projection[0]["step"]
    table = Table(title="projected, weak scaling; milliseconds of a step")
    table.add_column("ranks")
    for there in projection:
        table.add_column(str(there["ranks"]), justify="right")
    table.add_row("step", *(milliseconds(there["step"]) for there in projection))
    for part in PARTS:
        table.add_row(f"  {part}", *(milliseconds(there[part]) for there in projection))
    table.add_section()
    table.add_row("efficiency", *(f"{alone / there['step']:.2f}" for there in projection))
    without = (f"{alone / there['without_overlap']:.2f}" for there in projection)
    table.add_row("  nothing hidden", *without)
    return table


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 1 else f"{1e3 * seconds:.1f}"


if __name__ == "__main__":
    main()
