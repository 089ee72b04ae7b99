"""The command line: each command is a few lines over a function that Python users call too."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from dist_train import __version__
from dist_train.errors import ConfigError, DistTrainError, StoreError
from dist_train.extensions import allow as allow_code
from dist_train.progress import console, progress
from dist_train.quiet import hush_libraries, is_told
from dist_train.safe_text import printable
from dist_train.system.advice import advice, lack_of_memory, raise_open_files
from dist_train.system.cgroup import heed_quota

if TYPE_CHECKING:
    from dist_train.data.raw.outline import OutlineColour

#: What ``tempfile`` says.
NO_TEMPORARY_FOLDER = "No usable temporary directory"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Workers = Annotated[int | None, typer.Option(min=1, help="Processes; one per core if unset.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
MaxRejected = Annotated[str, typer.Option(help="Largest share of rejected clips, as 1% or 0.01.")]
StorePath = Annotated[
    Path | None, typer.Option(help="Where the run's own store is now, if it was moved.")
]
LeastOutline = Annotated[
    int, typer.Option(min=1, help="Least height and width of an outline, in pixels.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="Package whose code may be imported, such as mylab; docs/extending.md."),
]
Colour = Annotated[
    str | None,
    typer.Option(
        help="Colour of the outline, as ranges of channels: "
        "red=100:255,green=50:150,blue=0:110,red_over_blue=60."
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dist_train {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """From raw, labelled, imbalanced 3D clips to a trained, calibrated 3D CNN."""


@app.command("config")
def describe_config(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page docs/settings.md.")
    ] = False,
    write: Annotated[
        str | None,
        typer.Option(help="Write a config file that comes with dist_train, as clog_loss_ddp."),
    ] = None,
) -> None:
    """Print every setting of a training run: its type, its default, and what it does."""
    from dist_train.config_help import as_markdown, as_text
    from dist_train.shipped import write_config

    if write is not None:
        _echo(f"settings in {write_config(write, Path())}")
    else:
        typer.echo(as_markdown() if markdown else as_text(), nl=False)


@app.command()
def launch_files(
    folder: Annotated[Path, typer.Argument(help="Folder to start jobs from; gets launch/.")],
) -> None:
    """Write the files for Accelerate, torchrun, SLURM and Kubernetes."""
    from dist_train.shipped import write_launch_files

    _echo(f"launch files in {write_launch_files(folder)}; start them from {folder}")


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    clips: Annotated[int, typer.Option(min=1)] = 400,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stall_rate: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.25,
    workers: Workers = None,
) -> None:
    """Make capillary videos, flowing and stalled, in the form of the Clog Loss challenge."""
    from dist_train.data.synthetic.render import synthesize

    with progress("synth") as report:
        synthesize(
            out, clips=clips, seed=seed, stall_rate=stall_rate, workers=workers, progress=report
        )
    _echo(f"{clips} clips in {out}")


@app.command()
def prepare(
    out: Out,
    manifest: Annotated[
        Path | None, typer.Option(help="CSV: the challenge's, or filename,label[,...].")
    ] = None,
    from_folders: Annotated[
        Path | None, typer.Option(help="Folder of one folder a class, in place of a manifest.")
    ] = None,
    positive: Annotated[
        list[str] | None, typer.Option(help="With --from-folders: a folder of positives.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Folder of the files, or URL; without it the manifest's url column."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV of labels, if apart.")] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Rows to take, by a condition on any columns: 'micro and tier1'."),
    ] = None,
    allow_local: Annotated[
        bool, typer.Option(help="Let names, or file:// URLs, lead out of the source folder.")
    ] = False,
    allow_private: Annotated[
        bool, typer.Option(help="Let the url column name addresses of this network or machine.")
    ] = False,
    fetch_mib: Annotated[
        int, typer.Option(min=1, help="Largest file that is fetched, in MiB.")
    ] = 8192,
    unlabelled: Annotated[bool, typer.Option(help="The clips have no labels.")] = False,
    roi: Annotated[
        Literal["outline", "none"], typer.Option(help="Crop to the outline, or keep all.")
    ] = "outline",
    colour: Colour = None,
    least_outline: LeastOutline = 16,
    truncated: Annotated[
        Literal["reject", "keep"], typer.Option(help="Videos that end before they should.")
    ] = "reject",
    damaged: Annotated[
        Literal["reject", "keep"], typer.Option(help="Videos with frames that decode in part.")
    ] = "reject",
    bits: Annotated[
        int | None,
        typer.Option(min=8, max=16, help="Significant bits of 16-bit values; detected if unset."),
    ] = None,
    max_rejected: MaxRejected = "1%",
    shard_clips: Annotated[int, typer.Option(min=1, help="Number of clips per shard.")] = 128,
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
    reader: Annotated[
        str | None,
        typer.Option(help="Own reader of a file format, as mylab.readers:read_dicom."),
    ] = None,
    allow: Allow = None,
    workers: Workers = None,
) -> None:
    """Decode videos or volumes, crop them, and write a store. Goes on where it was killed."""
    from dist_train.data.raw.clip import PrepareSettings, suffixes_of
    from dist_train.data.raw.outside_reader import OutsideReader
    from dist_train.data.raw.remote import Access, manifest_source, open_source
    from dist_train.data.store.build import prepare as write_store
    from dist_train.data.store.build import prepare_part
    from dist_train.data.store.build_spec import Part

    allow_code(allow or [])
    own_reader = None if reader is None else OutsideReader.named(reader)
    own = None if part is None else Part.parse(part)
    most_rejected = _share(max_rejected, "--max-rejected")
    if (manifest is None) == (from_folders is None) or (positive is None) != (from_folders is None):
        raise ConfigError(
            "give either --manifest FILE, or --from-folders DIR with --positive FOLDER"
        )
    if manifest is not None:
        from dist_train.data.table.manifest import read_manifest

        table = read_manifest(
            manifest, labels=labels, unlabelled=unlabelled, where=where, allow_local=allow_local
        )
    else:
        from dist_train.data.raw.class_folders import manifest_from_folders

        if source is not None or labels is not None or unlabelled or where is not None:
            raise ConfigError(
                "--from-folders takes files and labels from the folders; leave out --source, "
                "--labels, --unlabelled and --where"
            )
        assert from_folders is not None
        table, source = (
            manifest_from_folders(from_folders, positive or [], suffixes_of(own_reader)),
            str(from_folders),
        )
    access = Access(local=allow_local, private=allow_private, most_bytes=fetch_mib << 20)
    files = manifest_source(table, access) if source is None else open_source(source, access)
    settings = PrepareSettings(
        roi=roi,
        colour=_colour(colour),
        least_outline=least_outline,
        truncated=truncated,
        damaged=damaged,
        shard_clips=shard_clips,
        clip_seconds=clip_seconds,
        clip_memory=clip_memory,
        bits=bits,
        reader=own_reader,
    )
    with progress("prepare") as report:
        if own is not None:
            prepare_part(
                table, files, out, settings, own, engine=engine, workers=workers, progress=report
            )
            return
        store = write_store(
            table,
            files,
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
    from dist_train.data.store.build import finalize as join_parts

    _print_store(store, join_parts(store, max_rejected=_share(max_rejected, "--max-rejected")))


@app.command()
def prepare_npz(
    file: Annotated[Path, typer.Argument(help="A MedMNIST 3D file.")],
    out: Out,
    shard_clips: Annotated[int, typer.Option(min=1, help="Number of clips per shard.")] = 128,
) -> None:
    """Write a store from a MedMNIST 3D file, with its official split."""
    from dist_train.data.store.build import prepare_npz as write_store

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
    salvage: Annotated[
        bool,
        typer.Option(
            "--salvage", help="Mend without the files that are gone: bad clips become rejects."
        ),
    ] = False,
    allow: Allow = None,
    workers: Workers = None,
) -> None:
    """Check every byte of a store, name what is bad, and mend it if asked."""
    allow_code(allow or [])
    from dist_train.data.store.repair import lost_files
    from dist_train.data.store.repair import repair as mend
    from dist_train.data.store.verify import verify as find_faults

    with progress("verify") as report:
        faults = find_faults(store, workers=workers, progress=report)
    _print_faults(faults)
    lost = lost_files(store)
    if (faults and salvage) or ((faults or lost) and repair is not None):
        with progress("repair") as report:
            mended = mend(store, repair, faults, salvage=salvage, workers=workers, progress=report)
        _print_store(store, mended)
        lost = lost_files(store)
        with progress("verify") as report:
            faults = find_faults(store, workers=workers, progress=report)
        _print_faults(faults)
    for name in lost:
        _echo(f"lost: {name}: --repair with the folder that has it brings its clip back")
    if faults:
        raise StoreError(
            f"{len(faults)} faults",
            where=store,
            fix="Run 'dist-train verify' with --repair and the folder of raw files."
            if repair is None and not salvage
            else "What repair leaves must be mended by hand.",
        )
    _echo(f"{store} is whole")
    _print_copies(store)


@app.command()
def info(store: Annotated[Path, typer.Argument(help="A store.")]) -> None:
    """Show what a store holds."""
    from dist_train.data.inspect import describe_store
    from dist_train.data.store.reader import Store

    for table in describe_store(Store(store)):
        console.print(table)
    _print_copies(store)


@app.command()
def inspect(
    clip: Annotated[Path, typer.Argument(help="A video with an outline.")],
    png: Annotated[Path | None, typer.Option(help="Draw what was found.")] = None,
    colour: Colour = None,
    least_outline: LeastOutline = 16,
) -> None:
    """Show the outline that is found in each frame of a video."""
    from dist_train.data.inspect import describe_outline, draw_outline, find_boxes
    from dist_train.data.raw.outline import lacks_outline

    video, boxes = find_boxes(clip, _colour(colour), least_outline)
    _echo(str(clip))
    console.print(describe_outline(video, boxes))
    if video.truncated:
        because = f" ({video.stopped_by})" if video.stopped_by else ""
        _echo(f"the video ends before it should{because}")
    if video.frames_damaged:
        _echo(f"{video.frames_damaged} frames are damaged")
    shown = sum(box is not None for box in boxes)
    if lack := lacks_outline(shown, len(boxes), least_outline):
        _echo(f"{lack}; --colour and --least-outline say what counts as one")
    if png is not None:
        draw_outline(clip, boxes, png)
        _echo(f"drawn in {png}")


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML settings.")] = None,
    resume: Annotated[
        Literal["never", "auto"], typer.Option(help="auto: go on from the newest checkpoint.")
    ] = "never",
    allow: Allow = None,
) -> None:
    """Train a run; with many processes, by 'accelerate launch -m dist_train train ...'."""
    from dist_train.config import load_config

    allow_code(allow or [])
    # Before torch is loaded: a mistyped setting is told at once.
    settings = load_config(config, overrides or [])
    from dist_train.training.train import train as fit

    with progress("train") as report:
        fit(settings, resume=resume, progress=report, say=_say)
    _leave_launch()


@app.command()
def doctor(
    folder: Annotated[
        Path, typer.Option(help="A folder on the disk that runs will be written to.")
    ] = Path(),
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that processes wait for each other.")
    ] = 60.0,
) -> None:
    """Check this machine before training; under a launcher, all machines and their network."""
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
    store_path: StorePath = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; the run's own.")] = None,
    prior: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of positives where the model is used."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Calibrated threshold; fitted on val if unset."),
    ] = None,
    allow: Allow = None,
) -> None:
    """Predict held-out or new clips, averaged over the run's snapshots.

    With many processes, by 'accelerate launch -m dist_train predict ...': they share the clips.
    """
    from dist_train.evaluation.predict import predict as write_predictions

    allow_code(allow or [])
    with progress("predict") as report:
        written = write_predictions(
            run,
            store=store,
            store_path=store_path,
            out=out,
            prior=prior,
            threshold=threshold,
            progress=report,
        )
    if _is_first():
        _echo(f"predictions in {written}")
    _leave_launch()


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder with predictions.")],
    threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Calibrated threshold; fitted on val if unset."),
    ] = None,
) -> None:
    """Judge a run's predictions."""
    from dist_train.evaluation.evaluate import evaluate_run
    from dist_train.evaluation.evaluation_text import table

    console.print(table(evaluate_run(run, threshold=threshold)))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Safetensors file to write.")],
    onnx: Annotated[Path | None, typer.Option(help="ONNX file to write as well.")] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Step of one snapshot or checkpoint; unset: all snapshots."),
    ] = None,
    store_path: StorePath = None,
    allow: Allow = None,
) -> None:
    """Write a run's model as one file: what 'predict' uses, all snapshots together."""
    from dist_train.evaluation.export import export_run

    allow_code(allow or [])
    facts = export_run(run, out, onnx=onnx, step=step, store_path=store_path)
    steps = ", ".join(map(str, facts["steps"]))
    for written in filter(None, (out, onnx)):
        _echo(f"{facts['from']} of step {steps} in {written}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")], store_path: StorePath = None
) -> None:
    """Write a run's report: one HTML page that needs nothing else."""
    from dist_train.evaluation.report import report_run

    _echo(f"report in {report_run(run, store_path=store_path)}")


def _echo(line: str) -> None:
    """Print a line in which there may be names that strangers chose."""
    typer.echo(printable(line))


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


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
    from dist_train.data.raw.outline import OutlineColour

    return OutlineColour() if text is None else OutlineColour.parse(text)


class _OneLine(logging.Formatter):
    """Names in a message are no commands to the terminal, and start no line of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def main() -> None:
    """Run the command line; a user's error ends in one message and a non-zero exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Names may hold what the terminal's encoding, or any, has not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    raise_open_files()
    heed_quota()
    hush_libraries()
    try:
        app()
    except DistTrainError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        # The disk and its permissions are the user's too; a full one may name no file.
        if NO_TEMPORARY_FOLDER in str(error):
            _fail(f"{error.strerror or error}. Set TMPDIR to a folder that can be written to.", 1)
        fix = advice(error)
        if error.filename is None and fix is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        _fail(f"{where}{error.strerror}{'' if fix is None else f'. {fix}'}", 1)
    except (MemoryError, RuntimeError) as error:
        told = lack_of_memory(error)
        if told is None:
            raise
        _fail(told, 1)


def _is_first() -> bool:
    """Whether this process is rank 0, the only one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _leave_launch(code: int = 0) -> None:
    """End a launched process at once: all is written, and its process group is closed.

    gloo's threads outlive the group, and the end of the interpreter under them aborts about one
    process in ten of ZeRO on CPUs (torch 2.13, deepspeed 0.19.8), whose launcher would never see
    the code that it was to end with.
    """
    if "WORLD_SIZE" in os.environ:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _fail(message: str, code: int) -> NoReturn:
    message = " ".join(message.split())
    if is_told(message):
        _leave_launch(code)
        sys.exit(code)
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f" (process {rank})"
    print(f"error{process}: {printable(message)}", file=sys.stderr, flush=True)
    _leave_launch(code)
    sys.exit(code)


def _print_store(out: Path, store: dict[str, Any]) -> None:
    from dist_train.data.inspect import remarks
    from dist_train.data.store.rejects import by_class

    rejected = store["rejected"]
    _echo(f"{store['clips']} clips in {out}")
    if rejected:
        number = sum(rejected.values())
        _echo(f"rejected: {number} ({by_class(rejected)}), see {out / 'rejected.csv'}")
    for line in remarks(out):
        _echo(line)
    _print_copies(out)


def _print_copies(store: Path) -> None:
    from dist_train.data.duplicates import describe_duplicates
    from dist_train.data.store.reader import Store

    if copies := describe_duplicates(Store(store)):
        _echo(copies)


def _print_faults(faults: Sequence[object]) -> None:
    for fault in faults:
        _echo(f"bad: {fault}")
