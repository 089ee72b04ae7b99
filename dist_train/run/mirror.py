"""A copy of a run behind a URL, from which it goes on on another machine.

After each checkpoint a thread of rank 0 copies, beside the training:

1. the files of the checkpoint, but not its marker;
2. the other files of the run that have changed: record, settings, metrics, snapshots;
3. the marker, after which the checkpoint counts.

So whatever is cut off, the newest checkpoint with a marker is whole, and the files beside it are as
new as it or newer, as after a crash in the run's own folder. Checkpoints that the retention policy
removes lose their marker first.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from threading import Lock

from dist_train.checkpoint.format import MARKER, check_checkpoint, latest_valid, read_marker
from dist_train.checkpoint.retention import Metrics, RetentionPolicy, to_remove
from dist_train.checkpoint.superseded import SUPERSEDED, set_aside
from dist_train.errors import CheckpointError, DistTrainError, RemoteError, RunError
from dist_train.files import MOST_JSON, PARTIAL, reason_of, sync_folder, whole_aside
from dist_train.objects import Objects
from dist_train.run.folder import CHECKPOINTS, LOCK, TENSORBOARD, parts_of_run

log = logging.getLogger(__name__)

#: Not needed to go on.
_LEFT_OUT = {CHECKPOINTS, LOCK, SUPERSEDED, TENSORBOARD, "wandb"}


class Mirror:
    """Copies a run's checkpoints to ``url``; used on rank 0 alone.

    At most one is copied at a time. Of those that are completed meanwhile, the newest is next.

    Args:
        keep: which checkpoints stay behind the URL when a new one is there.
    """

    def __init__(self, run: Path, url: str, keep: RetentionPolicy) -> None:
        self.objects = Objects(url)
        self._run, self._keep = run, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._lock = Lock()
        self._waiting: Path | None = None
        self._work: Future[None] | None = None
        self._failed: DistTrainError | None = None
        # Size and time of change of the files that were copied.
        self._copied: dict[str, tuple[int, int]] = {}
        # Of the checkpoints whose markers were read.
        self._metrics: dict[int, Metrics] = {}

    def refuse_existing(self) -> None:
        """Check for ``--resume never``.

        Raises:
            RunError: there is a run behind the URL.
            RemoteError: it cannot be listed.
        """
        if names := self._names(""):
            raise RunError(
                f"checkpoint.mirror holds a run already ({names[0]})",
                where=self.objects.where(""),
                fix="Go on with it by --resume auto, or choose another checkpoint.mirror.",
            )

    def add(self, checkpoint: Path) -> None:
        """Copy a checkpoint that is complete, beside the training."""
        with self._lock:
            self._waiting = checkpoint
            if self._work is None or self._work.done():
                self._work = self._thread.submit(self._copy_waiting)

    def finish(self) -> None:
        """Wait until all is copied.

        Raises:
            RemoteError: the newest checkpoint could not be copied.
        """
        # The thread forgets its work when it is done.
        work = self._work
        if work is not None:
            work.result()
        if self._failed is not None:
            raise self._failed

    def fetch(self) -> None:
        """Bring the run here if the newest checkpoint is behind the URL.

        Files of the run that are here are set aside.

        Raises:
            RemoteError: it cannot be read.
            OSError: the disk is full.
        """
        folder = self._run / CHECKPOINTS
        newest_here = _newest_valid(folder)
        steps = [step for step in self._steps() if step > newest_here]
        if not steps:
            return
        folder.mkdir(parents=True, exist_ok=True)
        log.warning(
            "going on from %s, where step %d is the newest", self.objects.where(""), max(steps)
        )
        is_older = bool(parts_of_run(self._run))
        for name in self._names(""):
            if name.partition("/")[0] in _LEFT_OUT or not _is_plain(name):
                continue
            path = self._run / name
            if is_older and path.exists():
                set_aside(self._run, path)
            self._download(name, path)
        for step in sorted(steps, reverse=True):
            try:
                self._fetch_checkpoint(step, folder)
                return
            except CheckpointError as error:
                log.warning("skipped a damaged checkpoint: %s", error)

    def _fetch_checkpoint(self, step: int, folder: Path) -> None:
        final, aside = folder / f"step-{step}", folder / f"step-{step}{PARTIAL}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        prefix = f"{CHECKPOINTS}/{final.name}/"
        for name in self._names(prefix):
            if _is_plain(name):
                self._download(name, aside / PurePosixPath(name).name)
        if final.exists():
            set_aside(self._run, final)
        checked = aside.rename(final)
        sync_folder(folder)
        try:
            check_checkpoint(checked)
        except CheckpointError:
            shutil.rmtree(checked)
            raise

    def _download(self, name: str, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        with whole_aside(to) as aside:
            self.objects.download(name, aside)

    def _copy_waiting(self) -> None:
        while True:
            with self._lock:
                checkpoint, self._waiting = self._waiting, None
                if checkpoint is None:
                    self._work = None
                    return
            try:
                self._copy(checkpoint)
                self._failed = None
            except Exception as error:
                if not checkpoint.is_dir():
                    # The retention policy has removed it, as there is a newer one.
                    continue
                self._failed = error if isinstance(error, DistTrainError) else RemoteError(
                    f"the checkpoint cannot be copied ({reason_of(error)})",
                    where=self.objects.where(checkpoint.name),
                )  # fmt: skip
                log.warning("%s is not in checkpoint.mirror: %s", checkpoint.name, self._failed)

    def _copy(self, checkpoint: Path) -> None:
        prefix = f"{CHECKPOINTS}/{checkpoint.name}"
        with ExitStack() as opened:
            # Open files can be read after they were removed.
            files = {
                path.name: opened.enter_context(path.open("rb"))
                for path in checkpoint.iterdir()
                if not path.name.startswith(".")
            }
            marker = files.pop(MARKER).read()
            # What an earlier session left there would not belong to these files.
            self._remove(f"{prefix}/")
            for name, file in files.items():
                self.objects.put(f"{prefix}/{name}", file)
        self._copy_changed()
        self.objects.put(f"{prefix}/{MARKER}", marker)
        step = int(checkpoint.name.partition("-")[2])
        self._metrics[step] = _metrics_in(marker, step)
        self._prune(step)

    def _copy_changed(self) -> None:
        # The folders that are left out are not entered: they change meanwhile.
        tops = [path for path in self._run.iterdir() if path.name not in _LEFT_OUT]
        for path in sorted(p for top in tops for p in (top, *top.rglob("*"))):
            name = path.relative_to(self._run).as_posix()
            if not path.is_file() or path.is_symlink():
                continue
            if path.name.startswith(".") or path.name.endswith(PARTIAL):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                version = status.st_size, status.st_mtime_ns
                if self._copied.get(name) != version:
                    self.objects.put(name, path.read_bytes() if version[0] < MOST_JSON else path)
                    self._copied[name] = version

    def _prune(self, newest: int) -> None:
        """Remove checkpoints behind the URL by the policy.

        Those after ``newest`` go, too, where the run's folder spares those of another order:
        another machine would go on from the newest one.
        """
        marked = self._steps()
        for step in marked - self._metrics.keys():
            name = f"{CHECKPOINTS}/step-{step}/{MARKER}"
            content = self.objects.get(name, most_bytes=MOST_JSON)
            self._metrics[step] = _metrics_in(content, step)
        saved = {step: self._metrics[step] for step in marked}
        cut_off = self._steps(marked=False) - marked
        for step in {*to_remove(saved, newest, self._keep), *cut_off} - {newest}:
            self._remove(f"{CHECKPOINTS}/step-{step}/")

    def _remove(self, prefix: str) -> None:
        """Remove a checkpoint, its marker first."""
        for name in sorted(self._names(prefix), key=lambda name: not name.endswith(MARKER)):
            self.objects.remove(name)

    def _steps(self, *, marked: bool = True) -> set[int]:
        """Steps of the checkpoints with a marker, or of all."""
        paths = map(PurePosixPath, self._names(f"{CHECKPOINTS}/"))
        names = {path.parent.name for path in paths if path.name == MARKER or not marked}
        steps = (name.removeprefix("step-") for name in names)
        return {int(step) for step in steps if step.isdecimal()}

    def _names(self, prefix: str) -> list[str]:
        names = self.objects.names(prefix)
        if names is None:
            raise RunError(
                "the web cannot be written to",
                where=self.objects.where(""),
                fix="Give checkpoint.mirror as s3://, gs:// or az://.",
            )
        return names


def _metrics_in(marker: bytes, step: int) -> Metrics:
    """The metrics in a checkpoint's marker; none if it is damaged, so that it is not the best."""
    with tempfile.TemporaryDirectory(prefix="dist_train.") as scratch:
        folder = Path(scratch) / f"step-{step}"
        folder.mkdir()
        (folder / MARKER).write_bytes(marker)
        try:
            found = read_marker(folder)["facts"].get("metrics")
        except CheckpointError:
            return {}
    return found if isinstance(found, dict) else {}


def _newest_valid(folder: Path) -> int:
    """The step of the newest whole checkpoint; -1 if there is none."""
    try:
        found = latest_valid(folder)
    except CheckpointError:
        return -1
    return -1 if found is None else int(found.name.removeprefix("step-"))


def _is_plain(name: str) -> bool:
    """Whether an object's name stays within the run's folder."""
    parts: Iterable[str] = name.split("/")
    return all(part not in ("", ".", "..") and not part.startswith(".") for part in parts)
