"""A default batch that a small set, or an odd number of processes, cannot fill becomes smaller."""

from __future__ import annotations

import logging
from dataclasses import replace

from dist_train.errors import PlanError
from dist_train.run.data import RunData

log = logging.getLogger(__name__)


def with_batch_that_fits(data: RunData, *, world: int, tell: bool) -> RunData:
    """The data with the largest ``plan.batch``, up to the default, of which a plan can be made and
    cut for all processes; as it is where that is so already, or ``plan.batch`` was given.

    Args:
        tell: whether to warn of another batch.

    Raises:
        PlanError: no batch fits.
    """
    plan, accumulate = data.config.plan, data.config.train.accumulate
    if "batch" in plan.model_fields_set:
        return data
    group = plan.ratio.group * world * accumulate
    first: PlanError | None = None
    for batch in range(plan.batch, 0, -1):
        if first is not None and batch % group:
            continue
        smaller = plan.model_copy(update={"batch": batch})
        config = data.config.model_copy(update={"plan": smaller})
        fitted = replace(data, config=config)
        try:
            fitted.plan().check_cut(world, accumulate)
        except PlanError as error:
            first = first or error
            continue
        if first is not None and tell:
            log.warning("plan.batch is %d rather than %d: %s", batch, plan.batch, first.what)
        return fitted
    assert first is not None
    raise first
