"""Which batches a process trains on, and which it is judged on."""

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

#: Steps.
FEW = 16


class Batches:
    """This rank's micro-batches, by the plan of the epoch that they are of."""

    def __init__(
        self, config: Config, data: RunData, plan: Plan, micro: MicroBatches, backend: Backend
    ) -> None:
        self._config, self._data, self._plan = config, data, plan
        self._micro, self._backend = micro, backend
        self._weights = EpochWeights(config, data, backend)

    def forget(self) -> None:
        """A new run begins: weights that an earlier one kept are not its own. A collective call."""
        self._weights.forget()

    def plan_at(self, step: int) -> Plan:
        """The plan that a step is made by."""
        if self._config.plan.weights is None:
            return self._plan
        return self._weights.plan(self._plan.first_step(self._plan.epoch_of(step)))

    def config_at(self, step: int) -> Config:
        """The run's settings, with ``clip`` as it is in training at a step."""
        if not self._config.clip.growth:
            return self._config
        clip = self._config.clip.at(self._plan.epoch_of(step))
        return self._config.model_copy(update={"clip": clip})

    def from_step(self, step: int) -> Iterator[Batch]:
        """To the end of the run; of the epoch, if weights are read for each."""
        epoch, end = self._plan.epoch_of(step), self._config.train.epochs
        if self._config.plan.weights is not None:
            end = epoch + 1
        turns = [turn for turn in self._config.clip.stage_ends if epoch < turn < end]
        steps = [step, *(self._plan.first_step(turn) for turn in (*turns, end))]
        return chain.from_iterable(starmap(self.of_steps, pairwise(steps)))

    def last_steps(self, done: int, number: int) -> Loader:
        """The last ``number`` of ``done`` steps once more, with clips as they are at the last."""
        # For a few batches workers take longer to start than the batches to make.
        few = LoaderSettings(workers=0) if number <= FEW else None
        return self.of_steps(max(0, done - number), done, few)

    def of_steps(self, first: int, last: int, loader: LoaderSettings | None = None) -> Loader:
        """Steps ``first`` to ``last`` (excluded), by the plan of the first, with clips as they are
        at the last of them."""
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
        """The val split, without augmentation; can be walked again and again."""
        clips = self._data.numbers("val")
        batches = held_out_batches(
            clips.tolist(),
            self._data.store.table["frames"].to_numpy()[clips].tolist(),
            rank=self._backend.rank,
            world=self._backend.world,
            batch=self._micro.clips,
        )
        return Loader(self._data.dataset(training=False), batches, self._config.loader)
