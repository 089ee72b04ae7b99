"""How fast a training step is: each lever on its own row, from the original recipe's to `fast`.

Every row is a set of settings of the package. It trains in a process of its own on batches that the
package's plan makes of the depths of the Clog Loss challenge's clips, and the rows take turns, a
step or a few each, so that what else happens on the machine hits all of them alike.
benchmarks/step.md says how to read the figures.

    python tools/bench_step.py [--depths FILE] [--variants A,B] [--quick] [--json FILE]
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_plan import Clips, read_clips, spread
from measuring import finish, memory, options, reset_peak_memory, say, synchronize, write_figures
from rich.table import Table
from roofline import Ceilings, count_step, measure_ceilings
from torch import Tensor

from dist_train.config import Config, last_of_each, load_config
from dist_train.data.augment.packed_clips import NativeClips, pack
from dist_train.data.augment.params import AugmentSampler
from dist_train.data.loading.collate import Batch
from dist_train.data.plan.plan import Plan, make_plan
from dist_train.data.plan.shuffle import Ints
from dist_train.data.synthetic.challenge_stats import BOX_HEIGHT, BOX_WIDTH, CLIPS_BY_DEPTH
from dist_train.distributed.backends import make_backend
from dist_train.models.registry import build_model
from dist_train.run.model import as_input, make_model
from dist_train.training.cuda_graphs import UNRECORDED, make_forward_backward
from dist_train.training.forward_backward import ForwardBackward
from dist_train.training.optimizer import make_optimizer

MODEL = "resnet3d-101"
POSITIVES = 1_887
#: The stride of the network in depth: a shallower clip would have no frame left at its end.
LEAST_FRAMES = 4


@dataclass(frozen=True)
class Variant:
    """A row: what it changes, the settings that say so, and what those cannot say.

    Attributes:
        says: of the row, against the row ``over``.
        settings: "key=value", beside those of ``over``.
        over: the name of another row, whose settings it has too.
        knows_lengths: False runs the net over padding as if it were frames, as the original did.
        needs: "bf16" where the device must multiply it faster than float32; "cuda".
    """

    name: str
    says: str
    settings: tuple[str, ...] = ()
    over: str | None = None
    knows_lengths: bool = True
    needs: frozenset[str] = frozenset()


ALL = (
    Variant(
        "original",
        "float32, contiguous, 4 of 160x160 at random, padded",
        (
            "clip.size=[160, 160]",
            "train.precision=fp32",
            "train.channels_last=false",
            "plan.batch=4",
            "plan.order=random",
            "plan.negatives=natural",
            "model.recompute=none",
            "optim.fused=false",
            "model.stem_folded=false",
        ),
        knows_lengths=False,
    ),
    # One after the other.
    Variant("channels_last", "+ channels last", ("train.channels_last=true",), "original", False),
    Variant(
        "bf16",
        "+ bf16",
        ("train.precision=bf16",),
        "channels_last",
        False,
        needs=frozenset({"bf16"}),
    ),
    Variant(
        "bands",
        "+ bands of depth, padding masked",
        ("plan.order=banded", "plan.negatives=matched"),
        "bf16",
    ),
    Variant("stem", "+ stem by space to depth", ("model.stem_folded=true",), "bands"),
    Variant("fast", "+ fused AdamW", ("optim.fused=true",), "stem"),
    # One change each.
    Variant(
        "only_stem",
        "original, stem by space to depth",
        ("model.stem_folded=true",),
        "original",
        False,
    ),
    Variant("only_fused", "original, fused AdamW", ("optim.fused=true",), "original", False),
    Variant(
        "only_bf16",
        "original, bf16",
        ("train.precision=bf16",),
        "original",
        False,
        frozenset({"bf16"}),
    ),
    Variant(
        "only_bands",
        "original, bands, padding masked",
        ("plan.order=banded", "plan.negatives=matched"),
        "original",
    ),
    Variant("fused_norm", "fast, BN with sum and ReLU compiled", ("norm.fused=true",), "fast"),
    Variant("smaller", "fast, 112x112, as in an early stage", ("clip.size=[112, 112]",), "fast"),
    Variant(
        "native",
        "fast, crops of their own size, resized on the device",
        ("augment.device=true",),
        "fast",
    ),
    Variant(
        "graphs",
        "fast, compiled norms, recorded as CUDA graphs",
        ("train.graphs=true",),
        "fused_norm",
        needs=frozenset({"cuda"}),
    ),
    Variant("batch16", "fast, 16 clips", ("plan.batch=16",), "fast"),
    Variant("batch32", "fast, 32 clips", ("plan.batch=32",), "fast"),
    Variant("cheap", "fast, BN and ReLU made again", ("model.recompute=cheap",), "fast"),
    Variant("block", "fast, blocks run twice", ("model.recompute=block",), "fast"),
)
BY_NAME = {variant.name: variant for variant in ALL}
#: What runs unless told otherwise. Batches of 16 whole clips want a GPU.
ON_CPU = ("original", "channels_last", "bf16", "bands", "stem", "fast", "fused_norm")
ON_CUDA = tuple(variant.name for variant in ALL)


def main() -> None:
    parser = options(__doc__, "original and fast, one step, shallow")
    parser.add_argument("--depths", type=Path, help="CSV of clips by depth, as bench_plan.py takes")
    parser.add_argument("--variants", help=f"of {', '.join(BY_NAME)}; 'all' for all of them")
    parser.add_argument("--model", default=MODEL, help=f"default {MODEL}")
    parser.add_argument("--scale", type=float, help="of depths; default 0.25 on a CPU, else 1")
    parser.add_argument("--rounds", type=int, help="turns of each row; default 3 on a CPU, else 5")
    parser.add_argument("--steps", type=int, help="a turn; default 1 on a CPU, else 8")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    names = tuple(ON_CUDA if cuda else ON_CPU)
    if arguments.variants:
        names = (
            tuple(BY_NAME) if arguments.variants == "all" else tuple(arguments.variants.split(","))
        )
    elif arguments.quick:
        names = ("original", "fast")
    unknown = set(names) - set(BY_NAME)
    if unknown:
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    if not cuda:
        # Processes of a launcher get one thread each; here one row works at a time.
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    load = Workload(
        read_clips(arguments.depths) if arguments.depths else challenge_clips(),
        arguments.model,
        arguments.scale or (0.1 if arguments.quick else 1.0 if cuda else 0.25),
        arguments.rounds or (1 if arguments.quick else 5 if cuda else 3),
        arguments.steps or (8 if cuda else 1),
    )

    def keep(result: dict[str, Any]) -> None:
        write_figures(arguments.json, result)

    result = measure(load, names, "a table" if arguments.depths else "challenge_stats.py", keep)
    finish(arguments.json, result, as_table(result))
    if result["failed"]:
        raise SystemExit(f"error: {len(result['failed'])} rows failed, as told above")


# --- the clips ------------------------------------------------------------------------------------


def challenge_clips() -> Clips:
    """The depths of all clips of the challenge, of which the positives are taken to have their
    share of each."""
    depths, counts = (
        np.array(list(column)) for column in zip(*CLIPS_BY_DEPTH.items(), strict=True)
    )
    positives = spread(counts, POSITIVES)
    return Clips(np.repeat(depths, positives), np.repeat(depths, counts - positives))


@dataclass(frozen=True)
class Workload:
    """Clips, the net, depths in parts of what they are, and how many turns of how many steps."""

    clips: Clips
    model: str
    scale: float
    rounds: int
    steps: int
    _epochs: dict[str, list[Ints]] = field(default_factory=dict, repr=False, compare=False)

    def plan(self, config: Config) -> Plan:
        """The package's plan of an epoch by the row's settings."""
        banded = config.plan.order == "banded"
        positives, negatives = self.scaled(self.clips.positives), self.scaled(self.clips.negatives)
        return make_plan(
            np.arange(len(positives)),
            len(positives) + np.arange(len(negatives)),
            batch=config.plan.batch,
            ratio=config.plan.ratio,
            seed=0,
            positive_depths=positives if banded else None,
            negative_depths=negatives if banded else None,
            matching=config.plan.negatives,
        )

    def scaled(self, depths: Ints) -> Ints:
        scaled: Ints = np.maximum(np.rint(depths * self.scale), LEAST_FRAMES).astype(np.int64)
        return scaled

    def epoch(self, config: Config) -> list[Ints]:
        """Depths of each step of the first epoch, in the order of the steps' longest clips."""
        key = config.plan.model_dump_json()
        if key not in self._epochs:
            plan = self.plan(config)
            depths = self.scaled(np.concatenate([self.clips.positives, self.clips.negatives]))
            steps = [depths[plan.global_batch(step)] for step in range(plan.first_step(1))]
            self._epochs[key] = sorted(steps, key=lambda of_step: int(of_step.max()))
        return self._epochs[key]

    def turns(self, config: Config) -> list[list[Ints]]:
        """Depths of the clips of each timed step, which is the same throughout a turn: steps at
        even quantiles of the epoch, so that few of them stand for all."""
        epoch = self.epoch(config)
        places = [int((turn + 0.5) / self.rounds * len(epoch)) for turn in range(self.rounds)]
        return [[epoch[place]] * self.steps for place in places]


def efficiency(steps: Sequence[Ints]) -> float:
    """True frames over padded ones."""
    return sum(int(d.sum()) for d in steps) / sum(padded(d) for d in steps)


def padded(depths: Ints) -> int:
    return len(depths) * int(depths.max())


def make_batch(depths: Ints, config: Config, *, cuda: bool) -> Batch:
    """Noise in place of clips, on the host; one in four is positive. Crops that the device is to
    resize have the challenge's median size."""
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


# --- a row, in a process of its own ---------------------------------------------------------------


def config_of(variant: Variant, model: str, more: Sequence[str] = ()) -> Config:
    """The settings of a row; ``more`` are "key=value" settings that replace its own."""
    settings = ["store=none", f"model.name={model}", *settings_of(variant), *more]
    return load_config(None, last_of_each(settings))


def settings_of(variant: Variant) -> list[str]:
    below = [] if variant.over is None else settings_of(BY_NAME[variant.over])
    return [*below, *variant.settings]


@dataclass
class Turn:
    """Of the steps of one turn: seconds in all and by part, and the peak of memory in bytes (CUDA:
    reserved by the allocator; CPU: resident, above what the process held before)."""

    seconds: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    peak: int = 0
    depths: list[list[int]] = field(default_factory=list)


class Row:
    """One net in training by one row's settings, step by step as training/trainer.py takes it.

    Args:
        knows_lengths: see ``Variant``.
    """

    def __init__(self, config: Config, *, knows_lengths: bool) -> None:
        self.config, self.knows_lengths = config, knows_lengths
        self.backend = make_backend(config.train, clip_norm=config.optim.clip_norm)
        model = make_model(config)
        self.backend.wrap(model, lambda wrapped: make_optimizer(wrapped, config.optim))
        self.backend.model.train()
        self.device = self.backend.device
        # Nothing is called between passes that are recorded.
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
        """Steps in which kernels are chosen, moments are made, and CUDA graphs are captured."""
        for _ in range(UNRECORDED + 1 if self.config.train.graphs else 1):
            self.step(batch, Marks(self.device))

    def close(self) -> None:
        """Let another row, of another precision, be made in this process."""
        self.backend.close()

    def step(self, batch: Batch, marks: Marks) -> None:
        """Passes that are recorded are one: all of their time counts as forward."""
        self.marks = marks
        marks.mark()
        moved = batch.to(self.device)
        with self.backend.micro_step(last=True):
            frames = moved.frames if self.knows_lengths else None
            self.passes(as_input(moved.volumes, self.config), frames, moved.labels, 1.0)
        if self.config.train.graphs:
            marks.mark()
        marks.mark()
        self.backend.update()
        marks.mark()


class Marks:
    """Points in time on a device; on CUDA they pass by without waiting for it."""

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
        """Between the points, once the device is done."""
        pairs = zip(self.points, self.points[1:], strict=False)
        if self.cuda:
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list of one number once it is over: see ``Turn``."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        # CUDA graphs own memory that does not count as allocated.
        found.append(torch.cuda.max_memory_reserved(device))
        return
    reset_peak_memory()
    before = memory("VmRSS")
    yield found
    found.append(memory("VmHWM") - before)


def serve(connection: Connection, variant: Variant, model: str, threads: int) -> None:
    """The process of a row: it builds the net, and takes a turn when it is told its steps."""
    try:
        torch.set_num_threads(threads)
        row = Row(config_of(variant, model), knows_lengths=variant.knows_lengths)
        connection.send(None)
        while True:
            connection.send(row.turn(connection.recv()))
    except EOFError:
        # The other end is closed: all is done.
        return
    except Exception as error:
        traceback.print_exc()
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


class Process:
    """The other end of ``serve``."""

    def __init__(self, variant: Variant, model: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        arguments = (theirs, variant, model, torch.get_num_threads())
        self.process = spawn.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        # So that the death of the process is the end of what comes from it.
        theirs.close()

    def answer(self) -> Any:
        """Raises ``RuntimeError``: the row failed."""
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"it was killed (exit code {self.process.exitcode})") from None
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    def take_turn(self, steps: list[Ints]) -> Turn:
        self.connection.send(steps)
        turn: Turn = self.answer()
        return turn

    def close(self) -> None:
        """The process ends by itself when its pipe does."""
        self.connection.close()
        self.process.join(10)
        self.process.kill()


# --- all rows -------------------------------------------------------------------------------------


def measure(
    load: Workload, names: Sequence[str], source: str, keep: Callable[[Any], None]
) -> dict[str, Any]:
    """Let the rows take turns.

    Args:
        keep: called with the figures so far after each round, so that a killed bench loses one
            round at most. Shares of the roofline are in the last figures only.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say("ceilings")
    ceilings = measure_ceilings(device, ["fp32", "bf16"])
    has = {"cuda"} if device.type == "cuda" else set()
    if ceilings.flops["bf16"] > ceilings.flops["fp32"]:
        has.add("bf16")
    variants = [BY_NAME[name] for name in names if BY_NAME[name].needs <= has]
    left_out = [name for name in names if BY_NAME[name] not in variants]
    if "bf16" not in has:
        # Rows above it go on in float32, as a run on such a device should.
        say("bf16 is slower than float32 on this device: it is left out of every row")
        variants = [_without_bf16(variant) for variant in variants]
    say(f"{len(variants)} processes")
    turns: dict[str, list[Turn]] = {variant.name: [] for variant in variants}
    failed: dict[str, str] = {}
    facts = {
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
        "left_out": left_out,
    }

    def result(counted_by: Ceilings | None) -> dict[str, Any]:
        figures = {
            v.name: figures_of(v, config_of(v, load.model), load, turns[v.name], device, counted_by)
            for v in variants
            if v.name not in failed and turns[v.name]
        }
        raw = {name: [asdict(turn) for turn in of_row] for name, of_row in turns.items()}
        summary = summary_of(figures)
        return {"summary": summary, "variants": figures, "failed": failed, **facts, "turns": raw}

    with ExitStack() as stack:
        rows = {}
        for variant in variants:
            rows[variant.name] = Process(variant, load.model)
            stack.callback(rows[variant.name].close)
        plans = {v.name: load.turns(config_of(v, load.model)) for v in variants}
        for name, row in rows.items():
            with _noted(failed, name):
                row.answer()
        say("a shallow step of each, which does not count")
        for name, row in _alive(rows, failed):
            with _noted(failed, name):
                row.take_turn([np.full(len(plans[name][0][0]), LEAST_FRAMES)])
        for number in range(load.rounds):
            say(f"round {number + 1} of {load.rounds}")
            # Another one is the first each time.
            order = _alive(rows, failed)
            for name, row in order[number % len(order) :] + order[: number % len(order)]:
                with _noted(failed, name):
                    turns[name].append(row.take_turn(plans[name][number]))
            keep(result(None))
    say("counting operations")
    whole = result(ceilings)
    keep(whole)
    return whole


def _without_bf16(variant: Variant) -> Variant:
    settings = [s for s in settings_of(variant) if s != "train.precision=bf16"]
    return Variant(variant.name, variant.says, tuple(settings), None, variant.knows_lengths)


@contextmanager
def _noted(failed: dict[str, str], name: str) -> Iterator[None]:
    """A row that fails costs itself alone."""
    try:
        yield
    except RuntimeError as error:
        say(f"{name} failed: {error}")
        failed[name] = str(error)


def _alive(rows: dict[str, Process], failed: dict[str, str]) -> list[tuple[str, Process]]:
    return [(name, row) for name, row in rows.items() if name not in failed]


def parameters_of(model: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(model).parameters())


def machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": version("torch"),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def figures_of(
    variant: Variant,
    config: Config,
    load: Workload,
    turns: Sequence[Turn],
    device: torch.device,
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """Of one row. True frames are padded frames times the efficiency of a whole epoch, of which the
    timed steps are too few.

    Args:
        ceilings: of the device that the turns were taken on. None leaves out FLOP/s and the share
            of the roofline, whose counting takes seconds for each shape.
    """
    steps = [np.array(depths) for turn in turns for depths in turn.depths]
    seconds = sum(turn.seconds for turn in turns)
    epoch = load.epoch(config)
    frames = sum(map(padded, steps)) / seconds * efficiency(epoch)
    flops, modelled = 0, 0.0
    for depths in steps if ceilings is not None else ():
        assert ceilings is not None
        shape = (len(depths), 1, int(depths.max()), *config.clip.size)
        operations = counted(load.model, shape, config.train.precision, device)
        flops += sum(operation.flops for operation in operations)
        modelled += ceilings.seconds(operations)
    return {
        "says": variant.says,
        "settings": settings_of(variant),
        "precision": config.train.precision,
        "batch": config.plan.batch,
        "true_frames_per_second": frames,
        "clips_per_second": frames / (np.concatenate(epoch).mean()),
        "efficiency": efficiency(epoch),
        "efficiency_timed": efficiency(steps),
        "ms": {
            part: sum(getattr(turn, part) for turn in turns) / len(steps) * 1e3
            for part in ("seconds", "forward", "backward", "optimizer")
        },
        "peak_bytes": max(turn.peak for turn in turns),
        "flops_per_second": flops / seconds if ceilings else None,
        "roofline_share": modelled / seconds if ceilings else None,
    }


_counted: dict[Any, Any] = {}


def counted(*key: Any) -> Any:
    """``count_step``, once for each shape and precision."""
    if key not in _counted:
        _counted[key] = count_step(*key)
    return _counted[key]


def summary_of(figures: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The goals' figures; None where a row of theirs did not run."""
    fast, original = figures.get("fast"), figures.get("original")
    key = "true_frames_per_second"
    return {
        "fast_vs_original": fast[key] / original[key] if fast and original else None,
        "clips_per_second": fast["clips_per_second"] if fast else None,
        "roofline_share": fast["roofline_share"] if fast else None,
        "original_roofline_share": original["roofline_share"] if original else None,
    }


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    workload, ceilings = result["workload"], result["ceilings"]
    peaks = ", ".join(
        f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings["flops"].items()
    )
    net = f"{workload['model']}, depths x {workload['frames_scale']:g}"
    table = Table(title=f"{net}; ceilings: {peaks}, {ceilings['bandwidth'] / 1e9:.0f} GB/s")
    for heading in ("", "what"):
        table.add_column(heading)
    for heading in (
        "true frames/s", "x", "clips/s", "efficiency", "ms", "forward", "backward", "optimizer",
        "peak MB", "GFLOP/s", "roofline",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    first = next(iter(result["variants"].values()), None)
    for name, row in result["variants"].items():
        assert first is not None
        table.add_row(
            name,
            row["says"],
            f"{row['true_frames_per_second']:.1f}",
            f"{row['true_frames_per_second'] / first['true_frames_per_second']:.2f}",
            f"{row['clips_per_second']:.2f}",
            f"{row['efficiency']:.3f}",
            *(f"{row['ms'][part]:.0f}" for part in ("seconds", "forward", "backward", "optimizer")),
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['flops_per_second'] / 1e9:.0f}",
            f"{row['roofline_share']:.2f}",
        )
    for name, why in result["failed"].items():
        table.add_row(name, f"failed: {why}")
    return table


if __name__ == "__main__":
    main()
