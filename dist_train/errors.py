"""Errors that a user can cause. Each says what is wrong, where, and what to do.

The command line prints ``str(error)`` on one line and exits with ``error.exit_code``. Any other
exception is a bug, and is shown with its traceback.
"""

import os


class DistTrainError(Exception):
    """Base of all user-facing errors.

    Args:
        what: the fault, in one sentence without a full stop.
        where: the file, setting or clip at fault.
        fix: what the user can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.reason if where is None else f"{where}: {self.reason}")

    @property
    def reason(self) -> str:
        """The message without ``where``, for callers that print the place themselves."""
        return self.what if self.fix is None else f"{self.what.rstrip('.')}. {self.fix}"


class ConfigError(DistTrainError):
    """A setting is unknown, missing, or contradicts another."""


class ManifestError(DistTrainError):
    """The clip table cannot be read, or one of its rows is not usable."""


class DecodeError(DistTrainError):
    """A file cannot be decoded. The file is rejected, and the run goes on."""


class RoiError(DistTrainError):
    """A clip has no region of interest. The clip is rejected, and the run goes on."""


class FileError(DistTrainError):
    """A file has the wrong type or format, such as a link, a FIFO, or invalid JSON."""


class StoreError(DistTrainError):
    """A store is missing, unfinished, damaged, or has other settings."""


class RemoteError(DistTrainError):
    """A server of objects cannot be reached, refuses, or gives wrong bytes."""


class MissingObjectError(RemoteError):
    """There is no object of this name."""


class PlanError(DistTrainError):
    """The selected clips cannot fill the requested batches."""


class ModelError(DistTrainError):
    """The model is unknown, or its settings are invalid."""


class CheckpointError(DistTrainError):
    """A checkpoint is incomplete, or belongs to another model, store or plan."""


class BackendError(DistTrainError):
    """The distributed backend that runs is not the requested one."""


class LostProcessError(BackendError):
    """Another process of the run has ended, or cannot be reached. The run can be resumed."""

    exit_code = os.EX_TEMPFAIL


class RunError(DistTrainError):
    """A run folder lacks a file that the command needs."""


class MachineError(DistTrainError):
    """The machine's limits, permissions, disks or memory do not suffice."""


class StoppedError(DistTrainError):
    """A run was asked to stop, and can be resumed.

    Args:
        exit_code: the exit code of the process.
    """

    def __init__(
        self, what: str, *, exit_code: int, where: object | None = None, fix: str | None = None
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code
