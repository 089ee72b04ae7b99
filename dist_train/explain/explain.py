"""Pictures of what the model's answers rest on, for some clips of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_train.data.pictures import as_picture
from dist_train.data.splits import NAMES
from dist_train.data.store.reader import Store
from dist_train.distributed.device import chosen_cuda
from dist_train.errors import ConfigError, RunError
from dist_train.evaluation.predict import find_snapshots
from dist_train.evaluation.prediction_origin import check_origin
from dist_train.evaluation.prediction_table import read_predictions
from dist_train.explain.choose import Chosen, choose_clips
from dist_train.explain.maps import ClipMap, Method, find_maps
from dist_train.explain.pictures import as_gif, as_mp4, overlay, shares, side_by_side, strip
from dist_train.explain.result import EXPLANATIONS, LIST, Explanation, earlier_files
from dist_train.files import check_writable, write_whole
from dist_train.places import Location
from dist_train.progress import Progress
from dist_train.run.data import RunData, open_run_data
from dist_train.run.folder import PREDICTIONS
from dist_train.run.record import open_run, read_record, warn_of_other_code
from dist_train.targets import Target

FOLDER = "explanations"
#: Clips of each kind that are chosen by default.
COUNT = 4
#: Clips whose maps are in memory at a time.
AT_ONCE = 64


def explain(
    run: Path,
    keys: Sequence[str] = (),
    *,
    method: Method = "grad-cam",
    class_name: str | None = None,
    count: int = COUNT,
    store_path: Location | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> list[Explanation]:
    """Write ``explanations.json`` and its pictures for clips of a run's store.

    Args:
        run: a run folder with snapshots and, unless ``keys`` are given, predictions.
        keys: the clips, of any split; if none, those of ``choose_clips``.
        method: "grad-cam", "integrated-gradients" or "occlusion".
        class_name: the class, label or value to explain. Default: the class that the model says;
            of clips of ``keys``, its likeliest label, or its first value.
        count: how many of the most wrong clips, and of the most sure ones.
        store_path: where the run's own store is now, if it was moved.
        out: folder to write to. Default: ``explanations`` in the run.
        progress: called with (maps done, maps in all) over all snapshots.

    Raises:
        RunError: there is no run, snapshot or prediction; an output is not finite; memory does not
            suffice; the folder holds another ``explanations.json``; or a launcher started this.
        ConfigError: there is no such class.
        ModelError: the model has no layer for grad-cam.
        StoreError: the store has changed, lacks a clip, or cannot be read.
        BackendError: the device that ``train.device`` asks for is not there.
        OSError: ``out`` cannot be written, which is checked before the work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("it runs in one process", where="explain", fix="Leave the launcher out.")
    config = open_run(run)
    snapshots = find_snapshots(run)
    cuda = chosen_cuda(config.train.model_copy(update={"backend": "ddp"}))
    data = open_run_data(run, config, store_path=store_path)
    of = None if class_name is None else _place_of(class_name, data.target)
    chosen = _chosen(run, data, keys, count, of)
    folder = run / FOLDER if out is None else out
    check_writable(folder)
    earlier = earlier_files(folder)
    record = read_record(run)
    warn_of_other_code(run, config, record)

    device = torch.device("cuda" if cuda else "cpu")
    found: list[Explanation] = []
    total = len(chosen) * len(snapshots)
    for start in range(0, len(chosen), AT_ONCE):

        def tell(done: int, _: int, start: int = start) -> None:
            if progress is not None:
                progress(start * len(snapshots) + done, total)

        part = chosen[start : start + AT_ONCE]
        clips = find_maps(config, record, data, snapshots, part, method, device, tell)
        if start == 0:
            for path in earlier:
                path.unlink(missing_ok=True)
        found += [_write(folder, n, clip, data, method) for n, clip in enumerate(clips, start + 1)]
        # Whatever lies there is listed, also if a later part fails.
        write_whole(folder / EXPLANATIONS, LIST.dump_json(found, indent=1) + b"\n")
    return found


def _place_of(name: str, target: Target) -> int:
    if name not in target.classes:
        near = get_close_matches(name, target.classes, n=1)
        known = f"There are: {', '.join(target.classes[:20])}."
        raise ConfigError(
            f"there is no '{name}' among what the run predicts",
            where="--class",
            fix=f"Did you mean '{near[0]}'? {known}" if near else known,
        )
    return target.classes.index(name)


def _chosen(
    run: Path, data: RunData, keys: Sequence[str], count: int, of: int | None
) -> list[Chosen]:
    if len(keys) > 0:
        for key in keys:
            data.store.clip_of(key)
        return [Chosen(key, "asked", of) for key in dict.fromkeys(keys)]
    table = read_predictions(run / PREDICTIONS)
    check_origin(run)
    numbers = [data.store.clip_of(key) for key in table["key"]]
    truth = data.target_labels.values[numbers]
    chosen = choose_clips(table, data.target, truth, count, of)
    if not chosen:
        raise RunError(
            "no clip of its predictions is wrong, or sure",
            where=run / PREDICTIONS,
            fix="Name clips by their keys.",
        )
    return chosen


def _label_of(data: RunData, clip: int, of: int) -> str:
    value, target = data.target_labels.values[clip], data.target
    if target.is_coded:
        return target.classes[int(value)] if value >= 0 else ""
    if np.isnan(value).any():
        return ""
    if target.kind == "regression":
        return f"{value[of]:.6g}"
    return ", ".join(name for name, has in zip(target.classes, value, strict=True) if has)


def _write(folder: Path, number: int, clip: ClipMap, data: RunData, method: Method) -> Explanation:
    """Write the pictures of a clip."""
    store, (key, why, _) = data.store, clip.chosen
    place = store.clip_of(key)
    label = _label_of(data, place, clip.of)
    explained, probability = data.target.classes[clip.of], float(clip.scores[clip.of])
    filename = store.table.text("filename", place)
    plain, covered = overlay(_frames(clip.pixels, store), clip.found)
    mass = shares(clip.found)
    told = "value" if data.target.kind == "regression" else "probability"
    title = (
        f"{key} ({filename})",
        f"label {label or 'unknown'}, {told} of {explained} "
        + (f"{probability:.4g}, {method}, {why}"),
    )
    name = f"{number:03d}-{re.sub('[^A-Za-z0-9._-]', '_', key)[:80]}"
    frames = side_by_side(plain, covered)
    files: dict[str, bytes | None] = {
        f"{name}.png": strip(plain, covered, mass, clip.fall, *title),
        f"{name}.gif": as_gif(frames),
        f"{name}.mp4": as_mp4(frames),
    }
    for file, content in files.items():
        if content is not None:
            write_whole(folder / file, content)
    return Explanation(
        key=key,
        filename=filename,
        split=NAMES[data.splits[place]] or "",
        label=label,
        explained=explained,
        probability=probability,
        method=method,
        why=why,
        strip=f"{name}.png",
        animation=f"{name}.gif",
        video=None if files[f"{name}.mp4"] is None else f"{name}.mp4",
        mass=mass.tolist(),
        fall=clip.fall.tolist(),
        gap=clip.gap,
    )


def _frames(pixels: Tensor, store: Store) -> np.ndarray:
    """The frames of a clip for people, uint8 [D, H, W] or [D, H, W, 3]."""
    frames = pixels[0].permute(1, 2, 3, 0).numpy()
    return as_picture(frames[..., 0] if frames.shape[3] == 1 else frames, store.channels)
