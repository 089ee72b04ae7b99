"""Lowers the default batch size for a small data set, or for a number of processes that cannot
share it."""

from __future__ import annotations

import logging
from dataclasses import replace

from dist_train.data.augment.mix import whole_group
from dist_train.distributed.backends.base import Backend
from dist_train.errors import PlanError
from dist_train.run.data import RunData

log = logging.getLogger(__name__)


def with_batch_that_fits(data: RunData, backend: Backend) -> RunData:
    """Return the data with the largest ``plan.batch``, up to the default, that the train split can
    fill and all processes can share. A ``plan.batch`` that was given is not changed.

    Raises:
        PlanError: no batch fits; says why the default does not.
    """
    plan, accumulate = data.config.plan, data.config.train.accumulate
    if "batch" in plan.model_fields_set:
        return data
    group = whole_group(data.config.augment, sum(data.quotas().values()))
    part = group * backend.world * accumulate
    first: PlanError | None = None
    for batch in (plan.batch, *range((plan.batch - 1) // part * part, 0, -part)):
        config = data.config.model_copy(update={"plan": plan.model_copy(update={"batch": batch})})
        fitted = replace(data, config=config)
        try:
            fitted.plan().check_cut(backend.world, accumulate, group)
        except PlanError as error:
            first = first or error
            continue
        if first is not None and backend.is_main:
            log.warning("plan.batch is %d rather than %d: %s", batch, plan.batch, first.what)
        return fitted
    assert first is not None
    raise first
