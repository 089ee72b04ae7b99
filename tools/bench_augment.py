"""What augmentation costs: ours, albumentations frame by frame, and on the device.

Ours and albumentations must give the same bits before they are timed. Then one core reads clips and
packs them for the device. benchmarks/augment.md explains the results.

    python tools/bench_augment.py [--rounds N] [--quick] [--json FILE]
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from measuring import finish, new_table, options, say, seconds, versions, write_manifest
from rich.table import Table

from dist_train.config import AugmentSettings
from dist_train.data.augment.cpu import Augment
from dist_train.data.augment.gpu import augmented_batch
from dist_train.data.augment.packed_clips import pack
from dist_train.data.loading.collate import collate
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import Slot
from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.store.reader import Store
from dist_train.data.table.manifest import read_manifest
from dist_train.data.types import Volume

#: Frames, height and width of a clip.
SHAPE = 60, 160, 160
#: Draws in a mean, and clips that one core reads and packs, in batches of ``BATCH``.
DRAWS, CLIPS, BATCH = 24, 256, 16
#: The same for ``--quick``, and its rows.
QUICK_DRAWS, QUICK_CLIPS, QUICK_ROWS = 2, 32, ("all at once", "recipe")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The settings that are a probability of a change of one clip.
CHANGES = AugmentSettings(preset="original").model_fields_set - {"preset"}
OFF = dict.fromkeys(CHANGES, 0.0)
#: Probabilities of configs/clog_loss_*.yaml.
RECIPE = {
    "flip": 0.5,
    "rotate90": 0.5,
    "reverse": 0.5,
    "brightness": 0.5,
    "blur_noise": 0.2,
    "distort": 0.2,
    "shift_scale_rotate": 0.3,
}
ROWS = {
    **{name: OFF | {name: 1.0} for name in RECIPE},
    "all at once": dict.fromkeys(OFF, 1.0),
    "recipe": OFF | RECIPE,
}
#: Implementations beside ours.
OTHERS = ("per_frame", "calls")
Apply = Callable[[Volume, int], Volume]


def main() -> None:
    parser = options(__doc__, "one round, two rows, few draws")
    parser.add_argument("--rounds", type=int, default=3, help="times that all is timed")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    result = (
        measure(1, QUICK_ROWS, QUICK_DRAWS, QUICK_CLIPS)
        if arguments.quick
        else measure(arguments.rounds, tuple(ROWS), DRAWS, CLIPS)
    )
    finish(arguments.json, result, as_table(result))


def measure(rounds: int, names: Sequence[str], draws: int, clips: int) -> dict[str, Any]:
    clip = cells(SHAPE)
    rows = {}
    for name in names:
        say(name)
        augment = Augment(AugmentSettings.model_validate(ROWS[name]), seed=0)
        rows[name] = measure_row(augment, clip, rounds, draws)
    say("feeding")
    with tempfile.TemporaryDirectory(prefix="bench_augment.") as folder:
        feed = feeding(Path(folder), rounds, clips)
    return {
        "summary": {
            "vs_per_frame": rows["recipe"]["vs_per_frame"],
            "vs_per_frame_all_at_once": rows["all at once"]["vs_per_frame"],
            "vs_calls": rows["recipe"]["vs_calls"],
            "clips_per_second": 1e3 / rows["recipe"]["ours_ms"],
            "device_clips_per_second": 1e3 / rows["recipe"]["device_ms"],
            **feed,
        },
        "device": str(DEVICE),
        "rows": rows,
        "clip": SHAPE,
        "draws": draws,
        "rounds": rounds,
        "versions": versions("albumentations", "opencv-python-headless", "torch"),
    }


def cells(shape: tuple[int, int, int]) -> Volume:
    """A clip of blurred noise, with a grain like blood cells."""
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return np.stack([cv2.GaussianBlur(frame, (9, 9), 2.5) for frame in noise])


# --- the implementations --------------------------------------------------------------------------


def measure_row(augment: Augment, clip: Volume, rounds: int, draws: int) -> dict[str, float]:
    """Milliseconds a clip by each implementation, and ratios to ours."""
    ways: dict[str, Apply] = {
        "ours": lambda clip, number: np.ascontiguousarray(augment(clip, epoch=0, number=number)),
        "per_frame": PerFrame(augment, by_calls=False),
        "calls": PerFrame(augment, by_calls=True),
    }
    for number in range(4):
        for other in OTHERS:
            same = np.array_equal(ways["ours"](clip, number), ways[other](clip, number))
            assert same, f"{other} gives another clip"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, apply in ways.items():
            took = seconds(lambda: [apply(clip, number) for number in range(draws)])  # noqa: B023
            times[name].append(took / draws * 1e3)
    best = {name: min(of_name) for name, of_name in times.items()}
    best["device"] = device_milliseconds(augment, rounds, draws)
    found = {f"{name}_ms": took for name, took in best.items()}
    return found | {f"vs_{name}": best[name] / best["ours"] for name in OTHERS}


class PerFrame:
    """albumentations' own transforms, frame by frame.

    Args:
        augment: gives the transforms and draws.
        by_calls: draw for each frame from the same random states; otherwise draw once for each
            clip, and replay the draw.
    """

    def __init__(self, augment: Augment, *, by_calls: bool) -> None:
        self.draw, self.by_calls = augment.draw, by_calls
        used = augment.draw.transform
        self.pipeline: Any = (
            None
            if used is None
            else (A.Compose if by_calls else A.ReplayCompose)(copy.deepcopy(used.transforms))
        )

    def __call__(self, clip: Volume, number: int) -> Volume:
        key = np.random.SeedSequence((self.draw.seed, 0, number))
        numbers, choices, reversal = (int(word) for word in key.generate_state(3))

        def begin() -> Any:
            self.pipeline.set_random_state(np.random.default_rng(numbers), random.Random(choices))
            return self.pipeline

        if self.pipeline is None:
            pass
        elif self.by_calls:
            clip = np.stack([begin()(image=frame)["image"] for frame in clip])
        else:
            drawn = begin()(image=clip[0])["replay"]
            # ReplayCompose.replay would restore the draw for each frame, which takes longer.
            replay = A.ReplayCompose._restore_for_replay(drawn)
            clip = np.stack([replay(image=frame, force_apply=True)["image"] for frame in clip])
        is_reversed = np.random.default_rng(reversal).random() < self.draw.reverse
        return np.ascontiguousarray(clip[::-1]) if is_reversed else clip


# --- the device -----------------------------------------------------------------------------------


def native(count: int) -> list[Volume]:
    """Crops of 60 frames, of 40 to 104 pixels in height and width: a fifth of 160 x 160 pixels."""
    sizes = np.random.default_rng(1).integers(40, 105, (count, 2)).tolist()
    grain = cells((SHAPE[0], 104, 104))
    return [np.ascontiguousarray(grain[:, :height, :width]) for height, width in sizes]


def device_milliseconds(augment: Augment, rounds: int, count: int) -> float:
    """Milliseconds for resizing and augmenting a native clip, without making the draws."""
    size = SHAPE[1], SHAPE[2]
    clips = [torch.from_numpy(clip) for clip in native(count)]
    draws = [augment.draw(size, epoch=0, number=number) for number in range(count)]
    packed = pack(clips, draws).to(DEVICE)
    apply = partial(augmented_batch, packed, size)
    return min(seconds(apply, DEVICE) for _ in range(rounds + 1)) / count * 1e3


# --- one core of a loader -------------------------------------------------------------------------


def feeding(folder: Path, rounds: int, clips: int) -> dict[str, float]:
    """Clips a second that one process reads from the page cache and batches in shared memory, as a
    loader worker does: with the recipe on the device, and on the host."""
    raw = folder / "raw"
    raw.mkdir()
    for number, clip in enumerate(native(clips)):
        np.save(raw / f"{number:06d}.npy", clip)
    manifest = read_manifest(write_manifest(raw, [number % 2 for number in range(clips)]))
    prepare(manifest, raw, folder / "store", PrepareSettings(roi="none"), workers=1)
    store = Store(folder / "store")
    rates = {}
    for name, on_device in (("feed_clips_per_second", True), ("feed_on_host", False)):
        dataset = ClipDataset(
            store,
            size=(SHAPE[1], SHAPE[2]),
            max_frames=None,
            augment=Augment(AugmentSettings.model_validate(OFF | RECIPE), seed=0),
            on_device=on_device,
        )
        rates[name] = max(feed_rate(dataset, epoch, clips) for epoch in range(rounds))
    return rates


def feed_rate(dataset: ClipDataset, epoch: int, clips: int) -> float:
    def feed() -> None:
        for first in range(0, clips, BATCH):
            slots = [Slot(clip, epoch) for clip in range(first, first + BATCH)]
            collate(dataset, slots).share_memory()

    return clips / seconds(feed)


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    table = new_table(
        "ms a clip of {} x {} x {}".format(*result["clip"]),
        *("", "ours", "per frame", "", "calls", "", f"on {result['device']}"),
    )
    for name, row in result["rows"].items():
        cells = [f"{row['ours_ms']:.2f}"]
        for way in OTHERS:
            cells += [f"{row[f'{way}_ms']:.1f}", f"x {row[f'vs_{way}']:.1f}"]
        table.add_row(name, *cells, f"{row['device_ms']:.2f}")
    table.caption = (
        "one core reads, draws and packs {feed_clips_per_second:.0f} clips/s for the device, or "
        "augments {feed_on_host:.0f} clips/s on the host".format(**result["summary"])
    )
    return table


if __name__ == "__main__":
    main()
