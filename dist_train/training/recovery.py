"""What a run does after a bad step, when memory runs out, and when it is told to stop."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from dist_train.config import Config
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import on_main
from dist_train.distributed.out_of_memory import free_cache
from dist_train.distributed.signals import INTERRUPTED, TRY_AGAIN, StopSignals, exit_process
from dist_train.errors import RunError, StoppedError
from dist_train.run.snapshots import set_snapshots_aside
from dist_train.training.initial_weights import initial_model
from dist_train.training.micro_batch import MicroBatches
from dist_train.training.run_state import Restored, RunState
from dist_train.training.step import BadStepError

log = logging.getLogger(__name__)


class Recovery:
    """Brings a run back to a state that it can continue from.

    Attributes:
        bad_steps: how often each step was bad.
        stop: the signals to stop that this process has received.
    """

    def __init__(
        self, config: Config, backend: Backend, state: RunState, micro: MicroBatches
    ) -> None:
        self._config, self._backend = config, backend
        self._state, self._micro = state, micro
        self.bad_steps: Counter[int] = Counter()
        self.stop = StopSignals()

    def is_skipped(self, step: int) -> bool:
        """Whether a step is left out: it was bad, and bad again when it was repeated."""
        return self.bad_steps[step] > 1

    def go_back(self, bad: BadStepError) -> Restored:
        """Restore the last checkpoint, or the initial weights, to repeat a bad step, or to skip one
        that is bad again. A collective call.

        Raises:
            RunError: more than ``train.max_skips`` steps would be skipped.
        """
        self.bad_steps[bad.step] += 1
        skipped = sum(map(self.is_skipped, self.bad_steps))
        if skipped > self._config.train.max_skips:
            raise RunError(
                f"training diverged: {bad}, and {skipped - 1} steps were left out already",
                where=self._config.out,
                fix="Lower optim.lr, and go on from the checkpoint before by --resume auto.",
            )
        self._state.commit()
        restored = self._state.restore()
        if restored is None:
            self._state.begin_anew(initial_model(self._config)[0])
            restored = 0, np.empty(0, np.float32), np.empty(0, np.float32)
        done = restored[0]
        on_main(self._backend, lambda: set_snapshots_aside(self._config.out, after=done))
        if self._backend.is_main:
            then = "the step is left out" if self.is_skipped(bad.step) else "it is tried again"
            log.warning("%s; back to step %d, and %s", bad, done, then)
        return restored

    def halve_micro_batches(self, shortage: str) -> None:
        """Prepare to repeat a step with smaller micro-batches, after memory ran out.

        One of several processes cannot repeat it: the others wait for it in a collective call. It
        exits at once, as leaving the process group may wait for them too. Its launcher ends the
        others, and the next session reads the note of the smaller size.

        Raises:
            RunError: a micro-batch is a single group already.
        """
        backend, out = self._backend, self._config.out
        try:
            self._micro.halve(shortage)
        except RunError as error:
            if not backend.can_repeat:
                exit_process(str(error), backend.rank, error.exit_code)
            raise
        self._micro.write_note()
        now = f"{shortage}; from now on micro-batches have {self._micro.clips} clips"
        if not backend.can_repeat:
            exit_process(f"{out}: {now}. Go on by --resume auto.", backend.rank, TRY_AGAIN)
        log.warning("%s", now)
        free_cache(backend.device)

    def stopped(self, *, interrupted: bool, done: int) -> StoppedError:
        """Return the error that ends a run after it was told to stop and is saved."""
        return StoppedError(
            f"stopped by {'SIGINT' if interrupted else 'SIGTERM'} after step {done}, "
            "which is saved",
            where=self._config.out,
            fix="Go on by --resume auto.",
            exit_code=INTERRUPTED if interrupted else TRY_AGAIN,
        )
