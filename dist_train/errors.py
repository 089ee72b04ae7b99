"""Every failure that a user can cause, each saying what is wrong, where, and what to do.

The command line prints ``str(error)`` as one line and exits with ``error.exit_code``; it shows a
traceback only for exceptions that are not a ``DistTrainError``, which are bugs.
"""

import os


class DistTrainError(Exception):
    """Base of all user-facing errors.

    Args:
        what: what is wrong, in one sentence without a final stop.
        where: the file, key or clip that it is about.
        fix: what the user can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.reason if where is None else f"{where}: {self.reason}")

    @property
    def reason(self) -> str:
        """The message without the place, for where that is told beside it."""
        return self.what if self.fix is None else f"{self.what.rstrip('.')}. {self.fix}"


class ConfigError(DistTrainError):
    """A setting is unknown, missing, or contradicts another."""


class ManifestError(DistTrainError):
    """The clip table cannot be read, or a row of it is not usable."""


class DecodeError(DistTrainError):
    """A file is not a clip that can be decoded; the file is rejected, the run goes on."""


class RoiError(DistTrainError):
    """No region of interest was found in a clip; the clip is rejected, the run goes on."""


class FileError(DistTrainError):
    """A file is not of the kind or form that it must have: a link, a FIFO, no JSON."""


class StoreError(DistTrainError):
    """A store is missing, unfinished, damaged, or was made with other settings."""


class PlanError(DistTrainError):
    """The selection cannot fill the batches that were asked for."""


class ModelError(DistTrainError):
    """The model is unknown, or its settings do not fit."""


class CheckpointError(DistTrainError):
    """A checkpoint is torn, or belongs to another model, store or plan."""


class BackendError(DistTrainError):
    """The distributed backend that was asked for is not the one that is running."""


class LostProcessError(BackendError):
    """Another process of the run has ended, or cannot be reached. The run can be resumed."""

    exit_code = os.EX_TEMPFAIL


class RunError(DistTrainError):
    """A run folder lacks what the command needs from it."""


class MachineError(DistTrainError):
    """The machine does not give what is asked of it: its limits, permissions, disks or memory."""


class StoppedError(DistTrainError):
    """A run was told to stop, and can be resumed.

    Args:
        exit_code: what the process ends with.
    """

    def __init__(
        self, what: str, *, exit_code: int, where: object | None = None, fix: str | None = None
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code
