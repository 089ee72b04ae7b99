"""A training from its settings to its end: begin or resume in the run's folder, then fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from dist_train.config import Config, changes, config_text
from dist_train.distributed.backends import make_backend
from dist_train.distributed.backends.base import Backend
from dist_train.distributed.collectives import OfSomeRankError, on_main, run_on_all_ranks
from dist_train.distributed.consistency import check_agreement
from dist_train.distributed.peer_loss import translate_peer_loss
from dist_train.errors import ConfigError, DistTrainError, RunError, StoppedError
from dist_train.files import write_whole
from dist_train.progress import Progress
from dist_train.run.data import check_same_data, write_splits
from dist_train.run.folder import (
    CONFIG,
    check_folders,
    only_session,
    refuse_existing,
    refuse_lost_checkpoints,
)
from dist_train.run.mirror import Mirror
from dist_train.run.record import (
    begin_session,
    code_from_outside,
    completed_checkpoint,
    read_record,
    read_settings,
    set_foreign_settings_aside,
    warn_of_other_code,
)
from dist_train.run.seen_before import held_out_seen, held_out_seen_by_init
from dist_train.run.snapshots import set_snapshots_aside
from dist_train.system.main_guard import end_if_run_again
from dist_train.training.console import closing, opening
from dist_train.training.implied_rate import implied_rate, implied_shares
from dist_train.training.initial_weights import SETTING, initial_model
from dist_train.training.reporting import Say
from dist_train.training.run_state import retention
from dist_train.training.trainer import BeforeStep, Trainer
from dist_train.training.weights_table import Source, lines

log = logging.getLogger(__name__)

Resume = Literal["never", "auto"]


def train(
    config: Config,
    *,
    resume: Resume = "never",
    progress: Progress | None = None,
    before_step: BeforeStep | None = None,
    say: Say | None = None,
) -> None:
    """Train one run to its end, in ``config.out``. Call it in every process of the launch.

    Args:
        resume: "auto" continues from the newest valid checkpoint, or begins anew if there is no
            run, or one without a completed checkpoint. "never" refuses a folder that holds a run.
        progress: called on rank 0 with (steps done, steps in all, a line of metrics).
        before_step: called on every rank with the trainer and the number of the next step, from 0.
        say: called on rank 0 with lines about the run, at its beginning and its end.

    Raises:
        StoppedError: SIGTERM or SIGINT came; a checkpoint was written.
        LostProcessError: another process has ended, or cannot be reached.
        DistTrainError: the settings, store, selection or checkpoints do not allow it.
    """
    end_if_run_again()
    with translate_peer_loss():
        backend = make_backend(config.train, clip_norm=config.optim.clip_norm)
        try:
            with ExitStack() as opened:

                def lock() -> None:
                    on_main(backend, lambda: opened.enter_context(only_session(config.out)))

                if config.checkpoint.mirror is None:
                    trainer = Trainer(config, backend)
                    lock()
                else:
                    # The size of micro-batches that was found before is in the run's folder.
                    lock()
                    trainer = Trainer(config, backend, _open_mirror(config, backend, resume))
                opened.enter_context(trainer.recovery.stop)
                init = begin(trainer, resume)
                opened.enter_context(_mirrored(trainer))
                if say is not None and backend.is_main:
                    trainer.reporter.say = say
                    for line in [] if init is None else lines(init):
                        say(line)
                    for line in opening(
                        trainer.config, backend, trainer.data, trainer.plan, trainer.done
                    ):
                        say(line)
                trainer.fit(progress if backend.is_main else None, before_step)
                if trainer.stopped_early:
                    trainer.reporter.say(trainer.early_stop.told(trainer.done))
                trainer.reporter.say(closing(trainer.config))
        except BaseException as error:
            # After an error other ranks may be in a collective call. With NCCL, closing the backend
            # would wait for it, and nobody would see the error. A signal stops all ranks alike.
            if backend.world == 1 or isinstance(error, StoppedError):
                backend.close()
            raise
        backend.close()


def begin(trainer: Trainer, resume: Resume) -> Source | None:
    """Restore a checkpoint, or begin a new run, and note the session in the run's folder.

    A collective call.

    Returns:
        The source of a new run's weights; None if they are random, or of a checkpoint.

    Raises:
        RunError, StoreError, CheckpointError: the folder does not allow it.
    """
    backend, config = trainer.backend, trainer.config
    out, data = config.out, trainer.data
    restored, init = None, None
    if resume == "auto":
        if not config.checkpoint.accept_other_order:
            on_main(backend, lambda: check_same_data(out, data))
        restored = trainer.state.restore()

    def check_folder() -> None:
        if resume == "never":
            refuse_existing(out)
        elif restored is None:
            refuse_lost_checkpoints(out, checkpointed=completed_checkpoint(out))
        check_folders(out)

    on_main(backend, check_folder)
    if restored is not None:
        on_main(backend, lambda: _check_teacher(trainer))
        trainer.restore_progress(*restored)
    else:
        trainer.batches.weights.set_tables_aside()
        if config.model.init is not None:
            init = _begin_with_given_weights(trainer)
    check_agreement(
        backend,
        {
            "the step to begin with": trainer.done,
            "the store": (data.store.fingerprint, data.store.content),
            "the plan": trainer.plan.fingerprint,
        },
    )
    if trainer.done < trainer.steps:
        resumed_from = trainer.done if restored else None
        on_main(backend, lambda: _note_session(trainer, resumed_from, init))
    trainer.first_step = trainer.done
    return init


def _check_teacher(trainer: Trainer) -> None:
    """Refuse to resume with a teacher whose files have changed. On rank 0."""
    teacher, before = trainer.teacher, None
    with suppress(RunError):
        before = read_record(trainer.config.out).get("teacher")
    if teacher is None or before is None:
        return
    now = teacher.origin._asdict()
    if before["path"] == now["path"] and before != now:
        raise RunError(
            "the teacher has changed since the run began",
            where=now["path"],
            fix="Restore its snapshots, or name another teacher by loss.distill.teacher.",
        )


def _open_mirror(config: Config, backend: Backend, resume: Resume) -> Mirror | None:
    """Bring the run here from ``checkpoint.mirror``, or refuse a second one there. A collective
    call; rank 0 gets the mirror."""
    url, opened = config.checkpoint.mirror, []
    assert url is not None

    def look() -> None:
        mirror = Mirror(config.out, url, retention(config.checkpoint))
        if resume == "never":
            mirror.refuse_existing()
        else:
            mirror.fetch()
        opened.append(mirror)

    on_main(backend, look)
    return opened[0] if opened else None


@contextmanager
def _mirrored(trainer: Trainer) -> Iterator[None]:
    """At the end, also of a run that is stopped, wait until ``checkpoint.mirror`` has it all."""
    mirror = trainer.mirror
    try:
        yield
    except Exception:
        if mirror is not None:
            # Its failure was told already.
            with suppress(DistTrainError):
                mirror.finish()
        raise
    if mirror is not None:
        mirror.finish()


def _begin_with_given_weights(trainer: Trainer) -> Source:
    """Begin with the weights of ``model.init``, moments of zero and a new average. A collective
    call."""
    backend, read = trainer.backend, []

    def load() -> str:
        model, source = initial_model(trainer.config)
        assert source is not None
        read.append((model, source))
        return source.sha256

    try:
        digests = run_on_all_ranks(backend, load)
    except OfSomeRankError as error:
        # A rank that failed itself raises its own error.
        raise error.__cause__ or ConfigError(str(error), where=SETTING) from None
    check_agreement(backend, {"the weights of model.init": digests[backend.rank]})
    model, source = read[0]
    trainer.state.begin_anew(model)
    return source


def _note_session(trainer: Trainer, resumed_from: int | None, init: Source | None) -> None:
    """Write the run's record, splits and settings. On rank 0."""
    config, backend, data = trainer.config, trainer.backend, trainer.data
    out = config.out
    if resumed_from is not None:
        with suppress(RunError):
            warn_of_other_code(out, config, read_record(out))
    changed = _changed_settings(config) if os.path.lexists(out / CONFIG) else []
    seen = _held_out_seen(trainer, resumed_from, init)
    # A run that had stopped early, and goes on, has kept its best weights.
    goes_on = any(change.startswith("stop.") for change in changed)
    set_snapshots_aside(
        out, after=trainer.done, planned=trainer.snapshot_steps if goes_on else None
    )
    trainer.micro.write_note()
    run: dict[str, Any] = {
        "model": config.model.name,
        "parameters": sum(backend.numels[name] for name, _ in backend.trained()),
        **_rates(trainer),
        "steps": trainer.steps,
        "checkpointed": resumed_from is not None,
        "settings": config.model_dump(mode="json"),
        "held_out_seen": seen,
        **write_splits(out, data),
    }
    if init is not None:
        run["init"] = init._asdict()
    if trainer.teacher is not None:
        run["teacher"] = trainer.teacher.origin._asdict()
    session: dict[str, Any] = {
        "resumed_from_step": resumed_from,
        "world_size": backend.world,
        "backend": config.train.backend,
        "device": str(backend.device),
        "micro_batch": trainer.micro.metadata(),
    }
    if changed:
        session["changed"] = changed
    if code := code_from_outside(config):
        session["code_from_outside"] = code
    begin_session(out, run, session)
    # Last: ``run.json`` has the changes already.
    set_foreign_settings_aside(out)
    write_whole(out / CONFIG, config_text(config))


def _rates(trainer: Trainer) -> dict[str, Any]:
    """The share of positives, for the record; of another target, the target and the share of each
    class."""
    config, data = trainer.config, trainer.data
    if data.target.kind != "binary":
        record = {"target": config.target.model_dump(mode="json")}
        if data.target.kind == "regression":
            return record
        rates = trainer.rates
        if data.target.is_coded:
            rates = rates._replace(batches=implied_shares(config.loss, data.target, rates))
        shares = {
            name: dict(zip(data.target.classes, values.tolist(), strict=True))
            for name, values in (("train_batches", rates.batches), ("natural", rates.natural))
        }
        return record | {"class_shares": shares}
    batches = implied_rate(config.loss, data.target, trainer.rates, trainer.inputs.crowd)
    return {"positive_rate": {"train_batches": batches, "natural": data.natural_rate()}}


def _held_out_seen(trainer: Trainer, resumed_from: int | None, init: Source | None) -> int:
    """Return how many held-out clips the weights, or the teacher, were trained on before, for the
    record."""
    config, data = trainer.config, trainer.data
    if resumed_from is not None:
        with suppress(RunError):
            before: int = read_record(config.out).get("held_out_seen", 0)
            return max(before, held_out_seen(data, config.out) or 0)
    seen = 0
    if init is not None:
        seen = held_out_seen_by_init(data, Path(init.path)) or 0
    if trainer.teacher is not None:
        path = Path(trainer.teacher.origin.path)
        by_teacher = (held_out_seen if path.is_dir() else held_out_seen_by_init)(data, path)
        seen = max(seen, by_teacher or 0)
    return seen


def _changed_settings(config: Config) -> list[str]:
    """Warn of settings that differ from those of the session before, and return them.

    Changes that are not allowed are refused when a checkpoint is restored.
    """
    try:
        before = read_settings(config.out)
    except (ConfigError, RunError) as error:
        log.warning("the settings of the session before are not known: %s", error)
        return []
    changed = changes(before, config)
    if changed:
        log.warning("going on with other settings than before: %s", "; ".join(changed))
    return changed
