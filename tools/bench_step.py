"""How fast a training step is: each speed-up on its own row, from the original recipe to `fast`.

Every row is a set of settings of the package. It trains in its own process on batches that the
package's plan makes from the depths of the Clog Loss challenge's clips. The rows take turns, so
that other work on the machine slows all of them alike. benchmarks/step.md explains the results.

    python tools/bench_step.py [--depths FILE] [--variants A,B] [--quick] [--json FILE]
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_plan import Clips, challenge_clips, read_clips
from measuring import (
    finish,
    in_turns,
    memory,
    new_table,
    options,
    reset_peak_memory,
    say,
    synchronize,
    versions,
    write_results,
)
from rich.table import Table
from roofline import Ceilings, count_step, measure_ceilings
from torch import Tensor

from dist_train.config import Config, last_of_each, load_config
from dist_train.data.augment.packed_clips import NativeClips, pack
from dist_train.data.augment.params import AugmentSampler
from dist_train.data.loading.collate import Batch
from dist_train.data.plan.plan import make_plan
from dist_train.data.plan.shuffle import Ints
from dist_train.data.synthetic.challenge_stats import BOX_HEIGHT, BOX_WIDTH
from dist_train.distributed.backends import make_backend
from dist_train.models.registry import build_model
from dist_train.run.model import as_input, make_model
from dist_train.training.cuda_graphs import UNRECORDED, make_forward_backward
from dist_train.training.forward_backward import ForwardBackward
from dist_train.training.optimizer import make_optimizer

MODEL = "resnet3d-101"
#: The network's stride in depth. A shallower clip would have no frame left in the last layers.
LEAST_FRAMES = 4
PARTS = ("seconds", "forward", "backward", "optimizer")
BF16 = "train.precision=bf16"


@dataclass(frozen=True)
class Variant:
    """A row: the settings that it changes, against those of the row ``over``.

    Rows in random order run the network over padding as if it were frames, as the original did.
    """

    says: str
    over: str | None
    settings: tuple[str, ...]


def _variant(says: str, over: str | None, settings: str) -> Variant:
    return Variant(says, over, tuple(settings.split()))


BANDS = "plan.order=banded plan.negatives=matched"
VARIANTS = {
    "original": _variant(
        "float32, contiguous, 4 of 160x160 at random, padded",
        None,
        "clip.size=[160,160] train.precision=fp32 train.channels_last=false plan.batch=4 "
        "plan.order=random plan.negatives=natural model.recompute=none optim.fused=false "
        "model.stem_folded=false",
    ),
    # Each row adds one speed-up to the row before it.
    "channels_last": _variant("+ channels last", "original", "train.channels_last=true"),
    "bf16": _variant("+ bf16", "channels_last", BF16),
    "bands": _variant("+ bands of depth, padding masked", "bf16", BANDS),
    "stem": _variant("+ stem by space to depth", "bands", "model.stem_folded=true"),
    "fast": _variant("+ fused AdamW", "stem", "optim.fused=true"),
    # One change each.
    "only_stem": _variant("original, stem by space to depth", "original", "model.stem_folded=true"),
    "only_fused": _variant("original, fused AdamW", "original", "optim.fused=true"),
    "only_bf16": _variant("original, bf16", "original", BF16),
    "only_bands": _variant("original, bands, padding masked", "original", BANDS),
    "fused_norm": _variant("fast, BN with sum and ReLU compiled", "fast", "norm.fused=true"),
    "smaller": _variant("fast, 112x112, as in an early stage", "fast", "clip.size=[112,112]"),
    "native": _variant("fast, crops resized on the device", "fast", "augment.device=true"),
    "graphs": _variant("fused_norm, recorded as CUDA graphs", "fused_norm", "train.graphs=true"),
    "batch16": _variant("fast, 16 clips", "fast", "plan.batch=16"),
    "batch32": _variant("fast, 32 clips", "fast", "plan.batch=32"),
    "cheap": _variant("fast, BN and ReLU recomputed", "fast", "model.recompute=cheap"),
    "block": _variant("fast, blocks run twice", "fast", "model.recompute=block"),
}
#: Rows that need the bf16 arithmetic of the device to be faster than float32, and rows that need
#: CUDA.
BF16_ROWS = {name for name, variant in VARIANTS.items() if BF16 in variant.settings}
CUDA_ROWS = {"graphs"}
#: The rows that run by default. Batches of 16 whole clips need a GPU.
ON_CPU = ("original", "channels_last", "bf16", "bands", "stem", "fast", "fused_norm")


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = options(__doc__, "rows original and fast, one step, shallow clips")
    parser.add_argument("--depths", type=Path, help="CSV of clips by depth, see bench_plan.py")
    parser.add_argument("--variants", help=f"rows, of {', '.join(VARIANTS)}; or 'all'")
    parser.add_argument("--model", default=MODEL, help=f"default {MODEL}")
    parser.add_argument("--scale", type=float, help="factor of depths; default 0.25 on a CPU or 1")
    parser.add_argument("--rounds", type=int, help="turns of each row; default 3 on a CPU or 5")
    parser.add_argument("--steps", type=int, help="steps of a turn; default 1 on a CPU or 8")
    arguments = parser.parse_args()
    names = tuple(VARIANTS) if cuda else ON_CPU
    if arguments.variants and arguments.variants != "all":
        names = tuple(arguments.variants.split(","))
    elif arguments.variants:
        names = tuple(VARIANTS)
    elif arguments.quick:
        names = ("original", "fast")
    unknown = set(names) - VARIANTS.keys()
    if unknown:
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    if not cuda:
        # A launcher may have set one thread, but only one row works at a time here.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    load = Workload(
        read_clips(arguments.depths) if arguments.depths else challenge_clips(),
        arguments.model,
        arguments.scale or (0.1 if arguments.quick else 1.0 if cuda else 0.25),
        arguments.rounds or (1 if arguments.quick else 5 if cuda else 3),
        arguments.steps or (8 if cuda else 1),
    )
    source = "a table" if arguments.depths else "challenge_stats.py"
    result = measure(load, names, source, lambda result: write_results(arguments.json, result))
    finish(arguments.json, result, as_table(result))
    if result["failed"]:
        raise SystemExit(f"error: {len(result['failed'])} rows failed; see the messages above")


# --- the clips ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """Clips, the model, the factor of the clips' depths, and the number of turns and steps."""

    clips: Clips
    model: str
    scale: float
    rounds: int
    steps: int
    _epochs: dict[str, list[Ints]] = field(default_factory=dict, repr=False, compare=False)

    def scaled(self, depths: Ints) -> Ints:
        scaled: Ints = np.maximum(np.rint(depths * self.scale), LEAST_FRAMES).astype(np.int64)
        return scaled

    def epoch(self, config: Config) -> list[Ints]:
        """Depths of each step of the first epoch, in the order of the steps' longest clips."""
        key = config.plan.model_dump_json()
        if key not in self._epochs:
            positives = self.scaled(self.clips.positives)
            negatives = self.scaled(self.clips.negatives)
            banded = config.plan.order == "banded"
            assert isinstance(config.plan.ratio, tuple), "the clips are of two classes"
            plan = make_plan(
                np.arange(len(positives)),
                len(positives) + np.arange(len(negatives)),
                batch=config.plan.batch,
                ratio=config.plan.ratio,
                seed=0,
                positive_depths=positives if banded else None,
                negative_depths=negatives if banded else None,
                matching=config.plan.negatives,
            )
            depths = np.concatenate([positives, negatives])
            steps = [depths[plan.global_batch(step)] for step in range(plan.first_step(1))]
            self._epochs[key] = sorted(steps, key=lambda of_step: int(of_step.max()))
        return self._epochs[key]

    def turns(self, config: Config) -> list[list[Ints]]:
        """Depths of the clips of each timed step. All steps of a turn are alike; the turns are
        steps at even quantiles of the epoch, so that a few steps represent all."""
        epoch = self.epoch(config)
        places = [int((turn + 0.5) / self.rounds * len(epoch)) for turn in range(self.rounds)]
        return [[epoch[place]] * self.steps for place in places]


def efficiency(steps: Sequence[Ints]) -> float:
    """True frames over padded frames."""
    return sum(int(d.sum()) for d in steps) / sum(padded(d) for d in steps)


def padded(depths: Ints) -> int:
    return len(depths) * int(depths.max())


def make_batch(depths: Ints, config: Config, *, cuda: bool) -> Batch:
    """A batch of noise on the host; every fourth clip is positive. Crops that the device resizes
    have the challenge's median size."""
    frames = torch.from_numpy(depths) if depths.min() < depths.max() else None
    labels = torch.arange(len(depths)).remainder(4).eq(0).float()
    volumes = (crops if config.augment.device else padded_clips)(depths, config)
    batch = Batch(volumes, frames, labels, torch.arange(len(depths)))
    return batch.pin_memory() if cuda else batch


def padded_clips(depths: Ints, config: Config) -> Tensor:
    volumes = torch.zeros(len(depths), 1, int(depths.max()), *config.clip.size, dtype=torch.uint8)
    for volume, depth in zip(volumes, depths.tolist(), strict=True):
        volume[0, :depth].random_(256)
    return volumes


def crops(depths: Ints, config: Config) -> NativeClips:
    draw = AugmentSampler(config.augment, seed=0)
    clips = [
        torch.randint(256, (depth, BOX_HEIGHT[1], BOX_WIDTH[1]), dtype=torch.uint8)
        for depth in depths.tolist()
    ]
    return pack(clips, [draw(config.clip.size, epoch=0, number=n) for n in range(len(clips))])


# --- one row --------------------------------------------------------------------------------------


def settings_of(name: str, more: Sequence[str] = ()) -> list[str]:
    """The settings of a row as "key=value"; ``more`` replace its own."""
    variant = VARIANTS[name]
    below = [] if variant.over is None else settings_of(variant.over)
    return last_of_each([*below, *variant.settings, *more])


def config_of(name: str, model: str, more: Sequence[str] = ()) -> Config:
    """The configuration of a row."""
    return load_config(None, ["store=none", *settings_of(name, [f"model.name={model}", *more])])


@dataclass
class Turn:
    """Seconds of all steps of one turn, in all and by part, and the peak memory in bytes (CUDA:
    reserved by the allocator; CPU: resident, above what the process held before)."""

    seconds: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    peak: int = 0
    depths: list[list[int]] = field(default_factory=list)


class Row:
    """One model in training; its steps do what training/trainer.py does."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.backend = make_backend(config.train, clip_norm=config.optim.clip_norm)
        model = make_model(config)
        self.backend.wrap(model, lambda wrapped: make_optimizer(wrapped, config.optim))
        self.backend.model.train()
        self.device = self.backend.device
        # Passes that are recorded call no Python function between forward and backward.
        self.passes = (
            make_forward_backward(self.backend, device_knows_frames=config.norm.fused)
            if config.train.graphs
            else ForwardBackward(self.backend, between=lambda: self.marks.mark())
        )
        self.marks = Marks(self.device)

    def turn(self, steps: Sequence[Ints]) -> Turn:
        cuda = self.device.type == "cuda"
        batches = [make_batch(depths, self.config, cuda=cuda) for depths in steps]
        if cuda:
            # The allocator's cache was emptied after the last turn.
            self.warm_up(batches[-1])
        turn = Turn(depths=[depths.tolist() for depths in steps])
        with peak_memory(self.device) as peak:
            synchronize(self.device)
            began = time.perf_counter()
            marks = []
            for batch in batches:
                marks.append(Marks(self.device))
                self.step(batch, marks[-1])
            synchronize(self.device)
            turn.seconds = time.perf_counter() - began
        turn.peak = peak[0]
        for of_step in marks:
            forward, backward, optimizer = of_step.seconds()
            turn.forward += forward
            turn.backward += backward
            turn.optimizer += optimizer
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
        return turn

    def warm_up(self, batch: Batch) -> None:
        """Take steps that choose kernels, make the optimizer's state, and capture CUDA graphs."""
        for _ in range(UNRECORDED + 1 if self.config.train.graphs else 1):
            self.step(batch, Marks(self.device))

    def close(self) -> None:
        """Allow another row, of another precision, in this process."""
        self.backend.close()

    def step(self, batch: Batch, marks: Marks) -> None:
        """Take one step. The time of recorded passes counts as forward."""
        self.marks = marks
        marks.mark()
        moved = batch.to(self.device)
        with self.backend.accumulating(last=True):
            frames = moved.frames if self.config.plan.order == "banded" else None
            self.passes(as_input(moved.volumes, self.config), frames, moved.labels, 1.0)
        if self.config.train.graphs:
            marks.mark()
        marks.mark()
        self.backend.update()
        marks.mark()


class Marks:
    """Points in time on a device. On CUDA they are events, and the host does not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.points: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between the points, once the device is done."""
        pairs = zip(self.points, self.points[1:], strict=False)
        if self.cuda:
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds the peak at the end of the block: see ``Turn``."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        # Memory of CUDA graphs does not count as allocated.
        found.append(torch.cuda.max_memory_reserved(device))
        return
    reset_peak_memory()
    before = memory("VmRSS")
    yield found
    found.append(memory("VmHWM") - before)


class RowProcess:
    """A row in its own process."""

    row: Row

    def __init__(self, config: Config) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            1, spawn, torch.set_num_threads, (torch.get_num_threads(),)
        )
        self.built: Future[None] = self._pool.submit(RowProcess._build, config)

    def turn(self, steps: list[Ints]) -> Turn:
        return self._pool.submit(RowProcess._turn, steps).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def _build(config: Config) -> None:
        RowProcess.row = Row(config)

    @staticmethod
    def _turn(steps: list[Ints]) -> Turn:
        return RowProcess.row.turn(steps)


# --- all rows -------------------------------------------------------------------------------------


def measure(
    load: Workload, names: Sequence[str], source: str, keep: Callable[[Any], None]
) -> dict[str, Any]:
    """Let the rows take turns.

    Args:
        keep: called with the results so far after each round, so that a killed bench loses at most
            one round. Only the final results have the share of the roofline.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say("ceilings")
    ceilings = measure_ceilings(device, ["fp32", "bf16"])
    left_out = set() if device.type == "cuda" else set(CUDA_ROWS)
    more = []
    if ceilings.flops["bf16"] <= ceilings.flops["fp32"]:
        say("bf16 is slower than float32 on this device: every row uses float32")
        left_out |= BF16_ROWS
        more = ["train.precision=fp32"]
    configs = {n: config_of(n, load.model, more) for n in names if n not in left_out}
    turns: dict[str, list[Turn]] = {name: [] for name in configs}
    failed: dict[str, str] = {}
    metadata = {
        "ceilings": asdict(ceilings),
        "workload": {
            "model": load.model,
            "parameters": parameters_of(load.model),
            "frames_scale": load.scale,
            "depths": source,
            "rounds": load.rounds,
            "steps_a_round": load.steps,
        },
        "machine": machine(device),
        "left_out": [name for name in names if name in left_out],
    }

    def result(counted_by: Ceilings | None) -> dict[str, Any]:
        rows = {
            name: metrics_of(config, load, turns[name], device, counted_by)
            | {"says": VARIANTS[name].says, "settings": settings_of(name, more)}
            for name, config in configs.items()
            if name not in failed and turns[name]
        }
        raw = {name: [asdict(turn) for turn in of_row] for name, of_row in turns.items()}
        summary = summary_of(rows)
        return {"summary": summary, "variants": rows, "failed": failed, **metadata, "turns": raw}

    @contextmanager
    def failure_noted(name: str) -> Iterator[None]:
        """A row that fails does not end the others."""
        try:
            yield
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            say(f"{name} failed: {failed[name]}")

    with ExitStack() as stack:
        say(f"{len(configs)} processes")
        rows = {}
        for name, config in configs.items():
            rows[name] = RowProcess(config)
            stack.callback(rows[name].close)
        plans = {name: load.turns(config) for name, config in configs.items()}
        for name, row in rows.items():
            with failure_noted(name):
                row.built.result()
                # A shallow step, which is not counted.
                row.turn([np.full(len(plans[name][0][0]), LEAST_FRAMES)])
        for number, name in enumerate(in_turns(list(rows), load.rounds)):
            if name not in failed:
                with failure_noted(name):
                    turns[name].append(rows[name].turn(plans[name][number // len(rows)]))
            if (number + 1) % len(rows) == 0:
                keep(result(None))
    say("counting operations")
    return result(ceilings)


def parameters_of(model: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(model).parameters())


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **versions("torch"),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def metrics_of(
    config: Config,
    load: Workload,
    turns: Sequence[Turn],
    device: torch.device,
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """Results of one row. The true frames are the padded frames times the efficiency of the whole
    epoch, as the timed steps are few.

    Args:
        ceilings: of the device of the turns. None leaves out FLOP/s and the share of the roofline:
            counting takes seconds for each shape.
    """
    steps = [np.array(depths) for turn in turns for depths in turn.depths]
    seconds = sum(turn.seconds for turn in turns)
    epoch = load.epoch(config)
    frames = sum(map(padded, steps)) / seconds * efficiency(epoch)
    flops, modelled = 0, 0.0
    if ceilings is not None:
        for depths in steps:
            shape = (len(depths), 1, int(depths.max()), *config.clip.size)
            operations = counted(load.model, shape, config.train.precision, device)
            flops += sum(operation.flops for operation in operations)
            modelled += ceilings.seconds(operations)
    return {
        "precision": config.train.precision,
        "batch": config.plan.batch,
        "true_frames_per_second": frames,
        "clips_per_second": frames / (np.concatenate(epoch).mean()),
        "efficiency": efficiency(epoch),
        "efficiency_timed": efficiency(steps),
        "ms": {part: sum(getattr(t, part) for t in turns) / len(steps) * 1e3 for part in PARTS},
        "peak_bytes": max(turn.peak for turn in turns),
        "flops_per_second": flops / seconds if ceilings else None,
        "roofline_share": modelled / seconds if ceilings else None,
    }


counted = cache(count_step)


def summary_of(rows: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The metrics that have goals; None if a row that they need did not run."""
    fast, original = rows.get("fast", {}), rows.get("original", {})
    key = "true_frames_per_second"
    return {
        "fast_vs_original": fast[key] / original[key] if fast and original else None,
        "clips_per_second": fast.get("clips_per_second"),
        "roofline_share": fast.get("roofline_share"),
        "original_roofline_share": original.get("roofline_share"),
    }


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    workload, ceilings = result["workload"], result["ceilings"]
    peaks = ", ".join(
        f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings["flops"].items()
    )
    table = new_table(
        f"{workload['model']}, depths x {workload['frames_scale']:g}; ceilings: {peaks}, "
        f"{ceilings['bandwidth'] / 1e9:.0f} GB/s",
        *("row", "what", "true frames/s", "x", "clips/s", "efficiency", "ms", *PARTS[1:]),
        *("peak MB", "GFLOP/s", "roofline"),
    )
    rows = result["variants"]
    first = next((row["true_frames_per_second"] for row in rows.values()), None)
    for name, row in rows.items():
        table.add_row(
            name,
            row["says"],
            f"{row['true_frames_per_second']:.1f}",
            f"{row['true_frames_per_second'] / first:.2f}",
            f"{row['clips_per_second']:.2f}",
            f"{row['efficiency']:.3f}",
            *(f"{row['ms'][part]:.0f}" for part in PARTS),
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['flops_per_second'] / 1e9:.0f}",
            f"{row['roofline_share']:.2f}",
        )
    for name, why in result["failed"].items():
        table.add_row(name, f"failed: {why}")
    return table


if __name__ == "__main__":
    main()
