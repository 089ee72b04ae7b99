"""Faults as objects. Each strikes one rank at one step, once in a run's life."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint import writer
from dist_train.checkpoint.format import by_step, rank_file
from dist_train.checkpoint.tensor_file import write_tensors
from dist_train.training.trainer import Trainer


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        rank: where it strikes; None is everywhere.
        step: it strikes before the forward pass of this step, from 0.
        name: the name of a file that notes that it struck; None strikes each time.
    """

    rank: int | None
    step: int
    name: str | None = None

    def is_due(self, trainer: Trainer, step: int, struck: Path) -> bool:
        if step != self.step or self.rank not in (None, trainer.backend.rank):
            return False
        if self.name is None:
            return True
        try:
            (struck / f"{self.name}.{trainer.backend.rank}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def strike(self, trainer: Trainer) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Signal(Fault):
    """The process sends a signal to itself; or to its launcher, its parent."""

    number: int = signal.SIGKILL
    to_launcher: bool = False

    def strike(self, trainer: Trainer) -> None:
        os.kill(os.getppid() if self.to_launcher else os.getpid(), self.number)


@dataclass(frozen=True)
class NotANumber(Fault):
    """The model's output of this step is NaN, and so are loss, gradients and statistics."""

    value: float = float("nan")

    def strike(self, trainer: Trainer) -> None:
        def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            handle.remove()
            # A step that is left out has no forward pass.
            return output * self.value if trainer.done == self.step else output

        handle = trainer.backend.module.register_forward_hook(spoil)


@dataclass(frozen=True)
class InfiniteGradient(Fault):
    """One weight's gradient of this step is inf on this rank; the loss is right."""

    def strike(self, trainer: Trainer) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            return gradient * float("inf")

        handle = next(trainer.backend.module.parameters()).register_hook(spoil)


@dataclass(frozen=True)
class ShortMemory(Fault):
    """From this step on, as soon as there is a checkpoint to go on from, the rank has memory for at
    most ``clips`` clips at once."""

    clips: int = 4

    def strike(self, trainer: Trainer) -> None:
        def check(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            is_saved = bool(by_step(trainer.config.out / "checkpoints"))
            if module.training and len(inputs[0]) > self.clips and is_saved:
                raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

        # In the last block, as the others wait for this rank's statistics there.
        trainer.backend.module.blocks[-1].register_forward_pre_hook(check)


@dataclass(frozen=True)
class KilledWriting(Fault):
    """The process is killed after writing half of its file of the next checkpoint."""

    def strike(self, trainer: Trainer) -> None:
        def half(path: Path, tensors: Any) -> Any:
            write_tensors(path, tensors)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        writer.write_tensors = half


@dataclass(frozen=True)
class KilledPublishing(Fault):
    """The process is killed just before the next checkpoint is renamed."""

    def strike(self, trainer: Trainer) -> None:
        def kill(final: Path, *, foreign: bool) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        writer._make_way = kill


@dataclass(frozen=True)
class Hang(Fault):
    """The process hangs; with ``lock``, it holds Python's lock, so that all its threads hang."""

    lock: bool = False

    def strike(self, trainer: Trainer) -> None:
        if self.lock:
            ctypes.PyDLL(None).sleep(3600)  # a PyDLL's functions are called with the lock held
        while True:
            time.sleep(3600)


@dataclass(frozen=True)
class Slow(Fault):
    """From this step on, the rank's first convolution takes ``seconds`` longer."""

    seconds: float = 0.02

    def strike(self, trainer: Trainer) -> None:
        first = next(m for m in trainer.backend.module.modules() if isinstance(m, torch.nn.Conv3d))
        # A wrapper of its forward rather than a hook, as a slow device is slow inside.
        inner = first.forward

        def slow(input: torch.Tensor) -> torch.Tensor:
            time.sleep(self.seconds)
            return inner(input)

        first.forward = slow


@dataclass(frozen=True)
class OtherWeights(Fault):
    """One weight changes by a last bit on this rank alone, as by a bad memory chip."""

    weight: str = ""

    def strike(self, trainer: Trainer) -> None:
        with torch.no_grad():
            value = dict(trainer.backend.module.named_parameters())[self.weight].view(-1)
            value[-1:] = torch.nextafter(value[-1:], torch.tensor(9.0))


@dataclass(frozen=True)
class OtherStep(Fault):
    """This rank takes another step."""

    def strike(self, trainer: Trainer) -> None:
        take = trainer.step.take
        trainer.step.take = lambda number, batches, **how: take(number + 1, batches, **how)


@dataclass(frozen=True)
class Torn(Fault):
    """The newest checkpoint loses the end of a file, and the process is killed, as if power had
    been lost before the last bytes reached the disk."""

    def strike(self, trainer: Trainer) -> None:
        found = by_step(trainer.config.out / "checkpoints")
        if found:
            file = found[-1][1] / rank_file(0)
            os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class ClockJump(Fault):
    """The wall clock jumps by ``hours``."""

    hours: float = 0.0

    def strike(self, trainer: Trainer) -> None:
        true_time = time.time
        time.time = lambda: true_time() + 3600 * self.hours


@dataclass(frozen=True)
class Runs(Fault):
    """A shell command, which must succeed."""

    command: str = ""

    def strike(self, trainer: Trainer) -> None:
        assert os.system(self.command) == 0


KINDS = {kind.__name__: kind for kind in Fault.__subclasses__()}


def as_json(fault: Fault) -> dict[str, Any]:
    return {"kind": type(fault).__name__} | fault.__dict__


def from_json(content: Mapping[str, Any]) -> Fault:
    settings = dict(content)
    return KINDS[settings.pop("kind")](**settings)


@dataclass
class Injector:
    """A ``before_step`` of ``train``."""

    faults: Sequence[Fault]
    struck: Path

    def __call__(self, trainer: Trainer, step: int) -> None:
        for fault in self.faults:
            if fault.is_due(trainer, step, self.struck):
                fault.strike(trainer)
