"""How large a micro-batch memory allows: tried before the first step, noted in the run's folder,
and made smaller when memory runs out all the same.

A step's clips are cut into processes x accumulation steps, and each piece is a micro-batch of whole
groups of positives and negatives. Fewer clips at once are more accumulation steps of the same
global batch. docs/activations.md has what that changes, and why several processes start again.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.config import Config
from dist_train.data.plan.plan import Plan
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import on_main
from dist_train.distributed.foreach import by_dtype
from dist_train.distributed.hardware import cudnn_version
from dist_train.distributed.out_of_memory import NO_ENGINE, is_out_of_memory
from dist_train.errors import DistTrainError, RunError
from dist_train.files import MIB, parse_object, read_plain, reason_of, write_whole
from dist_train.models.activation_budget import Choice, choose_plan, in_units, measure_parts
from dist_train.models.largest_tensor import INDEXED_BY_32_BITS, largest_tensor
from dist_train.models.norm import share_statistics
from dist_train.models.resnet3d import PARTS, ResNet3D
from dist_train.run.data import RunData
from dist_train.run.model import as_input, configured_model, make_model
from dist_train.system.advice import first_line

log = logging.getLogger(__name__)

#: In a run's folder: the most clips that a micro-batch may hold, and of which settings that holds.
NOTE = "micro_batch.json"
#: Of the device's memory, for what comes later: fragments, and buffers of communication.
MARGIN = 1 / 20
#: Of the weights' size: AdamW's two moments, and the gradients once more, to be exchanged.
COPIES = 3


def cuts(plan: Plan, world: int, accumulate: int) -> list[int]:
    """Numbers of accumulation steps that cut a step into whole groups: ``accumulate``, then each
    the next that is at least twice as large, and last that of one group at a time.

    Raises:
        PlanError: ``accumulate`` itself does not cut it so.
    """
    plan.check_cut(world, accumulate)
    groups = plan.batch // plan.ratio.group // world
    found = [accumulate]
    for more in range(2 * accumulate, groups + 1):
        if groups % more == 0 and more >= 2 * found[-1]:
            found.append(more)
    return found if found[-1] == groups else [*found, groups]


def largest_step(plan: Plan, deepest: int) -> tuple[int, int]:
    """Clips and frames of the step that takes the most memory.

    Args:
        deepest: frames of the deepest clip. Under a voxel budget only a step of a single block may
            hold it; others are as deep as the budget has room for.
    """
    steps = [(plan.batch, deepest)]
    if plan.rules.max_voxels is not None:
        runs = {int(n) for edges in plan.epochs.runs.values() for n in edges[1:] - edges[:-1]}
        for clips in (n * plan.batch for n in runs if n > 1):
            room = plan.rules.max_voxels // (clips * plan.rules.frame_voxels)
            steps.append((clips, min(room, deepest)))
    return max(steps, key=lambda step: step[0] * step[1])


def first_indexed(plan: Plan, world: int, accumulate: int, elements: int) -> int:
    """The first of ``cuts`` whose micro-batches' tensors CUDA's kernels can index with 32 bits; the
    last one where none is so small.

    Args:
        elements: of the largest tensor of a whole step's clips, those of all processes.
    """
    found = cuts(plan, world, accumulate)
    fitting = (cut for cut in found if elements // (world * cut) < INDEXED_BY_32_BITS)
    return next(fitting, found[-1])


def most_clips(config: Config, frames: int, elements: int = INDEXED_BY_32_BITS - 1) -> int:
    """So many clips of ``frames`` frames can be run at once if the largest tensor may have so many
    elements; at least 1. Unless given, that is what kernels can index with 32 bits."""
    return max(1, elements // _elements_of_a_clip(config, frames))


def noted_clips(run: Path) -> int | None:
    """The most clips of a micro-batch by the note of a run, on whatever device its sessions ran;
    None without a note that can be read."""
    try:
        clips = int(json.loads((run / NOTE).read_text(encoding="utf-8"))["clips"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return clips if clips > 0 else None


def _elements_of_a_clip(config: Config, frames: int) -> int:
    """Its share of the largest tensor of a batch."""
    return largest_tensor(lambda: _plain_model(config), (1, 1, frames, *config.clip.size))


def _plain_model(config: Config) -> nn.Module:
    """Without compiled loops, which can run on real data alone."""
    return configured_model(config.model)


class MicroBatches:
    """How the steps of a run are cut, on this machine. The same on all ranks.

    Attributes:
        accumulate: micro-batches of a step.
        chosen: what is recomputed within ``model.activation_memory``; None without that.
    """

    def __init__(self, config: Config, data: RunData, plan: Plan, backend: Backend) -> None:
        """A collective call, before the backend takes over the model.

        Raises:
            PlanError: ``train.accumulate`` cannot cut the steps.
            RunError: memory does not suffice for the smallest micro-batch.
            ModelError: ``model.activation_memory`` does not suffice for what ``train.accumulate``
                makes of a step.
        """
        self.config, self.plan, self.backend = config, plan, backend
        self.step_clips, self.frames = largest_step(plan, data.deepest())
        self.note = _Note(config, backend.device)
        self.accumulate = config.train.accumulate
        plan.check_cut(backend.world, self.accumulate)
        if backend.device.type == "cuda":
            self._cut_to_32_bits()
        self.chosen: Choice | None = on_main(backend, self._choose)
        known = on_main(backend, self.note.read)
        while known is not None and self.clips > known and not self._is_smallest():
            self.accumulate = cuts(plan, backend.world, self.accumulate)[1]
        if config.train.probe == "always" or (
            config.train.probe == "cuda" and backend.device.type == "cuda"
        ):
            self._find()

    @property
    def clips(self) -> int:
        """Clips of a micro-batch, of a step of one block."""
        return self.plan.batch // (self.backend.world * self.accumulate)

    def make_model(self) -> nn.Module:
        """The run's model, which recomputes what was chosen."""
        model = make_model(self.config)
        if self.chosen is not None:
            assert isinstance(model, ResNet3D)
            model.recompute = self.chosen.plan
        return model

    def facts(self) -> dict[str, Any]:
        """What is done, for the run's record: JSON types."""
        facts: dict[str, Any] = {"clips": self.clips, "accumulate": self.accumulate}
        if self.chosen is not None:
            facts["recompute"] = dict(zip(PARTS, self.chosen.plan, strict=True))
            facts["activation_bytes"] = self.chosen.bytes
        return facts

    def halve(self, reason: str) -> None:
        """The next smaller micro-batch, and a note of it; on one rank, which decides for all that
        start again.

        Args:
            reason: the error that memory ran out with.

        Raises:
            RunError: it is one group of positives and negatives already.
        """
        self.accumulate = self._next(reason)
        self.write_note()

    def write_note(self) -> None:
        """Note the size for sessions to come, if it is not what the settings say."""
        if self.accumulate != self.config.train.accumulate:
            self.note.write(self.clips)

    def _is_smallest(self) -> bool:
        return len(cuts(self.plan, self.backend.world, self.accumulate)) == 1

    def _next(self, reason: str) -> int:
        if not self._is_smallest():
            return cuts(self.plan, self.backend.world, self.accumulate)[1]
        ratio = self.plan.ratio
        fix = "Set model.recompute or model.activation_memory, or lower clip.max_frames."
        if NO_ENGINE in reason:
            # Perhaps it never was memory; then a note of ever smaller sizes would be wrong.
            self.note.drop()
            fix += " If memory was left, cuDNN has no kernel for this: install another torch."
        raise RunError(
            f"memory does not suffice for a micro-batch of {ratio.positives} positives to "
            f"{ratio.negatives} negatives of up to {self.frames} frames, and it cannot be halved "
            f"({reason})",
            where=self.config.out,
            fix=fix,
        )

    # The largest tensor.

    def _cut_to_32_bits(self) -> None:
        """Make micro-batches so small that CUDA's kernels can index their tensors with 32 bits."""
        world = self.backend.world
        elements = self.step_clips * _elements_of_a_clip(self.config, self.frames)
        before = self.accumulate
        self.accumulate = first_indexed(self.plan, world, before, elements)
        if self.accumulate != before and self.backend.is_main:
            log.warning(
                "a tensor of %d clips of %d frames has 2^31 elements or more, too many for fast "
                "kernels on CUDA: train.accumulate is %d here, and a micro-batch has %d clips",
                self.step_clips // (world * before), self.frames, self.accumulate,
                self.step_clips // (world * self.accumulate),
            )  # fmt: skip

    # The budget.

    def _choose(self) -> Choice | None:
        config = self.config
        budget = config.model.activation_memory
        if budget is None:
            return None
        clips = self.step_clips // (self.backend.world * self.accumulate)
        # fp16 is of the same size.
        precision = None if config.train.precision == "fp32" else torch.bfloat16
        shape = (clips, 1, self.frames, *config.clip.size)
        costs = measure_parts(self._without_data, shape, precision)
        choice = choose_plan(costs, budget)
        what = f"activations of {clips} clips of {self.frames} frames"
        if choice.bytes > budget:
            raise RunError(
                f"{what} take {in_units(choice.bytes)} at the least, and the budget is "
                f"{in_units(budget)}",
                where="model.activation_memory",
                fix="Give so much, raise train.accumulate, or lower plan.batch, clip.max_frames or "
                "clip.size.",
            )
        log.info(
            "%s take %s of %s: recompute %s, for %.0f %% more work",
            what, in_units(choice.bytes), in_units(budget), ", ".join(choice.plan),
            100 * (choice.work - 1),
        )  # fmt: skip
        return choice

    def _without_data(self) -> nn.Module:
        return self._alone(_plain_model(self.config))

    def _alone(self, model: nn.Module) -> nn.Module:
        """Normalising as it does among several processes, but without them."""
        if self.config.norm.shared and self.backend.world > 1:
            share_statistics(model, lambda sums: None)
        return model

    # The probe.

    def _find(self) -> None:
        """Make micro-batches smaller until the largest one runs on every rank.

        Each rank tries by itself, on a model that no backend knows, whose hooks would wait for the
        other ranks.
        """
        found: int | DistTrainError
        try:
            while (reason := self._short_of_memory()) is not None:
                self.accumulate = self._next(reason)
            found = self.accumulate
        except DistTrainError as error:
            found = error
        answers = self.backend.gather(found)
        for answer in answers:
            if isinstance(answer, DistTrainError):
                raise answer
        self.accumulate = max(answers)
        if self.backend.is_main and self.accumulate != self.config.train.accumulate:
            log.warning(
                "memory suffices for %d clips of %d frames at once: train.accumulate is %d here",
                self.clips, self.frames, self.accumulate,
            )  # fmt: skip

    def _short_of_memory(self) -> str | None:
        """The error, if memory does not suffice for the largest micro-batch. No weights, statistics
        or random numbers of the run are touched."""
        device = self.backend.device
        reason = None
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                self._run_once()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # The traceback kept tensors alive, which are freed only here.
        free_cache(device)
        return reason

    def _run_once(self) -> None:
        config, device = self.config, self.backend.device
        model = self._alone(self.make_model()).to(device).train()
        reserved = COPIES * sum(p.numel() * p.element_size() for p in model.parameters())
        if device.type == "cuda":
            reserved += int(torch.cuda.get_device_properties(device).total_memory * MARGIN)
        reserve = torch.empty(reserved, dtype=torch.uint8, device=device)
        clips = self.step_clips // (self.backend.world * self.accumulate)
        volumes = torch.zeros(
            clips, 1, self.frames, *config.clip.size, dtype=torch.uint8, device=device
        )
        # One clip is shorter by a frame: a batch with padding takes more than one without.
        lengths = torch.full((clips,), self.frames)
        lengths[0] = max(1, self.frames - 1)
        with self.backend.autocast():
            loss = model(as_input(volumes, config), lengths).float().mean()
        loss.backward()
        del reserve


class _Note:
    """What earlier sessions of a run found. It holds only for settings that take the same memory,
    on a device of the same kind."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.path: Path = config.out / NOTE
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.of: dict[str, Any] = {
            "model": config.model.model_dump(mode="json", exclude={"init"}),
            "clip": config.clip.model_dump(mode="json"),
            "max_voxels": config.plan.max_voxels,
            "train": config.train.model_dump(
                include={"precision", "backend", "offload", "channels_last", "graphs"}
            ),
            "norm": config.norm.model_dump(include={"shared", "fused"}),
            "resized_on_device": config.augment.device,
            "device": name,
            # What a convolution takes is theirs to decide.
            "torch": torch.__version__,
            "cudnn": cudnn_version(),
        }

    def read(self) -> int | None:
        """The most clips of a micro-batch; None where nothing is known."""
        if not os.path.lexists(self.path):
            return None
        try:
            content = parse_object(read_plain(self.path, most_bytes=MIB))
            if content["of"] != self.of:
                return None
            if type(content["clips"]) is not int or content["clips"] < 1:
                raise ValueError(f"its number of clips is {content['clips']}")
            return int(content["clips"])
        except (DistTrainError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is left aside: %s", self.path, reason_of(error))
            return None

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)

    def write(self, clips: int) -> None:
        content = json.dumps({"clips": clips, "of": self.of}, indent=2)
        write_whole(self.path, content)


class Buffers:
    """A copy of a model's buffers as they were before a step, to repeat it from."""

    def __init__(self, module: nn.Module) -> None:
        self._live = by_dtype(module.buffers())
        self._copies = [[buffer.clone() for buffer in same] for same in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        for copies, live in zip(self._copies, self._live, strict=True):
            torch._foreach_copy_(copies, live)

    @torch.no_grad()
    def put_back(self) -> None:
        for copies, live in zip(self._copies, self._live, strict=True):
            torch._foreach_copy_(live, copies)


def free_cache(device: torch.device) -> None:
    """Give back what torch holds for reuse, of which no piece may be large enough."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
