"""File systems without locks, as Lustre that is mounted without flock."""

from __future__ import annotations

import logging
import os

from dist_train.errors import MachineError

#: Set to 1, it lets commands work where nothing can be locked.
OVERRIDE = "DIST_TRAIN_NO_LOCKS"

log = logging.getLogger(__name__)


def go_on_unlocked(where: object, error: OSError) -> None:
    """Warn, where the user has allowed to go on without a lock.

    Raises:
        MachineError: the user has not.
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
