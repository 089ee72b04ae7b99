"""How training speeds up with processes, and where a step's time goes.

Trains a 3D ResNet on synthetic clips with 1, 2 and 4 processes, by gloo on CPUs and NCCL on CUDA:
the package's own loop for clips a second, and then the same step taken apart. benchmarks/scaling.md
says how to read the figures.

    python tools/bench_scaling.py [--worlds 1 2 4] [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import finish, options, say, synchronize
from rich.table import Table
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import load_config
from dist_train.data.loading.collate import Batch
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import PlanSampler
from dist_train.data.store.build import prepare_npz
from dist_train.distributed.backends import make_backend
from dist_train.distributed.backends.base import Backend
from dist_train.models.norm import share_statistics
from dist_train.run.folder import METRICS
from dist_train.run.model import as_input
from dist_train.training.train import begin
from dist_train.training.trainer import Trainer

#: Clips of a rank at a step in weak scaling, and the fewest in strong scaling: 1 positive, 3
#: negatives.
CLIPS = 4
#: Steps of each run that are not counted: two with checks, and one after them.
WARM_UP = 3
#: Bytes of the all-reduces that are timed, the number of times, and bytes of DDP's buckets of
#: gradients (torch's default).
SMALL, LARGE, REPEATS, BUCKET = 64, 2**24, 15, 25 * 2**20
#: What a step is made of; the figures are named "data_s" and so on.
PARTS = ("data", "compute", "wait", "statistics", "gradients", "rest")

Parts = dict[str, Any]


def main() -> None:
    parser = options(__doc__, "4 steps")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4")
    parser.add_argument("--model", default="resnet3d-18", help="default resnet3d-18")
    parser.add_argument("--width", type=int, default=32, help="of the model (default 32)")
    parser.add_argument("--frames", type=int, default=16, help="of a clip (default 16)")
    parser.add_argument("--side", type=int, default=64, help="of a frame, in pixels (default 64)")
    parser.add_argument("--steps", type=int, default=12, help="that are counted (default 12)")
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
    result = evaluate(cases, worlds, processors) | {
        "workload": asdict(workload),
        "device": "cuda" if cuda else "cpu",
        "versions": {"torch": torch.__version__},
    }
    finish(arguments.json, result, as_table(result))
    if max(worlds) > processors:
        print(f"Only {processors} cores: efficiency is against {processors} times one process.")


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
                    [sys.executable, __file__, "--rank", json.dumps(task)],
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


def evaluate(cases: dict[Case, Parts], worlds: Sequence[int], processors: int) -> dict[str, Any]:
    """Efficiencies of weak and strong scaling.

    Args:
        processors: cores or GPUs that ranks run on.
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
    return {
        "summary": {
            f"efficiency_{line['scaling']}_{line['processes']}": line["efficiency"]
            for line in lines
            if line["processes"] > 1
        },
        "lines": lines,
        "parts": {str(case): parts for case, parts in cases.items()},
        "processors": processors,
    }


def as_table(result: dict[str, Any]) -> Table:
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
    for name in ("step", *PARTS):
        table.add_row(name, *(f"{1e3 * of_case[f'{name}_s']:.1f}" for of_case in parts))
    return table


# --- one process ----------------------------------------------------------------------------------


def train_and_take_apart(task: dict[str, Any]) -> None:
    """One process of a case.

    Args:
        task: settings of the run, the core to stay on (or None), how many of its first steps are
            not counted, and where rank 0 writes what it measured.
    """
    if task["core"] is not None:
        os.sched_setaffinity(0, {task["core"]})
    config = load_config(None, task["settings"])
    backend = make_backend(config.train, clip_norm=config.optim.clip_norm)
    try:
        trainer = Trainer(config, backend)
        begin(trainer, "never")
        trainer.fit()
        parts = in_parts(trainer, trainer.steps - task["warm_up"]) | all_reduces(backend)
        if backend.is_main:
            lines = (config.out / METRICS).read_text(encoding="utf-8").splitlines()
            counted = [json.loads(line) for line in lines[task["warm_up"] :]]
            parts = with_whole_step(parts, counted, config.plan.batch)
            Path(task["out"]).write_text(json.dumps(parts), encoding="utf-8")
    finally:
        backend.close()


def with_whole_step(parts: dict[str, Any], lines: list[Any], batch: int) -> dict[str, Any]:
    """Add the step as the run's own record has it, and what of it none of the parts explains."""
    seconds = [batch / line["speed/clips_per_second"] for line in lines]
    waited = [s * line["speed/data_wait"] for s, line in zip(seconds, lines, strict=True)]
    step, data = statistics.median(seconds), statistics.median(waited)
    names = ("compute", "wait", "statistics", "gradients")
    known = sum(parts[f"{part}_s"] for part in names)
    noises = parts["noise_s"] | {"data": noise(waited)}
    # What is left of the step has the noise of all that it is left of.
    noises["rest"] = math.hypot(noise(seconds), *(noises[name] for name in ("data", *names)))
    whole = {"step_s": step, "data_s": data, "rest_s": step - data - known}
    return parts | whole | {"noise_s": noises}


def noise(samples: Sequence[float]) -> float:
    """How far a median of so many steps may be off by chance: two standard errors, for samples of
    a normal distribution (1.2533 is the square root of pi / 2)."""
    return 2 * 1.2533 * float(np.std(samples, ddof=1)) / math.sqrt(len(samples))


class Times(NamedTuple):
    """Seconds of one step, on one rank, in three ways.

    Attributes:
        backward: forward and backward pass, with no exchange at all.
        wait: until all other ranks had done theirs.
        exchange: of the gradients, after that.
        update: clipping and the optimizer's step.
        shared: forward and backward pass with shared statistics, still without gradients.
        whole: forward and backward pass with all exchange, and the update.
    """

    backward: float
    wait: float
    exchange: float
    update: float
    shared: float
    whole: float


def in_parts(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Take ``steps`` steps apart, on one batch; medians over the steps, of means over the ranks."""
    backend, config = trainer.backend, trainer.config
    sampler = PlanSampler(
        trainer.plan, rank=backend.rank, world=backend.world, accumulate=1, first=0, last=1
    )
    batch = next(iter(Loader(trainer.data.dataset(training=True), sampler, config.loader)))
    taken_apart = Apart(trainer, batch.to(backend.device))
    taken_apart.take()
    mine = [taken_apart.take() for _ in range(steps)]
    times = np.array(backend.gather(mine))  # [ranks, steps, fields of Times]
    backward, wait, exchange, update, shared, whole = np.moveaxis(times, -1, 0)
    alone = backend.world == 1

    of_steps = {
        "compute": (backward + update).mean(0),
        "wait": wait.mean(0),
        # With shared statistics all ranks go at the pace of the slowest.
        "statistics": shared.mean(0) - backward.max(0),
        "gradients": (whole - shared - update).mean(0),
        "exchange": exchange.mean(0),
    }
    if alone:
        of_steps |= {name: 0 * of_steps[name] for name in of_steps if name != "compute"}
    return {
        "world": backend.world,
        "clips": config.plan.batch // backend.world,
        **{f"{name}_s": float(np.median(values)) for name, values in of_steps.items()},
        "noise_s": {name: noise(values.tolist()) for name, values in of_steps.items()},
        "samples_s": (backward + update).ravel().tolist(),
        "gradient_bytes": sum(p.numel() * p.element_size() for _, p in backend.trained()),
        "statistics_bytes": taken_apart.statistics_bytes,
    }


class Apart:
    """Takes the steps of a trainer on one batch.

    Weights stay the same on all ranks: no update goes by gradients that were not exchanged.
    """

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self.trainer, self.batch, self.backend = trainer, batch, trainer.backend
        self.shares = trainer.config.norm.shared and self.backend.world > 1
        self.statistics_bytes = self._statistics_bytes()

    def take(self) -> Times:
        backend, module = self.backend, self.backend.module
        share_statistics(module, None)
        backward = self._timed(lambda: self._backward(module))
        wait = timed(lambda: meet(backend), backend)
        exchange = timed(lambda: average_gradients(backend), backend)
        update = timed(backend.update, backend)
        share_statistics(module, backend.all_reduce if self.shares else None)
        shared = self._timed(lambda: self._backward(module))
        backend.drop_gradients()
        whole = self._timed(self._whole)
        return Times(backward, wait, exchange, update, shared, whole)

    def _timed(self, act: Callable[[], object]) -> float:
        """All ranks begin together."""
        meet(self.backend)
        return timed(act, self.backend)

    def _backward(self, model: Any) -> None:
        """``model``: the backend's, or the bare module, whose gradients are not exchanged."""
        backend, batch, config = self.backend, self.batch, self.trainer.config
        with backend.autocast():
            logits = model(as_input(batch.volumes, config), batch.frames)
        loss = binary_cross_entropy_with_logits(logits.float(), batch.labels)
        backend.backward(loss)

    def _whole(self) -> None:
        with self.backend.micro_step(last=True):
            self._backward(self.backend.model)
        self.backend.update()

    def _statistics_bytes(self) -> list[int]:
        """Of each exchange of statistics in a step."""
        sizes: list[int] = []

        def noted(tensor: Tensor) -> None:
            sizes.append(tensor.nbytes)
            self.backend.all_reduce(tensor)

        if self.shares:
            share_statistics(self.backend.module, noted)
            self._backward(self.backend.module)
            self.backend.drop_gradients()
        return sizes


def average_gradients(backend: Backend) -> None:
    """As DDP does, but after the backward pass: copied into buckets, summed, and copied back."""
    if backend.world == 1:
        return
    waiting: list[Tensor] = []
    for _, parameter in reversed(list(backend.trained())):
        assert parameter.grad is not None
        waiting.append(parameter.grad)
        if sum(gradient.nbytes for gradient in waiting) >= BUCKET:
            average(backend, waiting)
            waiting = []
    if waiting:
        average(backend, waiting)


def average(backend: Backend, gradients: list[Tensor]) -> None:
    # Each in its own memory layout, so that the copies are straight.
    sizes = [gradient.numel() for gradient in gradients]
    bucket = torch.empty(sum(sizes), device=backend.device)
    places = torch.split(bucket, sizes)
    for place, gradient in zip(places, gradients, strict=True):
        place.as_strided(gradient.shape, gradient.stride(), place.storage_offset()).copy_(gradient)
    backend.all_reduce(bucket.div_(backend.world))
    for place, gradient in zip(places, gradients, strict=True):
        gradient.copy_(place.as_strided(gradient.shape, gradient.stride(), place.storage_offset()))


def all_reduces(backend: Backend) -> dict[str, Any]:
    """Median seconds of a small and of a large one."""
    if backend.world == 1:
        return {}
    found = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        values = torch.zeros(size // 4, device=backend.device)
        times = []
        for _ in range(REPEATS):
            meet(backend)
            times.append(timed(lambda: backend.all_reduce(values), backend))  # noqa: B023
        found[name] = statistics.median(times)
    return {"all_reduce_s": found}


def meet(backend: Backend) -> None:
    """A barrier, for the host too."""
    backend.sums([0.0])


def timed(act: Callable[[], object], backend: Backend) -> float:
    began = time.perf_counter()
    act()
    synchronize(backend.device)
    return time.perf_counter() - began


if __name__ == "__main__":
    if sys.argv[1:2] != ["--rank"]:
        main()
        sys.exit()
    train_and_take_apart(json.loads(sys.argv[2]))
    # gloo's threads outlive its group, and may abort a process that ends by itself under them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
