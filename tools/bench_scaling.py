"""How training speeds up with processes, and where a step's time goes.

Trains a 3D ResNet on synthetic clips with 1, 2 and 4 processes, over gloo on CPUs and NCCL on CUDA:
first the package's own loop for clips a second, then the parts of the same step one by one.
benchmarks/scaling.md explains the results.

    python tools/bench_scaling.py [--worlds 1 2 4] [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import finish, new_table, options, say, seconds, versions, write_npz
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn
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
#: Bytes of the timed all-reduces, and how often each runs.
SMALL, LARGE, REPEATS = 64, 2**24, 15
#: The parts of a step; the results are named "data_s" and so on.
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
        "versions": versions("torch"),
    }
    finish(arguments.json, result, as_table(result))
    if max(worlds) > processors:
        print(f"Only {processors} cores: efficiency is against {processors} times one process.")


# --- the runs -------------------------------------------------------------------------------------


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
    """A number of processes, and the clips of each at a step."""

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
    """The same global batch at every number of processes."""
    return Case(world, CLIPS * math.lcm(*worlds) // world)


def measure(folder: Path, workload: Workload, worlds: Sequence[int]) -> dict[Case, Parts]:
    cases = {case for world in worlds for case in (weak(world), strong(world, worlds))}
    return {case: measured(folder, workload, case) for case in sorted(cases)}


def measured(folder: Path, workload: Workload, case: Case) -> Parts:
    """Run the processes of a case, each on its own core if there are enough."""
    say(f"processes x clips: {case}")
    steps = WARM_UP + workload.steps
    store = folder / f"store-{case.batch}"
    if not store.exists():
        # One epoch is as long as the run.
        positives = steps * case.batch // 4
        splits = {"train": (positives, 3 * positives), "val": (1, 3), "test": (1, 3)}
        write_npz(folder / "clips.npz", splits, (workload.frames, workload.side, workload.side))
        prepare_npz(folder / "clips.npz", store)
    cuda = torch.cuda.is_available()
    out = folder / str(case)
    out.mkdir()
    settings = [
        f"store={store}",
        f"out={out}",
        f"clip.size=[{workload.side}, {workload.side}]",
        f"plan.batch={case.batch}",
        # A rank on one core has no second core for its loader.
        f"loader.workers={2 if cuda else 0}",
        f"model.name={workload.model}",
        f"model.width={workload.width}",
        "train.epochs=1",
        f"train.precision={workload.precision}",
        f"train.device={'cuda' if cuda else 'cpu'}",
        f"checkpoint.every_steps={steps}",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = folder / f"{case}.json"
    try:
        spawn(  # type: ignore[no-untyped-call]
            run_rank, (case.world, port, settings, results), nprocs=case.world
        )
    except ProcessException as error:
        index, reason = error.error_index, str(error)
        sys.exit(f"error: process {index} of {case.world} failed:\n{reason[-3000:]}")
    parts: Parts = json.loads(results.read_text(encoding="utf-8"))
    return parts


# --- the results ----------------------------------------------------------------------------------


def evaluate(cases: dict[Case, Parts], worlds: Sequence[int], processors: int) -> dict[str, Any]:
    """Efficiencies of weak and strong scaling; ``processors``: cores or GPUs for the ranks."""
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
    """One column for each case."""
    lines = result["lines"]
    parts = [result["parts"][line["case"]] for line in lines]
    table = new_table(
        "{model} of width {width}, clips of {frames}x{side}x{side}, {precision}; "
        "milliseconds of a step".format(**result["workload"]),
        "ranks x clips of each",
        *(f"{line['scaling']}\n{line['case']}" for line in lines),
    )
    table.add_row("clips/s", *(f"{line['clips_per_second']:.1f}" for line in lines))
    table.add_row("efficiency", *(f"{line['efficiency']:.2f}" for line in lines))
    table.add_section()
    for name in ("step", *PARTS):
        table.add_row(name, *(f"{1e3 * of_case[f'{name}_s']:.1f}" for of_case in parts))
    return table


# --- one process ----------------------------------------------------------------------------------


def run_rank(rank: int, world: int, port: int, settings: list[str], results: Path) -> None:
    """Train, take the steps apart, and let rank 0 write the results."""
    cuda = torch.cuda.is_available()
    threads = os.environ.get("OMP_NUM_THREADS", "4") if cuda else "1"
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
    }
    torch.set_num_threads(int(threads))
    if not cuda:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    config = load_config(None, settings)
    backend = make_backend(config.train, clip_norm=config.optim.clip_norm)
    try:
        trainer = Trainer(config, backend)
        begin(trainer, "never")
        trainer.fit()
        parts = in_parts(trainer, trainer.steps - WARM_UP) | all_reduces(backend)
        if backend.is_main:
            lines = (config.out / METRICS).read_text(encoding="utf-8").splitlines()
            counted = [json.loads(line) for line in lines[WARM_UP:]]
            parts = with_whole_step(parts, counted, config.plan.batch)
            results.write_text(json.dumps(parts), encoding="utf-8")
    finally:
        backend.close()
    # gloo's threads outlive its group, and may abort a process that ends normally.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def with_whole_step(parts: dict[str, Any], lines: list[Any], batch: int) -> dict[str, Any]:
    """Add the whole step, from the run's own log, and the rest that no part explains."""
    whole_steps = [batch / line["speed/clips_per_second"] for line in lines]
    waited = [s * line["speed/data_wait"] for s, line in zip(whole_steps, lines, strict=True)]
    step, data = statistics.median(whole_steps), statistics.median(waited)
    names = ("compute", "wait", "statistics", "gradients")
    known = sum(parts[f"{part}_s"] for part in names)
    noises = parts["noise_s"] | {"data": noise(waited)}
    # The rest has the noise of the step and of all parts.
    noises["rest"] = math.hypot(noise(whole_steps), *(noises[name] for name in ("data", *names)))
    whole = {"step_s": step, "data_s": data, "rest_s": step - data - known}
    return parts | whole | {"noise_s": noises}


def noise(samples: Sequence[float]) -> float:
    """Two standard errors of the median, for samples of a normal distribution (1.2533 is the square
    root of pi / 2)."""
    return 2 * 1.2533 * float(np.std(samples, ddof=1)) / math.sqrt(len(samples))


class Times(NamedTuple):
    """Seconds of one step on one rank, taken in three ways.

    Attributes:
        backward: forward and backward pass, without any exchange.
        wait: until all other ranks have finished theirs.
        exchange: of the gradients, after the wait.
        update: clipping and the optimizer's step.
        shared: forward and backward pass with shared statistics, without exchange of gradients.
        whole: forward and backward pass with all exchange, and the update.
    """

    backward: float
    wait: float
    exchange: float
    update: float
    shared: float
    whole: float


def in_parts(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Take steps apart, on one batch. The results are medians over steps of means over ranks."""
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
    of_steps = {
        "compute": (backward + update).mean(0),
        "wait": wait.mean(0),
        # With shared statistics all ranks are as slow as the slowest.
        "statistics": shared.mean(0) - backward.max(0),
        "gradients": (whole - shared - update).mean(0),
        "exchange": exchange.mean(0),
    }
    if backend.world == 1:
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
    """Takes the steps of a trainer on one batch. Weights stay the same on all ranks: every update
    uses exchanged gradients."""

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self.trainer, self.batch, self.backend = trainer, batch, trainer.backend
        self.shares = trainer.config.norm.shared and self.backend.world > 1
        self.statistics_bytes = self._statistics_bytes()

    def take(self) -> Times:
        backend, module = self.backend, self.backend.module
        share_statistics(module, None)
        backward = self._timed(lambda: self._backward(module))
        wait = seconds(partial(meet, backend), backend.device)
        exchange = seconds(partial(average_gradients, backend), backend.device)
        update = seconds(backend.update, backend.device)
        share_statistics(module, backend.all_reduce if self.shares else None)
        shared = self._timed(lambda: self._backward(module))
        backend.drop_gradients()
        whole = self._timed(self._whole)
        return Times(backward, wait, exchange, update, shared, whole)

    def _timed(self, act: Callable[[], object]) -> float:
        """Seconds of ``act``, which all ranks begin together."""
        meet(self.backend)
        return seconds(act, self.backend.device)

    def _backward(self, model: Any) -> None:
        """Args: ``model``: the backend's, or the bare module, whose gradients stay local."""
        backend, batch, config = self.backend, self.batch, self.trainer.config
        with backend.autocast():
            logits = model(as_input(batch.volumes, config), batch.frames)
        loss = binary_cross_entropy_with_logits(logits.float(), batch.labels)
        backend.backward(loss)

    def _whole(self) -> None:
        with self.backend.accumulating(last=True):
            self._backward(self.backend.model)
        self.backend.update()

    def _statistics_bytes(self) -> list[int]:
        """Bytes of each exchange of statistics in a step."""
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
    """Average the gradients in one buffer, after the backward pass."""
    if backend.world == 1:
        return
    gradients = [p.grad for _, p in backend.trained() if p.grad is not None]
    buffer = torch.cat([gradient.flatten() for gradient in gradients])
    backend.all_reduce(buffer.div_(backend.world))
    averages = torch.split(buffer, [gradient.numel() for gradient in gradients])
    for gradient, average in zip(gradients, averages, strict=True):
        gradient.copy_(average.view_as(gradient))


def all_reduces(backend: Backend) -> dict[str, Any]:
    """Median seconds of a small and of a large all-reduce."""
    if backend.world == 1:
        return {}
    found = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        values = torch.zeros(size // 4, device=backend.device)
        times = []
        for _ in range(REPEATS):
            meet(backend)
            times.append(seconds(partial(backend.all_reduce, values), backend.device))
        found[name] = statistics.median(times)
    return {"all_reduce_s": found}


def meet(backend: Backend) -> None:
    """Barrier for the hosts and devices of all ranks."""
    backend.sums([0.0])


if __name__ == "__main__":
    main()
