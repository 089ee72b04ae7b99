"""What a checkpoint costs the training that goes on beside it.

Trains a 3D ResNet on small clips, and saves weights and AdamW's moments in the middle of it by the
package's own writer, by torch's `distributed.checkpoint.async_save`, by `torch.save` and by
`accelerator.save_state`, in turns. Of each: for how long a step waits, how much slower the steps
after it are, when the checkpoint is on the disk, what memory it takes, and how long a resume is.
benchmarks/checkpoint.md says how to read the figures.

    python tools/bench_checkpoint.py [--quick] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import finish, memory, options, reset_peak_memory, say
from rich.table import Table
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.checkpoint.format import latest_valid
from dist_train.config import CheckpointSettings, OptimSettings, TrainSettings
from dist_train.data.plan.plan import make_plan
from dist_train.distributed.backends.ddp import DdpBackend
from dist_train.models.registry import build_model
from dist_train.training.ema import Ema
from dist_train.training.optimizer import make_optimizer
from dist_train.training.run_state import RunState

#: Clips of a step, [B, 1, D, H, W]. Small: a step much shorter than a write shows what it costs.
CLIPS = (4, 1, 4, 32, 32)
#: Steps before anything is timed, and least number of them after each save.
WARM_UP, FEWEST_STEPS = 3, 3
CONTENDERS = ("asynchronous", "dcp", "torch_save", "accelerate")
#: These return while the checkpoint is still being written, and sync it themselves.
IN_BACKGROUND = ("asynchronous", "dcp")
KEPT = 1

Seconds = float
Figures = dict[str, list[float]]


def main() -> None:
    parser = options(__doc__, "3 rounds")
    parser.add_argument("--model", default="resnet3d-101", help="default resnet3d-101: 1.02 GB")
    parser.add_argument("--width", type=int, default=64, help="of the model (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind (default 5)")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to write to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint.", dir=arguments.folder) as folder:
        result = measure(
            Path(folder),
            arguments.model,
            arguments.width,
            rounds=3 if arguments.quick else arguments.rounds,
        )
    finish(arguments.json, result, as_table(result))


def measure(folder: Path, model: str, width: int, *, rounds: int) -> dict[str, Any]:
    say(f"{model} of width {width}: {WARM_UP} steps to warm up")
    training = Training(folder, model, width)
    for _ in range(WARM_UP):
        training.step()
    say("memory, and the first save of each kind")
    first = {name: first_save(training, name) for name in CONTENDERS}
    figures: dict[str, Figures] = {name: defaultdict(list) for name in CONTENDERS}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        # Another one is the first each time, as each meets what the one before left to the disk.
        for place in range(len(CONTENDERS)):
            name = CONTENDERS[(number + place) % len(CONTENDERS)]
            for what, value in asdict(saved_beside(training, name)).items():
                figures[name][what].append(value)
    say("resuming")
    loads: Figures = defaultdict(list)
    verify = []
    for _ in range(3):
        for name in CONTENDERS:
            loads[name].append(resume(training, name))
        forget_files(training.state.folder)
        verify.append(seconds(lambda: latest_valid(training.state.folder)))
    training.close()
    return {
        "summary": summarise(figures, first, loads, verify, training.state_bytes),
        "first": {name: asdict(save) for name, save in first.items()},
        "rounds": figures,
        "resume_s": loads,
        "verify_s": verify,
        "model": {"name": model, "width": width, "state_bytes": training.state_bytes},
        "device": str(training.backend.device),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "accelerate", "safetensors")},
    }


# --- the training ---------------------------------------------------------------------------------


class Training:
    """A run of one process in its middle: real steps, and its state to be saved."""

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
            CheckpointSettings(keep_last=KEPT),
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
        # It keeps its host copies for the next save, as the package does, but can on CUDA only.
        self.dcp_writer = FileSystemWriter(folder / "dcp", cache_staged_state_dict=cuda)
        self.dcp_save: Future[Any] | None = None

    def step(self) -> Seconds:
        """One step as training/trainer.py takes it, with what ranks tell each other after it."""
        backend = self.backend
        began = time.perf_counter()
        with backend.micro_step(last=True):
            logits = backend.model(self.volumes, self.frames)
            backend.backward(binary_cross_entropy_with_logits(logits.float(), self.labels))
        # It ends with a figure on the host, so nothing is left to do on the device.
        backend.update()
        backend.sums([self.state.writer.ready])
        self.done += 1
        return time.perf_counter() - began

    @property
    def state_bytes(self) -> int:
        tensors = self.backend.state(lambda _: True)
        return sum(tensor.nbytes for tensor in tensors.values())

    def close(self) -> None:
        self.state.writer.finish()
        self.backend.close()


# --- saving ---------------------------------------------------------------------------------------


def save_asynchronously(training: Training) -> Path:
    """Only begins it."""
    logits = np.zeros(1000, np.float32)
    training.state.save(training.done, logits, logits, {}, {})
    return training.state.folder


def save_by_dcp(training: Training) -> Path:
    """Only begins it."""
    saving = async_save(state_dicts(training), storage_writer=training.dcp_writer)
    assert isinstance(saving, Future)
    training.dcp_save = saving
    return training.folder / "dcp"


def save_by_torch(training: Training) -> Path:
    folder = training.folder / "torch_save"
    folder.mkdir(exist_ok=True)
    torch.save(state_dicts(training), folder / "state.pt")
    return folder


def state_dicts(training: Training) -> dict[str, Any]:
    return {
        "model": training.backend.module.state_dict(),
        "optimizer": training.backend.optimizer.state_dict(),
    }


def save_by_accelerate(training: Training) -> Path:
    folder = training.folder / "accelerate"
    training.backend.accelerator.save_state(str(folder))
    return folder


SAVE: dict[str, Callable[[Training], Path]] = {
    "asynchronous": save_asynchronously,
    "dcp": save_by_dcp,
    "torch_save": save_by_torch,
    "accelerate": save_by_accelerate,
}


def is_written(training: Training) -> bool:
    """Whether nothing but ``complete`` is left of a save in the background."""
    save = training.dcp_save
    return training.state.writer.ready or (save is not None and save.done())


def complete(training: Training) -> None:
    training.state.writer.commit()
    save, training.dcp_save = training.dcp_save, None
    if save is not None:
        save.result()


@dataclass(frozen=True)
class Save:
    """One checkpoint, in seconds.

    Attributes:
        stall: for which no step could be taken.
        durable: from its beginning until it is on the disk, synced.
        sync: of that, what syncing by hand took; 0 where the writer does it itself.
        slowdown: by which the steps after it took longer than those before it.
        step: one of those before it.
    """

    stall: Seconds
    durable: Seconds
    sync: Seconds
    slowdown: Seconds
    step: Seconds


def saved_beside(training: Training, name: str) -> Save:
    """Some steps, a save, and steps until it is complete, but at least as many as before."""
    empty_folder(training, name)
    plain = [training.step() for _ in range(FEWEST_STEPS)]
    began = time.perf_counter()
    folder = SAVE[name](training)
    stall = time.perf_counter() - began
    sync = 0.0
    if name not in IN_BACKGROUND:
        # These leave their files to the system, which may lose them for half a minute.
        sync = seconds(lambda: sync_files(folder))
        durable = stall + sync
    later: list[Seconds] = []
    pending = name in IN_BACKGROUND
    while pending or len(later) < FEWEST_STEPS:
        later.append(training.step())
        if pending and is_written(training):
            stall += seconds(lambda: complete(training))
            durable = time.perf_counter() - began
            pending = False
    plain += [training.step() for _ in range(FEWEST_STEPS)]
    step = statistics.median(plain)
    return Save(stall, durable, sync, sum(later) - len(later) * step, step)


def empty_folder(training: Training, name: str) -> None:
    """As in a run, whose files all are new; the package's writer removes its own."""
    if name != "asynchronous":
        shutil.rmtree(training.folder / name, ignore_errors=True)


def sync_files(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class FirstSave:
    """Of its kind in the process: seconds without a step, and host memory in bytes by which the
    process grew at most meanwhile (None where the system does not tell) and at its end."""

    stall: Seconds
    peak: int | None
    kept: int


def first_save(training: Training, name: str) -> FirstSave:
    """While no steps are taken."""
    before = memory("VmRSS")
    told = reset_peak_memory()
    stall = seconds(lambda: SAVE[name](training))
    complete(training)
    return FirstSave(
        stall,
        memory("VmHWM") - before if told else None,
        memory("VmRSS") - before,
    )


# --- resuming -------------------------------------------------------------------------------------


def resume(training: Training, name: str) -> Seconds:
    """Until the state of the last save is in place, from the disk: as on a node that starts."""
    backend = training.backend
    forget_files(training.folder / name)

    def by_dcp() -> None:
        state = state_dicts(training)
        load_dcp(state, checkpoint_id=training.folder / "dcp")
        backend.optimizer.load_state_dict(state["optimizer"])

    def by_torch() -> None:
        state = torch.load(
            training.folder / "torch_save" / "state.pt", map_location="cpu", weights_only=True
        )
        backend.module.load_state_dict(state["model"])
        backend.optimizer.load_state_dict(state["optimizer"])

    load: dict[str, Callable[[], object]] = {
        "asynchronous": training.state.restore,
        "dcp": by_dcp,
        "torch_save": by_torch,
        "accelerate": lambda: backend.accelerator.load_state(str(training.folder / "accelerate")),
    }
    return seconds(load[name])


def forget_files(folder: Path) -> None:
    """Take them out of the system's cache; they are synced."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(act: Callable[[], object]) -> Seconds:
    began = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


# --- the figures ----------------------------------------------------------------------------------


def summarise(
    figures: dict[str, Figures],
    first: dict[str, FirstSave],
    loads: Figures,
    verify: Sequence[Seconds],
    state_bytes: int,
) -> dict[str, float | None]:
    """Medians over the rounds, and ratios of them."""
    own, by_dcp, by_torch, by_accelerate = (
        {what: statistics.median(values) for what, values in figures[name].items()}
        for name in CONTENDERS
    )
    resumes = {name: statistics.median(times) for name, times in loads.items()}
    peak = first["asynchronous"].peak
    cost = own["stall"] + own["slowdown"]
    cost_of_dcp = by_dcp["stall"] + by_dcp["slowdown"]
    return {
        "stall_vs_torch_save": own["stall"] / by_torch["stall"],
        "stall_vs_accelerate": own["stall"] / by_accelerate["stall"],
        "stall_vs_dcp": own["stall"] / by_dcp["stall"],
        "stall_vs_torch_save_synced": own["stall"] / by_torch["durable"],
        "stall_vs_accelerate_synced": own["stall"] / by_accelerate["durable"],
        "stall_s": own["stall"],
        "first_stall_s": first["asynchronous"].stall,
        "slowdown_s": own["slowdown"],
        "cost_vs_torch_save": cost / (by_torch["stall"] + by_torch["slowdown"]),
        "cost_vs_accelerate": cost / (by_accelerate["stall"] + by_accelerate["slowdown"]),
        "cost_vs_dcp": cost / cost_of_dcp,
        "durable_s": own["durable"],
        "durable_vs_dcp": own["durable"] / by_dcp["durable"],
        "verify_s": statistics.median(verify),
        "resume_s": resumes["asynchronous"],
        "resume_vs_torch_load": resumes["asynchronous"] / resumes["torch_save"],
        "resume_vs_dcp": resumes["asynchronous"] / resumes["dcp"],
        "resume_vs_accelerate": resumes["asynchronous"] / resumes["accelerate"],
        "extra_memory_vs_state": None if peak is None else peak / state_bytes,
    }


def as_table(result: dict[str, Any]) -> Table:
    summary, rounds, first = result["summary"], result["rounds"], result["first"]
    device = result["device"].partition(":")[0]
    size = result["model"]["state_bytes"] / 1e9
    table = Table(title=f"{size:.2f} GB of state, {device}; seconds, median (best)")
    for heading in ("", "this package", "async_save", "torch.save", "accelerate", "goal"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(label: str, cells: Sequence[str], goal: str = "") -> None:
        table.add_row(label, *cells, goal)

    def measured(what: str, *names: str) -> list[str]:
        return [spread(rounds[name][what]) if name in names else "" for name in CONTENDERS]

    row("a step waits", measured("stall", *CONTENDERS))
    row("  at the first save", [f"{first[name]['stall']:.3f}" for name in CONTENDERS])
    row("steps after it lose", measured("slowdown", *CONTENDERS))
    row("on the disk, synced, after", measured("durable", *CONTENDERS))
    row("  of that, syncing by hand", measured("sync", *CONTENDERS[2:]))
    row("a step, otherwise", measured("step", *CONTENDERS))
    row("resume", [spread(result["resume_s"][name]) for name in CONTENDERS])
    row("  of that, choosing one that is whole", [spread(result["verify_s"]), "", "", ""])
    peaks = [first[name]["peak"] for name in CONTENDERS]
    row("peak memory, GB", ["?" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks])
    row("  of it kept", [f"{max(0, first[name]['kept']) / 1e9:.2f}" for name in CONTENDERS])
    table.add_section()
    goal = "<= 0.05" if device == "cuda" else "<= 0.25"
    for label, names, aim in (
        (
            "a step waits, over theirs",
            ("stall_vs_dcp", "stall_vs_torch_save", "stall_vs_accelerate"),
            goal,
        ),
        (
            "  over theirs and a sync",
            ("stall_vs_dcp", "stall_vs_torch_save_synced", "stall_vs_accelerate_synced"),
            "",
        ),
        (
            "all it costs, over theirs",
            ("cost_vs_dcp", "cost_vs_torch_save", "cost_vs_accelerate"),
            "< 1",
        ),
        (
            "resume, over theirs",
            ("resume_vs_dcp", "resume_vs_torch_load", "resume_vs_accelerate"),
            "",
        ),
    ):
        row(label, ["", *(f"{summary[name]:.3f}" for name in names)], aim)
    return table


def spread(times: Sequence[Seconds]) -> str:
    return f"{statistics.median(times):.3f} ({min(times):.3f})"


if __name__ == "__main__":
    main()
