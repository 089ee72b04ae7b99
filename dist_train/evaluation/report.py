"""One self-contained HTML page about a run: no network, no scripts, the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined

from dist_train.data.check import text as check_text
from dist_train.data.types import GREY
from dist_train.evaluation import (
    evaluation_text,
    report_charts,
    report_target_charts,
    target_text,
)
from dist_train.evaluation.report_mistakes import Clips, worst_mistakes
from dist_train.evaluation.report_run import read_run
from dist_train.files import write_whole
from dist_train.places import Location
from dist_train.run.data import open_run_data
from dist_train.run.record import open_run


def report_run(run: Path, *, store_path: Location | None = None) -> Path:
    """Write the page with pictures of the worst mistakes, and return its path.

    Args:
        store_path: where the run's own store is now, if it was moved.

    Raises:
        RunError: as ``write_report``; or the settings or weights are not those of the training.
        StoreError: the store cannot be used, or has changed.
    """
    store = open_run_data(run, open_run(run), store_path=store_path).store
    clips = lambda key: store.read(store.clip_of(key))  # noqa: E731
    return write_report(run, clips=clips, channels=store.channels)


def write_report(
    run: Path,
    *,
    out: Path | None = None,
    clips: Clips | None = None,
    channels: Sequence[str] = GREY,
) -> Path:
    """Write the page, and return its path.

    Args:
        run: the run folder. Without ``predictions.csv`` the page has the training curves, and says
            which command adds the rest.
        out: the page to write. Default: ``report.html`` in the run folder.
        clips: returns the frames of a clip by its key. None leaves out the pictures of the worst
            mistakes.
        channels: names of the channels of these clips.

    Raises:
        RunError: the run has no metrics or an unreadable file, or its predictions are not those of
            its snapshots.
    """
    record = read_run(run)
    environment = Environment(
        loader=PackageLoader("dist_train.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with matplotlib.rc_context(report_charts.STYLE):
        page = environment.get_template("report.html.j2").render(
            run=record,
            e=record.evaluation,
            is_binary=record.kind == "binary",
            text=evaluation_text if record.kind == "binary" else target_text,
            target_charts=report_target_charts,
            check_text=check_text,
            charts=report_charts,
            mistakes=None if clips is None else worst_mistakes(record, clips, channels),
        )
    out = run / "report.html" if out is None else out
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out
