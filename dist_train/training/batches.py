"""The batches that a process trains on, and those that it validates on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise, starmap

from dist_train.config import Config, LoaderSettings
from dist_train.data.loading.collate import Batch
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import PlanSampler, held_out_batches
from dist_train.data.plan.plan import Plan
from dist_train.distributed.backends.base import Backend
from dist_train.run.data import RunData
from dist_train.training.micro_batch import MicroBatches
from dist_train.training.negative_weights import EpochWeights

#: Steps whose batches are made sooner than worker processes start.
FEW = 16


class Batches:
    """This rank's micro-batches, by the plan of their epoch."""

    def __init__(
        self, config: Config, data: RunData, plan: Plan, micro: MicroBatches, backend: Backend
    ) -> None:
        self._config, self._data, self._plan = config, data, plan
        self._micro, self._backend = micro, backend
        self.weights = EpochWeights(config, data, backend)
        # Clips of an epoch, by all ranks.
        passes = len(plan.anchor) // plan.ratio[0]
        read = [min(len(c), passes * n) for c, n in zip(plan.classes, plan.ratio, strict=True)]
        data.store.expect(sum(read) + data.count("val"))

    def plan_at(self, step: int) -> Plan:
        """Return the plan that a step is made by."""
        if self._config.plan.weights is None:
            return self._plan
        return self.weights.plan(self._plan.first_step(self._plan.epoch_of(step)))

    def config_at(self, step: int) -> Config:
        """Return the run's settings, with ``clip`` of the growth stage of a step."""
        clip = self._config.clip.at(self._plan.epoch_of(step))
        return self._config.model_copy(update={"clip": clip})

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield micro-batches to the end of the run; to the end of the epoch if each epoch has its
        own weights of negatives."""
        epoch, end = self._plan.epoch_of(step), self._config.train.epochs
        if self._config.plan.weights is not None:
            end = epoch + 1
        stages = [stage for stage in self._config.clip.stage_ends if epoch < stage < end]
        steps = [step, *(self._plan.first_step(stage) for stage in (*stages, end))]
        return chain.from_iterable(starmap(self._of_steps, pairwise(steps)))

    def last_steps(self, done: int, number: int) -> Loader:
        """Load the last ``number`` of ``done`` steps again, with clips as at the last one."""
        few = LoaderSettings(workers=0) if number <= FEW else None
        return self._of_steps(max(0, done - number), done, few)

    def _of_steps(self, first: int, last: int, loader: LoaderSettings | None = None) -> Loader:
        """Load steps ``first`` to ``last`` (excluded), by the plan of the first one, with clips as
        at the last one."""
        sampler = PlanSampler(
            self.plan_at(first),
            rank=self._backend.rank,
            world=self._backend.world,
            accumulate=self._micro.accumulate,
            first=first,
            last=last,
        )
        dataset = self._data.dataset(training=True, config=self.config_at(last - 1))
        return Loader(dataset, sampler, loader or self._config.loader)

    def held_out(self) -> Loader:
        """Load the val split without augmentation; can be iterated repeatedly."""
        clips = self._data.numbers("val")
        batches = held_out_batches(
            clips,
            self._data.frames[clips],
            rank=self._backend.rank,
            world=self._backend.world,
            batch=self._micro.clips,
        )
        return Loader(self._data.dataset(training=False), batches, self._config.loader)
