"""The command line. Each command calls a function that Python users can call, too."""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from dist_train import __version__
from dist_train.errors import ConfigError, DistTrainError, RunError, StoreError
from dist_train.extensions import allow as allow_code
from dist_train.places import Location, is_url, local_path
from dist_train.progress import console, progress
from dist_train.quiet import hush_libraries, is_told
from dist_train.safe_text import printable
from dist_train.system.advice import advice, lack_of_memory, raise_open_files
from dist_train.system.cgroup import heed_quota

if TYPE_CHECKING:
    from dist_train.data.raw.outline import OutlineColour
    from dist_train.data.store.reader import Store

#: Message of ``tempfile``.
NO_TEMPORARY_FOLDER = "No usable temporary directory"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Workers = Annotated[
    int | None, typer.Option(min=1, help="Number of processes; one per core if unset.")
]
OutStore = Annotated[str, typer.Option("--out", help="Folder or URL of the new store.")]
MaxRejected = Annotated[
    str, typer.Option(help="Fail if a larger share of the clips is rejected, as 1% or 0.01.")
]
ShardClips = Annotated[int, typer.Option(min=1, help="Number of clips in a shard (tar file).")]
StoreArgument = Annotated[str, typer.Argument(help="Folder or URL of a store.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
StorePath = Annotated[
    str | None, typer.Option(help="Folder or URL of the run's store, if it was moved.")
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Calibrated probability above which a clip is positive; if unset, the threshold with "
        "the best MCC on the val split.",
    ),
]
LeastOutline = Annotated[
    int, typer.Option(min=1, help="Least height and width of an outline, in pixels.")
]
LabelNames = Annotated[
    list[str] | None,
    typer.Option(help="What labels are called: 0=flowing,1=stalled."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="Package of your own whose code may be imported, such as mylab."),
]
Colour = Annotated[
    str | None,
    typer.Option(
        help="Colour of the outline: a range (0 to 255) of each channel, and by how much red "
        "exceeds blue: red=100:255,green=50:150,blue=0:110,red_over_blue=60."
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
        typer.Option(help="Copy a shipped config file, such as clog_loss_ddp, to this folder."),
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
    folder: Annotated[Path, typer.Argument(help="Folder for launch/; jobs start there.")],
) -> None:
    """Write the files for Accelerate, torchrun, SLURM and Kubernetes."""
    from dist_train.shipped import write_launch_files

    _echo(f"launch files in {write_launch_files(folder)}; start them from {folder}")


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder of the new videos and their tables.")],
    clips: Annotated[int, typer.Option(min=1, help="Number of videos.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    stall_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of stalled videos, the positives.")
    ] = 0.25,
    workers: Workers = None,
) -> None:
    """Make synthetic videos of flowing and stalled capillaries, as of the Clog Loss challenge."""
    from dist_train.data.synthetic.render import synthesize

    with progress("synth") as report:
        synthesize(
            out, clips=clips, seed=seed, stall_rate=stall_rate, workers=workers, progress=report
        )
    _echo(f"{clips} clips in {out}")


@app.command("manifest")
def write_manifest(
    folder: Annotated[Path, typer.Argument(help="Folder of clips.")],
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    pattern: Annotated[
        str | None,
        typer.Option(
            help="What the files' names say, as {group}/{label}_*.tif; if unset, there is one "
            "folder for each class.",
        ),
    ] = None,
    label_names: LabelNames = None,
    clip_folders: Annotated[
        bool, typer.Option("--clip-folders", help="A folder of pictures of one kind is one clip.")
    ] = False,
    suffix: Annotated[
        list[str] | None, typer.Option(help="Further suffix of files, as .raw, of your own reader.")
    ] = None,
) -> None:
    """Write a clip table from a folder of classes, or from a pattern of names."""
    from dist_train.data.raw.folder_table import folder_table, write_table
    from dist_train.data.table.labels import Naming

    found = folder_table(
        folder,
        pattern=pattern,
        suffixes=[name.lower() for name in suffix or []],
        clip_folders=clip_folders,
        names=Naming.parse([], label_names or []).names,
    )
    write_table(found, out)
    for line in found.lines():
        _echo(line)
    _echo(f"{len(found.rows)} clips in {out}")


@app.command()
def prepare(
    out: OutStore,
    manifest: Annotated[
        Path | None,
        typer.Option(help="CSV of clips with the columns filename and label; docs/tables.md."),
    ] = None,
    from_folders: Annotated[
        Path | None, typer.Option(help="Folder with a folder of files for each class; no manifest.")
    ] = None,
    positive: Annotated[
        list[str] | None,
        typer.Option(help="Label, or folder of --from-folders, whose clips are positive."),
    ] = None,
    label_names: LabelNames = None,
    file_column: Annotated[
        str | None, typer.Option(help="Column of file names, if it is not filename.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of labels, if it is not label.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column of groups, if it is not group.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="Folder or URL of the files; if unset, the manifest's url column."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV of labels, if the manifest has none.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Take only rows with this condition on columns: 'micro and tier1'."),
    ] = None,
    allow_local: Annotated[
        bool, typer.Option(help="Allow names and file:// URLs outside of the source folder.")
    ] = False,
    allow_private: Annotated[
        bool, typer.Option(help="Allow URLs of this machine or a private network.")
    ] = False,
    fetch_mib: Annotated[int, typer.Option(min=1, help="Largest file to download, in MiB.")] = 8192,
    unlabelled: Annotated[bool, typer.Option(help="The clips have no labels.")] = False,
    roi: Annotated[
        Literal["outline", "none"],
        typer.Option(help="Crop to the coloured outline in the video, or keep whole frames."),
    ] = "outline",
    colour: Colour = None,
    least_outline: LeastOutline = 16,
    truncated: Annotated[
        Literal["reject", "keep"], typer.Option(help="What to do with incomplete videos.")
    ] = "reject",
    damaged: Annotated[
        Literal["reject", "keep"], typer.Option(help="What to do with videos with damaged frames.")
    ] = "reject",
    bits: Annotated[
        int | None,
        typer.Option(min=8, max=16, help="Significant bits of 16-bit values; detected if unset."),
    ] = None,
    intensity: Annotated[
        str,
        typer.Option(
            help="Which values become black and white: auto, dtype, bits, 'window LOW HIGH' or "
            "'percentile LOW HIGH'."
        ),
    ] = "auto",
    intensity_over: Annotated[
        Literal["set", "clip"], typer.Option(help="Take bits and percentiles from all or each.")
    ] = "set",
    store_dtype: Annotated[
        Literal["uint8", "uint16", "float16"], typer.Option(help="Type of the stored values.")
    ] = "uint8",
    channels: Annotated[
        str, typer.Option(help="grey, rgb, all, or numbers from 0 as 0,2; auto is grey.")
    ] = "auto",
    depth_axis: Annotated[
        Literal["T", "Z"] | None,
        typer.Option(help="Axis of the frames in files that have both time and depth."),
    ] = None,
    plane: Annotated[
        int | None, typer.Option(min=0, help="Position on the other of the two axes.")
    ] = None,
    series: Annotated[
        int | None, typer.Option(min=0, help="Image to take from files that hold several.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL of a store, from which to take all that pixels depend on."
        ),
    ] = None,
    max_rejected: MaxRejected = "1%",
    shard_clips: ShardClips = 128,
    clip_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest time for decoding one file, in seconds.")
    ] = 600.0,
    clip_memory: Annotated[
        int, typer.Option(min=16, help="Largest memory for decoding one file, in MiB.")
    ] = 2048,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Work in processes of this machine, or in tasks of a Ray cluster."),
    ] = "local",
    part: Annotated[
        str | None,
        typer.Option(help="i/N: write only the i-th of N parts; 'finalize' joins all parts."),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option(help="Your own reader of a file format, as mylab.readers:read_dicom."),
    ] = None,
    allow: Allow = None,
    workers: Workers = None,
) -> None:
    """Decode videos or volumes, crop them, and write a store. Resumes if it was killed."""
    from dist_train.data.raw.clip import PrepareSettings, suffixes_of
    from dist_train.data.raw.intensity import Intensity
    from dist_train.data.raw.outside_reader import OutsideReader
    from dist_train.data.raw.remote import Access, manifest_source, open_source
    from dist_train.data.raw.stack import Choices, check_channels
    from dist_train.data.store.build import prepare as write_store
    from dist_train.data.store.build import prepare_part
    from dist_train.data.store.build_spec import Part
    from dist_train.data.table.labels import Naming

    allow_code(allow or [])
    own_reader = None if reader is None else OutsideReader.named(reader)
    own = None if part is None else Part.parse(part)
    most_rejected = _share(max_rejected)
    if (manifest is None) == (from_folders is None):
        raise ConfigError(
            "give either --manifest FILE, or --from-folders DIR; of two folders --positive FOLDER "
            "says which is positive"
        )
    naming = Naming.parse(positive or [], label_names or []) if positive or label_names else None
    columns = {"filename": file_column, "label": label_column, "group": group_column}
    named = {role: column for role, column in columns.items() if column is not None}
    if manifest is not None:
        from dist_train.data.table.manifest import read_manifest

        table = read_manifest(
            manifest,
            labels=labels,
            unlabelled=unlabelled,
            where=where,
            allow_local=allow_local,
            columns=named,
            naming=naming,
        )
    else:
        from dist_train.data.raw.folder_table import manifest_from_folders

        if source is not None or labels is not None or unlabelled or where is not None or named:
            raise ConfigError(
                "--from-folders takes files and labels from the folders; leave out --source, "
                "--labels, --unlabelled, --where, and names of columns"
            )
        assert from_folders is not None
        table = manifest_from_folders(from_folders, naming or Naming(), suffixes_of(own_reader))
        source = str(from_folders)
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
        choices=Choices(depth_axis, plane, check_channels(channels), series),
        intensity=Intensity.parse(intensity, intensity_over),
        store_dtype=store_dtype,
    )
    with progress("prepare") as report:
        if own is not None:
            prepare_part(
                table,
                files,
                out,
                settings,
                own,
                like=like,
                engine=engine,
                workers=workers,
                progress=report,
            )
            return
        store = write_store(
            table,
            files,
            out,
            settings,
            like=like,
            engine=engine,
            workers=workers,
            max_rejected=most_rejected,
            progress=report,
        )
    _print_store(out, store)


@app.command()
def finalize(
    store: Annotated[str, typer.Argument(help="Store with all parts: folder or URL.")],
    max_rejected: MaxRejected = "1%",
) -> None:
    """Join the parts of a store that 'prepare --part' has written."""
    from dist_train.data.store.build import finalize as join_parts

    _print_store(store, join_parts(store, max_rejected=_share(max_rejected)))


@app.command()
def prepare_npz(
    file: Annotated[Path, typer.Argument(help="A MedMNIST 3D file (.npz).")],
    out: OutStore,
    shard_clips: ShardClips = 128,
) -> None:
    """Write a store from a MedMNIST 3D file, with the file's split."""
    from dist_train.data.store.build import prepare_npz as write_store

    if is_url(out):
        raise ConfigError("is a URL", where="--out", fix="Give a folder; 'prepare' writes to URLs.")
    folder = local_path(out)
    with progress("prepare") as report:
        store = write_store(file, folder, shard_clips=shard_clips, progress=report)
    _print_store(out, store)


@app.command()
def verify(
    store: StoreArgument,
    repair: Annotated[
        str | None,
        typer.Option(help="Rebuild damaged parts from this folder, URL or .npz of raw files."),
    ] = None,
    salvage: Annotated[
        bool,
        typer.Option("--salvage", help="Repair without lost raw files: reject damaged clips."),
    ] = False,
    allow: Allow = None,
    workers: Workers = None,
) -> None:
    """Check every byte of a store, and repair it with --repair or --salvage."""
    allow_code(allow or [])
    from dist_train.data.store.repair import lost_files
    from dist_train.data.store.repair import repair as mend

    fix = (
        "Run 'dist-train verify' with --repair and the folder of raw files."
        if repair is None and not salvage
        else "The repair cannot mend them; write the store again."
    )
    if is_url(store):
        fix = "Download it, repair that copy, and upload the files that changed."
        if repair is not None or salvage:
            raise ConfigError("a store behind a URL is only read", where=store, fix=fix)
        faults, lost = _faults_of(store, workers), []
    else:
        folder = local_path(store)
        faults, lost = _faults_of(folder, workers), lost_files(folder)
        if (faults and salvage) or ((faults or lost) and repair is not None):
            with progress("repair") as report:
                mended = mend(
                    folder, repair, faults, salvage=salvage, workers=workers, progress=report
                )
            _print_store(folder, mended)
            faults, lost = _faults_of(folder, workers), lost_files(folder)
    for name in lost:
        _echo(f"lost: {name}: --repair with the folder that has it brings its clip back")
    if faults:
        raise StoreError(
            f"{len(faults)} faults",
            where=store,
            fix=fix,
        )
    _echo(f"{store} is whole")
    _print_copies(store)


@app.command()
def info(store: StoreArgument) -> None:
    """Show the clips of a store: classes, groups, splits and sizes."""
    from dist_train.data.check.check import check_records
    from dist_train.data.inspect import describe_store
    from dist_train.data.store.reader import Store

    opened = Store(store)
    for table in describe_store(opened):
        console.print(table)
    _print_copies(opened)
    for line in check_records(opened):
        _say(line)
    _say("'dist-train check' looks for faulty clips, near copies and leaks in the pixels, too")


@app.command()
def check(
    store: StoreArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of target, select, split and seed, as for 'train'."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="File for the result; the report shows RUN/check.json of its store."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read the pixels of 5,000 clips only.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if anything is found.")] = False,
    allow: Allow = None,
    workers: Workers = None,
) -> None:
    """Look for faulty clips, copies across splits, and what gives the label away."""
    from json import dumps as quoted

    from dist_train.config import load_config

    allow_code(allow or [])
    # The store is the argument, whatever the file says.
    settings = load_config(
        config, [*(overrides or []), f"store={quoted(str(store), ensure_ascii=False)}"]
    )
    from dist_train.data.check.check import check_store
    from dist_train.data.check.text import tables
    from dist_train.data.store.reader import Store
    from dist_train.files import check_replaceable, check_writable, write_whole

    if json is not None:
        check_writable(json.parent)
        check_replaceable(json)
    opened = Store(store, settings.cache)
    with progress("check") as report:
        result = check_store(opened, settings, quick=quick, workers=workers, progress=report)
    for table in tables(result):
        console.print(table)
    for note in result.notes:
        _say(note)
    if json is not None:
        write_whole(json, result.model_dump_json(indent=1) + "\n")
        _echo(f"result in {json}")
    if strict and not result.is_clean:
        raise typer.Exit(1)


@app.command()
def inspect(
    clip: Annotated[Path, typer.Argument(help="A video with a coloured outline.")],
    png: Annotated[Path | None, typer.Option(help="Picture of the outline to write.")] = None,
    colour: Colour = None,
    least_outline: LeastOutline = 16,
) -> None:
    """Show the outline that is found in each frame of a video, to choose --colour."""
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
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value; see 'dist-train config'.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    resume: Annotated[
        Literal["never", "auto"], typer.Option(help="auto: resume from the newest checkpoint.")
    ] = "never",
    allow: Allow = None,
) -> None:
    """Train a model. For several processes: 'accelerate launch -m dist_train train ...'."""
    from dist_train.config import load_config

    allow_code(allow or [])
    # Before the import of torch, so that a wrong setting is shown at once.
    settings = load_config(config, overrides or [])
    from dist_train.training.train import train as fit

    with progress("train") as report:
        fit(settings, resume=resume, progress=report, say=_say)
    _leave_launch()


@app.command()
def doctor(
    folder: Annotated[
        Path, typer.Option(help="A folder on the disk for runs, which is checked too.")
    ] = Path(),
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds that processes wait for others.")
    ] = 60.0,
) -> None:
    """Check this machine before training. Under a launcher: all machines and their network."""
    from dist_train.doctor.examine import examine

    findings = examine(folder.resolve(), timeout=timeout)
    bad = sum(finding.state == "bad" for finding in findings)
    _leave_launch(1 if bad else 0)
    if bad:
        raise typer.Exit(1)


@app.command()
def predict(
    run: Run,
    store: Annotated[
        str | None,
        typer.Option(help="Predict all clips of this store, not the run's val and test clips."),
    ] = None,
    store_path: StorePath = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the predictions; the run's if unset.")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            callback=lambda text: None if _prior(text) is None else text,
            help="Share of positives among the clips of later use, for calibration; of more "
            "classes, NAME=SHARE,... of each; if unset, that of the train split.",
        ),
    ] = None,
    threshold: Threshold = None,
    tta: Annotated[
        Literal["none", "flips"],
        typer.Option(help="Average over mirrored and reversed clips, too (flips)."),
    ] = "none",
    allow: Allow = None,
) -> None:
    """Predict held-out or new clips by the mean over the run's snapshots.

    For several processes: 'accelerate launch -m dist_train predict ...'.
    """
    from dist_train.evaluation.predict import predict as write_predictions

    allow_code(allow or [])
    with progress("predict") as report:
        written = write_predictions(
            run,
            store=store,
            store_path=store_path,
            out=out,
            prior=_prior(prior),
            threshold=threshold,
            tta=tta,
            progress=report,
        )
    if _is_first():
        _echo(f"predictions in {written}")
    _leave_launch()


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run with predictions.")],
    threshold: Threshold = None,
    by: Annotated[
        str | None,
        typer.Option(help="Metrics for each value of this column of the clip table, or of group."),
    ] = None,
) -> None:
    """Print the metrics of a run's predictions, with confidence intervals."""
    from dist_train.evaluation.evaluate import evaluate_run
    from dist_train.evaluation.target_text import tables

    evaluation = evaluate_run(run, threshold=threshold, by=by)
    for view in tables(evaluation):
        console.print(view)


@app.command()
def suspects(
    run: Annotated[Path, typer.Argument(help="Folder of a run with predictions.")],
) -> None:
    """Rank the labels that held-out predictions contradict, in suspects.csv."""
    from dist_train.evaluation.suspects import find_suspects

    found = find_suspects(run)
    for note in found.notes:
        _echo(note)
    _echo(f"{found.likely:,} of {found.labels:,} labels are likely wrong; ranked in {found.path}")


@app.command("sweep")
def sweep_settings(
    file: Annotated[Path, typer.Argument(help="YAML file of a sweep; docs/sweep.md.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; the file's if unset.")] = (
        None
    ),
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Number of trials at a time; the file's if unset.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster to run on, or 'auto'.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="One seed and fold, with the file's settings for this, in OUT-quick."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trials only.")] = False,
    allow: Allow = None,
) -> None:
    """Train, predict and evaluate many variants of a run. Goes on if it was killed."""
    allow_code(allow or [])
    from dist_train.sweep.results import listing, table_text
    from dist_train.sweep.run_sweep import planned, read_sweep, run_sweep

    sweep = read_sweep(file, out=out, at_once=at_once, ray=ray, quick=quick)
    if dry_run:
        console.print(listing(sweep.out, planned(sweep, file, quick=quick)[0]))
        return
    with progress("sweep") as report:
        results = run_sweep(sweep, file, quick=quick, progress=report, say=_say)
    console.print(table_text(results))
    if results.agreement is not None:
        _say("order against the reference: Kendall's tau {:.2f}, 95 % CI {:.2f} to {:.2f}".format(
            *results.agreement))  # fmt: skip
    _echo(f"results.csv, table.csv and sweep.png in {sweep.out}")
    failed = int((results.trials["state"] == "failed").sum())
    if failed:
        raise RunError(
            f"{failed} of {len(results.trials)} trials failed",
            where=sweep.out,
            fix="results.csv says why; the same command tries them again."
            if sweep.search == "random"
            else "results.csv says why; a search does not try them again.",
        )


@app.command("trial", hidden=True)
def single_trial(
    folder: Annotated[Path, typer.Argument(help="Folder of a trial of a sweep.")],
    end_with_input: Annotated[
        bool, typer.Option("--end-with-input", help="End at once when standard input is closed.")
    ] = False,
) -> None:
    """Run one trial of a sweep, as the sweep itself does."""
    from dist_train.sweep import one_trial

    if end_with_input:
        one_trial.end_with_input()
    with progress("trial") as report:
        one_trial.run_trial(folder, progress=report, say=_say)


@app.command()
def baseline(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of store, out, target, select, split and seed."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    model: Annotated[
        Literal["logistic", "boosting"],
        typer.Option(help="Logistic (of values ridge) regression, or gradient boosting of trees."),
    ] = "logistic",
    columns: Annotated[
        str, typer.Option(help="Columns of the clips, separated by commas.")
    ] = "depth,height,width",
) -> None:
    """Print how well sizes alone, without pixels, predict the target."""
    from dist_train.config import load_config

    settings = load_config(config, overrides or [])
    from dist_train.evaluation.baseline import baseline as fit_baseline
    from dist_train.evaluation.target_text import tables

    names = [name.strip() for name in columns.split(",") if name.strip()]
    for table in tables(fit_baseline(settings, model=model, columns=names)):
        console.print(table)
    _echo(f"predictions and evaluation in {settings.out}")


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="Safetensors file to write.")],
    onnx: Annotated[Path | None, typer.Option(help="ONNX file to write, too.")] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Step of one snapshot or checkpoint; if unset, all snapshots."),
    ] = None,
    store_path: StorePath = None,
    allow: Allow = None,
) -> None:
    """Write the model that 'predict' uses, with all snapshots, to one file, and a model card."""
    from dist_train.evaluation.export import export_run

    allow_code(allow or [])
    facts = export_run(run, out, onnx=onnx, step=step, store_path=store_path)
    steps = ", ".join(map(str, facts["steps"]))
    for written in filter(None, (out, onnx)):
        _echo(f"{facts['from']} of step {steps} in {written}")
    _echo(f"model card in {out.with_suffix('.md')}")


@app.command()
def explain(
    run: Run,
    keys: Annotated[
        list[str] | None,
        typer.Argument(help="Keys of clips; if none, the most wrong and the most sure ones."),
    ] = None,
    method: Annotated[
        Literal["grad-cam", "integrated-gradients", "occlusion"],
        typer.Option(help="How the map is made; docs/explain.md."),
    ] = "grad-cam",
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="Class, label or value to explain; if unset, the class that the model says.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Number of the most wrong clips, and of the most sure ones.")
    ] = 4,
    store_path: StorePath = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; RUN/explanations if unset.")
    ] = None,
    allow: Allow = None,
) -> None:
    """Show what in a clip the model's answer rests on: pictures of maps, and curves over depth."""
    from dist_train.explain.explain import FOLDER
    from dist_train.explain.explain import explain as write_pictures

    allow_code(allow or [])
    with progress("explain") as report:
        found = write_pictures(
            run,
            keys or (),
            method=method,
            class_name=class_name,
            count=count,
            store_path=store_path,
            out=out,
            progress=report,
        )
    _echo(f"{len(found)} clips explained in {out or run / FOLDER}")


@app.command()
def report(run: Run, store_path: StorePath = None) -> None:
    """Write a run's report, one HTML page without other files."""
    from dist_train.evaluation.report import report_run

    _echo(f"report in {report_run(run, store_path=store_path)}")


def _echo(line: str) -> None:
    """Print a line; names in it cannot act as terminal commands."""
    typer.echo(printable(line))


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)


def _prior(text: str | None) -> float | dict[str, float] | None:
    """The value of --prior, given as 0.01 or as NAME=SHARE,..."""
    if text is None:
        return None
    try:
        if "=" not in text:
            shares: list[float] = [float(text)]
            found: float | dict[str, float] = shares[0]
        else:
            pairs = [pair.rpartition("=") for pair in text.split(",")]
            found = {name: float(share) for name, _, share in pairs}
            shares = list(found.values())
            if len(found) < len(pairs) or "" in found:
                raise ValueError
    except ValueError:
        raise typer.BadParameter(f"'{text}' is neither a share nor NAME=SHARE,...") from None
    if not all(0 <= share <= 1 for share in shares):
        raise typer.BadParameter(f"'{text}' is not in the range 0 to 1")
    return found


def _share(text: str) -> float:
    """The value of --max-rejected, given as "1%" or "0.01"."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(
            f"'{text}' is not a share",
            where="--max-rejected",
            fix="Give it as 1% or 0.01, from 0 to 1.",
        )
    return share


def _colour(text: str | None) -> OutlineColour:
    from dist_train.data.raw.outline import OutlineColour

    return OutlineColour() if text is None else OutlineColour.parse(text)


class _OneLine(logging.Formatter):
    """Escapes line breaks and terminal commands in messages."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def main() -> None:
    """Run the command line. A user's error ends in one message and a non-zero exit code."""
    for stream in (sys.stdout, sys.stderr):
        # The terminal may lack characters of names.
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
        # Disks and permissions are up to the user. Errors of a full disk may name no file.
        if NO_TEMPORARY_FOLDER in str(error):
            _fail(f"{error.strerror or error}. Set TMPDIR to a folder that can be written to.", 1)
        fix = advice(error)
        if error.filename is None and fix is None:
            raise
        _fail(str(DistTrainError(error.strerror or "", where=error.filename, fix=fix)), 1)
    except (MemoryError, RuntimeError) as error:
        told = lack_of_memory(error)
        if told is None:
            raise
        _fail(told, 1)


def _is_first() -> bool:
    """Whether this process is rank 0, the only one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _leave_launch(code: int = 0) -> None:
    """End a launched process at once; all files are written, and its process group is closed.

    gloo's threads outlive the group, and abort about one process in ten of ZeRO on CPUs when the
    interpreter ends normally (torch 2.13, deepspeed 0.19.8). The launcher would miss the exit code.
    """
    if "WORLD_SIZE" in os.environ:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _fail(message: str, code: int) -> NoReturn:
    message = " ".join(message.split())
    if not is_told(message):
        process = "" if _is_first() else f" (process {os.environ['RANK']})"
        print(f"error{process}: {printable(message)}", file=sys.stderr, flush=True)
    _leave_launch(code)
    sys.exit(code)


def _print_store(out: Location, store: dict[str, Any]) -> None:
    from dist_train.data.inspect import remarks
    from dist_train.data.store.publish import folder_of
    from dist_train.data.store.rejects import by_class

    rejected = store["rejected"]
    _echo(f"{store['clips']} clips in {out}")
    if rejected:
        number = sum(rejected.values())
        classes = by_class(rejected, store.get("classes"))
        _echo(f"rejected: {number} ({classes}), see {out}/rejected.csv")
    for line in remarks(folder_of(out)):
        _echo(line)
    _print_copies(folder_of(out))


def _print_copies(store: Location | Store) -> None:
    from dist_train.data.duplicates import describe_duplicates
    from dist_train.data.store.reader import Store

    if copies := describe_duplicates(store if isinstance(store, Store) else Store(store)):
        _echo(copies)


def _faults_of(store: Location, workers: int | None) -> list[Any]:
    from dist_train.data.store.verify import verify as find_faults

    with progress("verify") as report:
        faults = find_faults(store, workers=workers, progress=report)
    for fault in faults:
        _echo(f"bad: {fault}")
    return faults
