"""BatchNorm statistics of the present weights, over the clips that were last trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd
import torch
from torch import nn

from dist_train.config import Config, LoaderSettings
from dist_train.data.loading.collate import Batch
from dist_train.data.loading.loader import Loader
from dist_train.data.loading.sampler import PlanSampler
from dist_train.data.plan.plan import Plan
from dist_train.distributed.backends.base import autocast
from dist_train.models.norm import norms
from dist_train.models.norm_statistics import precise_statistics
from dist_train.models.sync_norm import AllReduce
from dist_train.run.data import RunData
from dist_train.run.model import as_input
from dist_train.training.negative_weights import kept_table, read_weights


@torch.no_grad()
def take_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config,
    device: torch.device,
    *,
    all_reduce: AllReduce | None = None,
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Replace the running statistics of ``model`` by those of all real values of some batches.

    The model must be in training mode. torch's random state is restored afterwards.

    Args:
        config: settings with ``clip`` as in the training on these batches.
        all_reduce: see ``precise_statistics``.
        beat: called after each batch.
    """
    if all(norm.frozen for norm in norms(model)):
        # Also of a model from outside that has another normalisation.
        return
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        autocast(config.train.precision, device),
        precise_statistics(model, all_reduce),
    ):
        for batch in batches:
            moved = batch.to(device)
            model(as_input(moved.volumes, config), moved.frames)
            beat()


def statistics_of_run(
    model: nn.Module, data: RunData, done: int, *, steps: int, processes: int, device: torch.device
) -> None:
    """Take the statistics that a training in ``processes`` processes takes after ``done`` steps, in
    this process alone: the same but for rounding.

    Args:
        model: has the weights after ``done`` steps, on ``device``.
        steps: number of last steps whose clips count.

    Raises:
        DistTrainError: a clip cannot be read, or the plan no longer fits.
    """
    config, first = data.config, max(0, done - steps)
    plan = _plan_at(data, first)
    clip = config.clip.at(plan.epoch_of(done - 1))
    config = config.model_copy(update={"clip": clip})
    # If each process normalises by its own clips, a micro-batch here has the clips of one process.
    cuts = config.train.accumulate * (1 if config.norm.shared else processes)
    sampler = PlanSampler(plan, rank=0, world=1, accumulate=cuts, first=first, last=done)
    loader = Loader(data.dataset(training=True, config=config), sampler, LoaderSettings(workers=0))
    training = model.training
    model.train()
    take_statistics(model, loader, config, device)
    model.train(training)


def _plan_at(data: RunData, step: int) -> Plan:
    """Return the plan that a step was made by, with the weights of negatives of its epoch."""
    plan = data.plan()
    table = kept_table(data.config.out, plan.first_step(plan.epoch_of(step)))
    if data.config.plan.weights is None or not table.exists():
        return plan
    names = pd.Series(data.store.table.texts("filename"))
    return data.plan(read_weights(table.read_bytes(), names, table))
