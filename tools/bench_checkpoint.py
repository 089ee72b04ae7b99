"""What a checkpoint costs the training that continues beside it.

Trains a 3D ResNet on small clips, and saves weights and AdamW's moments meanwhile by the package's
own writer, by torch's `distributed.checkpoint.async_save`, by `torch.save` and by
`accelerator.save_state`, in turns. For each it measures how long a step waits, how much slower the
next steps are, when the checkpoint is on the disk, its memory, and the time of a resume.
benchmarks/checkpoint.md explains the results.

    python tools/bench_checkpoint.py [--quick] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import (
    finish,
    in_turns,
    memory,
    new_table,
    options,
    reset_peak_memory,
    say,
    seconds,
    versions,
)
from plans import make_plan
from rich.table import Table
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.checkpoint.format import latest_valid
from dist_train.config import CheckpointSettings, OptimSettings, TrainSettings
from dist_train.distributed.backends.ddp import DdpBackend
from dist_train.files import sync_folder
from dist_train.models.registry import build_model
from dist_train.training.ema import Ema
from dist_train.training.optimizer import make_optimizer
from dist_train.training.run_state import RunState

#: Clips of a step, [B, 1, D, H, W]. Small: a step much shorter than a write shows its cost.
CLIPS = (4, 1, 4, 32, 32)
#: Steps before anything is timed, and least number of steps after each save.
WARM_UP, FEWEST_STEPS = 3, 3
CONTENDERS = ("asynchronous", "dcp", "torch_save", "accelerate")
#: These return while the checkpoint is still being written, and sync it themselves.
IN_BACKGROUND = ("asynchronous", "dcp")
#: Rounds of resuming.
RESUMES = 3

Seconds = float
Samples = dict[str, list[float]]


def main() -> None:
    parser = options(__doc__, "3 rounds")
    parser.add_argument("--model", default="resnet3d-101", help="default resnet3d-101: 1.02 GB")
    parser.add_argument("--width", type=int, default=64, help="of the model (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind (default 5)")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to write to")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint.", dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.model, arguments.width, rounds)
    finish(arguments.json, result, as_table(result))


def measure(folder: Path, model: str, width: int, rounds: int) -> dict[str, Any]:
    say(f"{model} of width {width}: {WARM_UP} steps to warm up")
    training = Training(folder, model, width)
    for _ in range(WARM_UP):
        training.step()
    say("memory, and the first save of each kind")
    first = {name: first_save(training, name) for name in CONTENDERS}
    names = [field.name for field in fields(Save)]
    saves: dict[str, Samples] = {name: {part: [] for part in names} for name in CONTENDERS}
    for name in in_turns(CONTENDERS, rounds):
        for part, value in asdict(saved_beside(training, name)).items():
            saves[name][part].append(value)
    say("resuming")
    loads: Samples = {name: [] for name in CONTENDERS}
    verify = []
    for _ in range(RESUMES):
        for name in CONTENDERS:
            loads[name].append(resume(training, name))
        drop_from_cache(training.state.folder)
        verify.append(training.seconds(lambda: latest_valid(training.state.folder)))
    training.close()
    return {
        "summary": summarise(saves, first, loads, verify, training.state_bytes),
        "first": {name: asdict(save) for name, save in first.items()},
        "rounds": saves,
        "resume_s": loads,
        "verify_s": verify,
        "model": {"name": model, "width": width, "state_bytes": training.state_bytes},
        "device": str(training.backend.device),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "accelerate", "safetensors"),
    }


# --- the training ---------------------------------------------------------------------------------


class Training:
    """A training run of one process, with real steps, whose state is saved."""

    def __init__(self, folder: Path, name: str, width: int) -> None:
        cuda = torch.cuda.is_available()
        settings = TrainSettings(precision="bf16" if cuda else "fp32")
        self.backend = DdpBackend(settings, clip_norm=1.0)
        torch.manual_seed(0)
        model = build_model(name, width=width)
        # The stubs of nn.Module.to lack memory_format on its own.
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.backend.wrap(model, lambda wrapped: make_optimizer(wrapped, OptimSettings(lr=1e-4)))
        plan = make_plan(np.arange(8), np.arange(8, 32), batch=4, ratio=(1, 3), seed=0)
        self.folder = folder
        self.state = RunState(
            folder / "asynchronous",
            self.backend,
            Ema(self.backend, None),
            lambda _: plan,
            CheckpointSettings(keep_last=1),
            seed=0,
            model={"name": name, "width": width},
            store="none",
            content="none",
        )
        device = self.backend.device
        clips = torch.rand(CLIPS, device=device)
        self.volumes = clips.contiguous(memory_format=torch.channels_last_3d)
        self.frames = torch.full(CLIPS[:1], CLIPS[2], device=device)
        self.labels = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)
        self.done = 0
        # On CUDA it keeps its host copies for the next save, as the package does.
        self.dcp_writer = FileSystemWriter(folder / "dcp", cache_staged_state_dict=cuda)
        self.dcp_save: Future[Any] | None = None

    def step(self) -> Seconds:
        """Take one step as training/trainer.py does, with the exchange between ranks after it."""
        backend = self.backend
        began = time.perf_counter()
        with backend.accumulating(last=True):
            logits = backend.model(self.volumes, self.frames)
            backend.backward(binary_cross_entropy_with_logits(logits.float(), self.labels))
        # It returns a number to the host, so the device has finished.
        backend.update()
        backend.sums([self.state.writer.ready])
        self.done += 1
        return time.perf_counter() - began

    @property
    def state_bytes(self) -> int:
        tensors = self.backend.state(lambda _: True)
        return sum(tensor.nbytes for tensor in tensors.values())

    def seconds(self, work: Callable[[], object]) -> Seconds:
        return seconds(work, self.backend.device)

    def close(self) -> None:
        self.state.writer.finish()
        self.backend.close()


# --- saving ---------------------------------------------------------------------------------------


def save(training: Training, name: str) -> None:
    """Save the state; the contenders of ``IN_BACKGROUND`` only begin to."""
    folder = training.folder / name
    match name:
        case "asynchronous":
            logits = np.zeros(1000, np.float32)
            training.state.save(training.done, logits, logits, {}, {})
        case "dcp":
            saving = async_save(state_dicts(training), storage_writer=training.dcp_writer)
            assert isinstance(saving, Future)
            training.dcp_save = saving
        case "torch_save":
            folder.mkdir(exist_ok=True)
            torch.save(state_dicts(training), folder / "state.pt")
        case _:
            training.backend.accelerator.save_state(str(folder))


def state_dicts(training: Training) -> dict[str, Any]:
    return {
        "model": training.backend.module.state_dict(),
        "optimizer": training.backend.optimizer.state_dict(),
    }


def is_written(training: Training) -> bool:
    """Whether only ``complete`` remains of a save in the background."""
    saving = training.dcp_save
    return training.state.writer.ready or (saving is not None and saving.done())


def complete(training: Training) -> None:
    training.state.writer.commit()
    saving, training.dcp_save = training.dcp_save, None
    if saving is not None:
        saving.result()


@dataclass(frozen=True)
class Save:
    """One checkpoint, in seconds.

    Attributes:
        stall: during which no step could be taken.
        durable: from the beginning until it is on the disk, synced.
        sync: part of ``durable``: syncing by hand; 0 if the writer syncs.
        slowdown: extra time of the steps after it, in all.
        step: a step before or after it.
    """

    stall: Seconds
    durable: Seconds
    sync: Seconds
    slowdown: Seconds
    step: Seconds


def saved_beside(training: Training, name: str) -> Save:
    """Take steps, save, take steps until the save is complete, and take steps again."""
    if name != "asynchronous":
        # As in a run, all files are new; the package's writer removes its own.
        shutil.rmtree(training.folder / name, ignore_errors=True)
    plain = [training.step() for _ in range(FEWEST_STEPS)]
    began = time.perf_counter()
    save(training, name)
    stall = durable = time.perf_counter() - began
    sync = 0.0
    pending = name in IN_BACKGROUND
    if not pending:
        # The system may keep these files in memory for half a minute.
        sync = training.seconds(lambda: sync_files(training.folder / name))
        durable += sync
    later: list[Seconds] = []
    while pending or len(later) < FEWEST_STEPS:
        later.append(training.step())
        if pending and is_written(training):
            stall += training.seconds(lambda: complete(training))
            durable = time.perf_counter() - began
            pending = False
    plain += [training.step() for _ in range(FEWEST_STEPS)]
    step = statistics.median(plain)
    return Save(stall, durable, sync, sum(later) - len(later) * step, step)


def sync_files(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)


@dataclass(frozen=True)
class FirstSave:
    """The first save of its kind: seconds without a step, and by how many bytes the process grew,
    at the peak (None if the system does not tell) and at the end."""

    stall: Seconds
    peak: int | None
    kept: int


def first_save(training: Training, name: str) -> FirstSave:
    """Save while no steps are taken."""
    before = memory("VmRSS")
    told = reset_peak_memory()
    stall = training.seconds(lambda: save(training, name))
    complete(training)
    peak = memory("VmHWM") - before if told else None
    return FirstSave(stall, peak, memory("VmRSS") - before)


# --- resuming -------------------------------------------------------------------------------------


def resume(training: Training, name: str) -> Seconds:
    """Seconds until the last saved state is restored from the disk, as on a node that starts."""
    drop_from_cache(training.folder / name)
    return training.seconds(partial(load, training, name))


def load(training: Training, name: str) -> None:
    backend, folder = training.backend, training.folder / name
    match name:
        case "asynchronous":
            training.state.restore()
        case "accelerate":
            backend.accelerator.load_state(str(folder))
        case "dcp":
            state = state_dicts(training)
            load_dcp(state, checkpoint_id=folder)
            backend.optimizer.load_state_dict(state["optimizer"])
        case _:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            backend.module.load_state_dict(state["model"])
            backend.optimizer.load_state_dict(state["optimizer"])


def drop_from_cache(folder: Path) -> None:
    """Drop synced files from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- the results ----------------------------------------------------------------------------------


def summarise(
    saves: dict[str, Samples],
    first: dict[str, FirstSave],
    loads: Samples,
    verify: Sequence[Seconds],
    state_bytes: int,
) -> dict[str, float | None]:
    """Medians over the rounds, and ratios of them."""
    medians = {
        name: {part: statistics.median(values) for part, values in of_name.items()}
        | {"resume": statistics.median(loads[name])}
        for name, of_name in saves.items()
    }
    for of_name in medians.values():
        of_name["cost"] = of_name["stall"] + of_name["slowdown"]
    own = medians["asynchronous"]
    summary: dict[str, float | None] = {
        "stall_s": own["stall"],
        "first_stall_s": first["asynchronous"].stall,
        "slowdown_s": own["slowdown"],
        "durable_s": own["durable"],
        "durable_vs_dcp": own["durable"] / medians["dcp"]["durable"],
        "verify_s": statistics.median(verify),
        "resume_s": own["resume"],
    }
    for name in CONTENDERS[1:]:
        other = medians[name]
        summary[f"stall_vs_{name}"] = own["stall"] / other["stall"]
        if name not in IN_BACKGROUND:
            summary[f"stall_vs_{name}_synced"] = own["stall"] / other["durable"]
        summary[f"cost_vs_{name}"] = own["cost"] / other["cost"]
        peer = "torch_load" if name == "torch_save" else name
        summary[f"resume_vs_{peer}"] = own["resume"] / other["resume"]
    peak = first["asynchronous"].peak
    return summary | {"extra_memory_vs_state": None if peak is None else peak / state_bytes}


def as_table(result: dict[str, Any]) -> Table:
    summary, rounds, first = result["summary"], result["rounds"], result["first"]
    device = result["device"].partition(":")[0]
    size = result["model"]["state_bytes"] / 1e9
    table = new_table(
        f"{size:.2f} GB of state, {device}; seconds, median (best)",
        *("", "this package", "async_save", "torch.save", "accelerate", "goal"),
    )
    for label, part in (
        ("a step waits", "stall"),
        ("steps after it lose", "slowdown"),
        ("on the disk, synced, after", "durable"),
        ("  part of it: syncing by hand", "sync"),
        ("a step, otherwise", "step"),
    ):
        table.add_row(label, *(spread(rounds[name][part]) for name in CONTENDERS))
    table.add_row("resume", *(spread(result["resume_s"][name]) for name in CONTENDERS))
    table.add_row("  part of it: choosing a valid one", spread(result["verify_s"]))
    table.add_row("first save: a step waits", *(f"{first[n]['stall']:.3f}" for n in CONTENDERS))
    for label, part in (("  peak memory, GB", "peak"), ("  memory kept, GB", "kept")):
        sizes = [first[name][part] for name in CONTENDERS]
        table.add_row(label, *("?" if size is None else f"{size / 1e9:.2f}" for size in sizes))
    table.add_section()
    stall_goal = "<= 0.05" if device == "cuda" else "<= 0.25"
    for label, names, goal in (
        ("a step waits, ratio", "stall_vs_dcp stall_vs_torch_save stall_vs_accelerate", stall_goal),
        ("  to theirs with sync", "stall_vs_torch_save_synced stall_vs_accelerate_synced", ""),
        ("all costs, ratio", "cost_vs_dcp cost_vs_torch_save cost_vs_accelerate", "< 1"),
        ("resume, ratio", "resume_vs_dcp resume_vs_torch_load resume_vs_accelerate", ""),
    ):
        cells = [f"{summary[name]:.3f}" for name in names.split()]
        table.add_row(label, *[""] * (len(CONTENDERS) - len(cells)), *cells, goal)
    return table


def spread(times: Sequence[Seconds]) -> str:
    return f"{statistics.median(times):.3f} ({min(times):.3f})"


if __name__ == "__main__":
    main()
