"""The command line: each command is a few lines over a function that Python users call too."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from dist_train.console import console, progress
from dist_train.errors import ConfigError, DistTrainError, StoreError

if TYPE_CHECKING:
    from dist_train.data.roi import OutlineColour

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    help="From raw, labelled, imbalanced 3D clips to a trained, calibrated 3D CNN.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Workers = Annotated[int | None, typer.Option(min=1, help="Processes; one per core unless given.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
MaxRejected = Annotated[str, typer.Option(help="Largest share of rejected clips, as 1% or 0.01.")]
Colour = Annotated[
    str | None,
    typer.Option(help="Of the outline: red=100:255,green=50:150,blue=0:110,red_over_blue=60."),
]


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    clips: Annotated[int, typer.Option(min=1)] = 400,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stall_rate: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.25,
    workers: Workers = None,
) -> None:
    """Make capillary videos, flowing and stalled, in the form of the Clog Loss challenge."""
    from dist_train.data.synth import synthesize

    with progress("synth") as report:
        synthesize(
            out, clips=clips, seed=seed, stall_rate=stall_rate, workers=workers, progress=report
        )
    typer.echo(f"{clips} clips in {out}")


@app.command()
def prepare(
    manifest: Annotated[Path, typer.Option(help="CSV: the challenge's, or filename,label[,...].")],
    out: Out,
    source: Annotated[
        str | None,
        typer.Option(help="Folder of the files, or URL; without it the manifest's url column."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV of labels, if apart.")] = None,
    unlabelled: Annotated[bool, typer.Option(help="The clips have no labels.")] = False,
    roi: Annotated[
        Literal["outline", "none"], typer.Option(help="Crop to the outline, or keep all.")
    ] = "outline",
    colour: Colour = None,
    truncated: Annotated[
        Literal["reject", "keep"], typer.Option(help="Videos that end before they should.")
    ] = "reject",
    max_rejected: MaxRejected = "1%",
    shard_clips: Annotated[int, typer.Option(min=1, help="Clips a shard.")] = 128,
    clip_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest that decoding one file may take.")
    ] = 600.0,
    clip_memory: Annotated[
        int, typer.Option(min=16, help="Most memory that decoding one file may take, in MiB.")
    ] = 2048,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes here, or tasks of a Ray cluster.")
    ] = "local",
    part: Annotated[
        str | None,
        typer.Option(help="i/N: write the i-th of N parts only; 'finalize' joins and judges them."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Decode videos or volumes, crop them, and write a store. Goes on where it was killed."""
    from dist_train.data.clip import PrepareSettings
    from dist_train.data.job import Part
    from dist_train.data.manifest import read_manifest
    from dist_train.data.prepare import prepare as write_store
    from dist_train.data.prepare import prepare_part

    own = None if part is None else Part.parse(part)
    most_rejected = _share(max_rejected, "--max-rejected")
    table = read_manifest(manifest, labels=labels, unlabelled=unlabelled)
    settings = PrepareSettings(
        roi=roi,
        colour=_colour(colour),
        truncated=truncated,
        shard_clips=shard_clips,
        clip_seconds=clip_seconds,
        clip_memory=clip_memory,
    )
    with progress("prepare") as report:
        if own is not None:
            prepare_part(
                table, source, out, settings, own, engine=engine, workers=workers, progress=report
            )
            return
        store = write_store(
            table,
            source,
            out,
            settings,
            engine=engine,
            workers=workers,
            max_rejected=most_rejected,
            progress=report,
        )
    _print_store(out, store)


@app.command()
def finalize(
    store: Annotated[Path, typer.Argument(help="A store of which all parts are prepared.")],
    max_rejected: MaxRejected = "1%",
) -> None:
    """Join the parts of a store that 'prepare --part' wrote."""
    from dist_train.data.prepare import finalize as join_parts

    _print_store(store, join_parts(store, max_rejected=_share(max_rejected, "--max-rejected")))


@app.command()
def prepare_npz(
    file: Annotated[Path, typer.Argument(help="A MedMNIST 3D file.")],
    out: Out,
    shard_clips: Annotated[int, typer.Option(min=1, help="Clips a shard.")] = 128,
) -> None:
    """Write a store from a MedMNIST 3D file, with its official split."""
    from dist_train.data.prepare import prepare_npz as write_store

    with progress("prepare") as report:
        store = write_store(file, out, shard_clips=shard_clips, progress=report)
    _print_store(out, store)


@app.command()
def verify(
    store: Annotated[Path, typer.Argument(help="A store.")],
    repair: Annotated[
        str | None,
        typer.Option(help="Rebuild what is bad from this: folder or URL of the files, or npz."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Check every byte of a store, name what is bad, and mend it if asked."""
    from dist_train.data.verify import repair as mend
    from dist_train.data.verify import verify as find_faults

    with progress("verify") as report:
        faults = find_faults(store, workers=workers, progress=report)
    _print_faults(faults)
    if faults and repair is not None:
        with progress("repair") as report:
            _print_store(store, mend(store, repair, faults, workers=workers, progress=report))
        with progress("verify") as report:
            faults = find_faults(store, workers=workers, progress=report)
        _print_faults(faults)
    if faults:
        raise StoreError(
            f"{len(faults)} faults",
            where=store,
            fix="Run 'dist-train verify' with --repair and the folder of raw files."
            if repair is None
            else "What repair leaves must be mended by hand.",
        )
    typer.echo(f"{store} is whole")


@app.command()
def info(store: Annotated[Path, typer.Argument(help="A store.")]) -> None:
    """Show what a store holds."""
    from dist_train.data.describe import describe_store
    from dist_train.data.store import Store

    for table in describe_store(Store(store)):
        console.print(table)


@app.command()
def inspect(
    clip: Annotated[Path, typer.Argument(help="A video with an outline.")],
    png: Annotated[Path | None, typer.Option(help="Draw what was found.")] = None,
    colour: Colour = None,
) -> None:
    """Show the outline that is found in each frame of a video."""
    from dist_train.data.describe import describe_outline, draw_outline, find_boxes

    video, boxes = find_boxes(clip, _colour(colour))
    typer.echo(str(clip))
    console.print(describe_outline(video, boxes))
    if video.truncated:
        because = f" ({video.stopped_by})" if video.stopped_by else ""
        typer.echo(f"the video ends before it should{because}")
    if not any(boxes):
        typer.echo("no outline found in any frame; --colour says what counts as one")
    if png is not None:
        draw_outline(clip, boxes, png)
        typer.echo(f"drawn in {png}")


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML settings.")] = None,
    resume: Annotated[
        Literal["never", "auto"], typer.Option(help="auto: go on from the newest checkpoint.")
    ] = "never",
) -> None:
    """Train a run; with many processes, by 'accelerate launch -m dist_train train ...'."""
    from dist_train.config import load_config

    # Before torch is loaded: a mistyped setting is told at once.
    settings = load_config(config, overrides or [])
    from dist_train.train import train as fit

    with progress("train") as report:
        fit(settings, resume=resume, progress=report)
    _leave_launch()


@app.command()
def doctor(
    folder: Annotated[
        Path, typer.Option(help="On the disk that runs will be written to.")
    ] = Path(),
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that processes wait for each other.")
    ] = 60.0,
) -> None:
    """Say whether this machine is fit for training; all machines, under a launcher."""
    from dist_train.doctor.examine import examine

    findings = examine(folder.resolve(), timeout=timeout)
    bad = sum(finding.state == "bad" for finding in findings)
    _leave_launch(1 if bad else 0)
    if bad:
        raise typer.Exit(1)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    store: Annotated[Path | None, typer.Option(help="Predict this store instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; the run's own.")] = None,
    prior: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of positives in the world.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Of calibrated; else fitted on val.")
    ] = None,
) -> None:
    """Predict held-out or new clips, averaged over the run's snapshots."""
    from dist_train.predict import predict as write_predictions

    with progress("predict") as report:
        written = write_predictions(
            run, store=store, out=out, prior=prior, threshold=threshold, progress=report
        )
    typer.echo(f"predictions in {written}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder with predictions.")],
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Of calibrated; else fitted on val.")
    ] = None,
) -> None:
    """Judge a run's predictions."""
    from dist_train.evaluate import PREDICTIONS, table
    from dist_train.evaluate import evaluate as judge

    judged = judge(run / PREDICTIONS, out=run / "evaluation.json", threshold=threshold)
    console.print(table(judged))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Safetensors file to write.")],
    onnx: Annotated[Path | None, typer.Option(help="ONNX file to write as well.")] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="Of one snapshot or checkpoint; else all snapshots.")
    ] = None,
) -> None:
    """Write a run's model as one file: what 'predict' uses, all snapshots together."""
    from dist_train.export import export_run

    facts = export_run(run, out, onnx=onnx, step=step)
    steps = ", ".join(map(str, facts["steps"]))
    for written in filter(None, (out, onnx)):
        typer.echo(f"{facts['from']} of step {steps} in {written}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write a run's report: one HTML page that needs nothing else."""
    from dist_train.data.store import Store
    from dist_train.report import write_report
    from dist_train.run import open_run

    store = Store(open_run(run).store)
    page = write_report(run, strips=lambda key: store.read(store.clip_of(key)))
    typer.echo(f"report in {page}")


def _share(text: str, option: str) -> float:
    """A share given as "1%" or "0.01"."""
    number, percent, rest = text.partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if rest or not 0 <= share <= 1:
        raise ConfigError(
            f"'{text}' is not a share", where=option, fix="Give it as 1% or 0.01, from 0 to 1."
        )
    return share


def _colour(text: str | None) -> OutlineColour:
    from dist_train.data.roi import OutlineColour

    return OutlineColour() if text is None else OutlineColour.parse(text)


def main() -> None:
    """Run the command line; a user's error ends in one message and a non-zero exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except DistTrainError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        # The disk and its permissions are the user's too; a full one may name no file.
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        full = error.errno in DISK_FULL
        fix = ". Make room and run the command again: what is finished is kept." if full else ""
        _fail(f"{where}{error.strerror}{fix}", 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave_launch(code: int = 0) -> None:
    """End a launched process at once: all is written, and its process group is closed.

    gloo's threads outlive the group, and the end of the interpreter under them aborts about one
    process in ten of ZeRO on CPUs (torch 2.13, deepspeed 0.19.8), whose launcher would never see
    the code that it was to end with.
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fail(message: str, code: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f" (process {rank})"
    print(f"error{process}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _leave_launch(code)
    sys.exit(code)


def _print_store(out: Path, store: dict[str, Any]) -> None:
    from dist_train.data.prepare import by_class

    rejected = store["rejected"]
    typer.echo(f"{store['clips']} clips in {out}")
    if rejected:
        number = sum(rejected.values())
        typer.echo(f"rejected: {number} ({by_class(rejected)}), see {out / 'rejected.csv'}")


def _print_faults(faults: Sequence[object]) -> None:
    for fault in faults:
        typer.echo(f"bad: {fault}")
