"""File systems without locks, such as Lustre mounted without flock."""

from __future__ import annotations

import logging
import os

from dist_train.errors import MachineError

#: Set to 1 to let commands work without locks.
OVERRIDE = "DIST_TRAIN_NO_LOCKS"

log = logging.getLogger(__name__)


def go_on_unlocked(where: object, error: OSError) -> None:
    """Warn that ``where`` is not locked, if the user has allowed that.

    Args:
        error: the error of the attempt to lock.

    Raises:
        MachineError: the user has not allowed it.
    """
    if os.environ.get(OVERRIDE, "") in ("", "0"):
        raise MachineError(
            f"the folder cannot be locked ({error.strerror}), so a second process that writes to "
            "it would not be noticed",
            where=where,
            fix=f"Choose a file system that has locks, or set {OVERRIDE}=1 and see to it that only "
            "one command at a time writes there.",
        ) from None
    log.warning("%s is not locked (%s): start nothing else that writes there", where, error)
