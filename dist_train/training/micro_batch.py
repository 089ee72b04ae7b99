"""How a step is cut into micro-batches that fit the device's memory.

The clips of a step are divided among processes x accumulation steps. Each part is a micro-batch of
whole groups of positives and negatives. Smaller micro-batches are more accumulation steps of the
same global batch; docs/activations.md says what else they change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dist_train.config import Config, ModelSettings
from dist_train.data.augment.mix import whole_group
from dist_train.data.plan.plan import Plan
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import on_main
from dist_train.distributed.out_of_memory import NO_ENGINE
from dist_train.errors import DistTrainError, RunError
from dist_train.models.activation_budget import Choice, choose_plan, in_units, measure_parts
from dist_train.models.largest_tensor import INDEXED_BY_32_BITS, largest_tensor
from dist_train.models.norm import share_statistics
from dist_train.models.trunk import Trunk
from dist_train.run.data import RunData
from dist_train.run.folder import MICRO_BATCH
from dist_train.run.model import configured_model, make_model
from dist_train.training.memory_probe import find_shortage
from dist_train.training.micro_batch_note import conditions, noted_clips, write_note
from dist_train.training.teacher import Teacher

log = logging.getLogger(__name__)


def next_cut(plan: Plan, world: int, accumulate: int, group: int | None = None) -> int | None:
    """Return the next number of accumulation steps that at least halves a micro-batch and keeps
    groups whole; None if a micro-batch is a single group.

    Args:
        group: clips that stay together, as of ``Plan.check_cut``.
    """
    groups = plan.batch // (group or plan.ratio.group) // world
    return next((n for n in range(2 * accumulate, groups + 1) if groups % n == 0), None)


def largest_step(plan: Plan, deepest: int) -> tuple[int, int]:
    """Return the clips and frames of the step that takes the most memory.

    Args:
        deepest: frames of the deepest clip.
    """
    steps = [(plan.batch, deepest)]
    if plan.rules.max_voxels is not None:
        runs = {int(n) for edges in plan.epochs.runs.values() for n in edges[1:] - edges[:-1]}
        # A step of several blocks is only as deep as the budget allows.
        for clips in (n * plan.batch for n in runs if n > 1):
            room = plan.rules.max_voxels // (clips * plan.rules.frame_voxels)
            steps.append((clips, min(room, deepest)))
    return max(steps, key=lambda step: step[0] * step[1])


def most_clips(model: ModelSettings, shape: Sequence[int], elements: int | None = None) -> int:
    """Return how many clips of ``shape`` [D, H, W] can be run at once; at least 1.

    Args:
        elements: the most elements of a tensor; None for what 32 bits can index.
    """
    per_clip = largest_tensor(lambda: configured_model(model), (1, model.in_channels, *shape))
    return max(1, (INDEXED_BY_32_BITS - 1 if elements is None else elements) // per_clip)


class MicroBatches:
    """The size of a run's micro-batches on this machine; the same on all ranks.

    Attributes:
        accumulate: micro-batches per step.
        chosen: what is recomputed to stay within ``model.activation_memory``; None without it.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        plan: Plan,
        backend: Backend,
        teacher: Teacher | None = None,
    ) -> None:
        """Find the size. A collective call, before the backend wraps the model.

        Args:
            teacher: on the device; shares the memory.

        Raises:
            PlanError: ``train.accumulate`` cannot cut the steps.
            RunError: memory, or ``model.activation_memory``, does not suffice.
        """
        self.config, self.plan, self.backend = config, plan, backend
        self._teacher = teacher
        self.step_clips, self.frames = largest_step(plan, data.deepest())
        self._conditions = conditions(config, backend.device)
        self.accumulate = config.train.accumulate
        self._group = whole_group(config.augment, plan.ratio.group)
        plan.check_cut(backend.world, self.accumulate, self._group)
        is_cuda = backend.device.type == "cuda"
        if is_cuda:
            self._cut_to_32_bits()
        self._part_names: tuple[str, ...] = ()
        self.chosen: Choice | None = on_main(backend, self._choose_recomputation)
        noted = on_main(backend, lambda: noted_clips(config.out, self._conditions))
        if noted is not None:
            self._cut_until(lambda: self.clips <= noted)
        if config.train.probe == "always" or (config.train.probe == "cuda" and is_cuda):
            self._probe()

    @property
    def clips(self) -> int:
        """Clips of a micro-batch, in a step of one block."""
        return self.plan.batch // (self.backend.world * self.accumulate)

    def make_model(self) -> nn.Module:
        """Return the run's model, set to recompute what was chosen."""
        model = make_model(self.config)
        if self.chosen is not None:
            assert isinstance(model, Trunk)
            model.recompute, self._part_names = self.chosen.plan, model.part_names
        return model

    def metadata(self) -> dict[str, Any]:
        """Return the size, and what the model made recomputes, for the run's record: JSON types."""
        metadata: dict[str, Any] = {"clips": self.clips, "accumulate": self.accumulate}
        if self.chosen is not None:
            metadata["recompute"] = dict(zip(self._part_names, self.chosen.plan, strict=True))
            metadata["activation_bytes"] = self.chosen.bytes
        return metadata

    def halve(self, reason: str) -> None:
        """Take the next smaller micro-batch, on this rank.

        Raises:
            RunError: a micro-batch is a single group already; names ``reason``.
        """
        smaller = self._next_cut()
        if smaller is not None:
            self.accumulate = smaller
            return
        fix = "Set model.recompute or model.activation_memory, or lower clip.max_frames."
        if NO_ENGINE in reason:
            # If memory was not the cause, a note of ever smaller sizes would be wrong.
            (self.config.out / MICRO_BATCH).unlink(missing_ok=True)
            fix += " If memory was left, cuDNN has no kernel for this: install another torch."
        raise RunError(
            f"memory does not suffice for a micro-batch of {self.plan.group_text(self._group)} of "
            f"up to {self.frames} frames, and it cannot be halved ({reason})",
            where=self.config.out,
            fix=fix,
        )

    def write_note(self) -> None:
        """Note the size for later sessions, if it differs from the settings."""
        if self.accumulate != self.config.train.accumulate:
            write_note(self.config.out, self.clips, self._conditions)

    @property
    def _largest(self) -> int:
        """Clips of the largest micro-batch."""
        return self.step_clips // (self.backend.world * self.accumulate)

    def _cut_until(self, fits: Callable[[], bool]) -> None:
        """Make micro-batches smaller until they fit, or are single groups."""
        while not fits() and (n := self._next_cut()):
            self.accumulate = n

    def _next_cut(self) -> int | None:
        return next_cut(self.plan, self.backend.world, self.accumulate, self._group)

    def _cut_to_32_bits(self) -> None:
        models = [self.config.model, *(self._teacher.settings if self._teacher else ())]
        most = min(most_clips(m, (self.frames, *self.config.clip.size)) for m in models)
        clips = self._largest
        self._cut_until(lambda: self._largest <= most)
        if self._largest != clips and self.backend.is_main:
            log.warning(
                "a tensor of %d clips of %d frames has 2^31 elements or more, too many for fast "
                "kernels on CUDA: train.accumulate is %d here, and a micro-batch has %d clips",
                clips, self.frames, self.accumulate, self._largest,
            )  # fmt: skip

    def _choose_recomputation(self) -> Choice | None:
        config = self.config
        budget = config.model.activation_memory
        if budget is None:
            return None
        # fp16 takes as much memory as bf16.
        precision = None if config.train.precision == "fp32" else torch.bfloat16
        shape = (self._largest, config.model.in_channels, self.frames, *config.clip.size)
        # Compiled kernels cannot run without data, so norms are not fused here.
        costs = measure_parts(
            lambda: self._without_peers(configured_model(config.model)), shape, precision
        )
        choice = choose_plan(costs, budget)
        activations = f"activations of {self._largest} clips of {self.frames} frames"
        if choice.bytes > budget:
            raise RunError(
                f"{activations} take {in_units(choice.bytes)} at the least, and the budget is "
                f"{in_units(budget)}",
                where="model.activation_memory",
                fix="Give so much, raise train.accumulate, or lower plan.batch, clip.max_frames or "
                "clip.size.",
            )
        log.info(
            "%s take %s of %s: recompute %s, for %.0f %% more work",
            activations, in_units(choice.bytes), in_units(budget), ", ".join(choice.plan),
            100 * (choice.work - 1),
        )  # fmt: skip
        return choice

    def _without_peers(self, model: nn.Module) -> nn.Module:
        """Let the model share statistics as in training, but communicate with no other rank."""
        if self.config.norm.shared and self.backend.world > 1:
            share_statistics(model, lambda sums: None)
        return model

    def _probe(self) -> None:
        """Make micro-batches smaller until the largest one runs on every rank, each by itself."""
        found: int | DistTrainError
        try:
            while (shortage := self._try_largest()) is not None:
                self.halve(shortage)
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

    def _try_largest(self) -> str | None:
        return find_shortage(
            lambda: self._without_peers(self.make_model()),
            clips=self._largest,
            frames=self.frames,
            config=self.config,
            backend=self.backend,
            teacher=self._teacher,
        )
