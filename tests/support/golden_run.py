"""A small run that every backend must repeat at 1, 2, 4 and 8 processes: 8 steps of 32 clips of
unequal depth, in two epochs.

``python tests/support/golden_run.py`` writes its losses anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from helpers import ROOT, metrics_of

from dist_train.config import Config, last_of_each, load_config
from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.table.manifest import read_manifest
from dist_train.training.train import train

#: ``metrics.jsonl`` of it on one process.
GOLDEN = ROOT / "tests" / "golden" / "metrics.jsonl"
STEPS, STEPS_PER_EPOCH = 8, 4
# Positives and negatives of each split.
SPLITS = {"train": (32, 100), "val": (5, 12), "test": (3, 3)}


def golden_store(folder: Path) -> Path:
    """A store of clips of 4 to 12 frames of 16x16, the positives with a bright middle."""
    source = folder / "clips"
    source.mkdir(parents=True)
    # The numbers of this generator are the same in every version of numpy.
    random = np.random.RandomState(0)
    lines = ["filename,label,split"]
    for split, classes in SPLITS.items():
        for label in (1, 0):
            for number in range(classes[1 - label]):
                clip = random.randint(0, 120, (random.randint(4, 13), 16, 16)).astype(np.uint8)
                if label:
                    clip[:, 5:11, 5:11] += 100
                name = f"{split}-{label}-{number}.npy"
                np.save(source / name, clip)
                lines.append(f"{name},{label},{split}")
    table = folder / "clips.csv"
    table.write_text("\n".join(lines) + "\n")
    store = folder / "store"
    prepare(read_manifest(table), source, store, PrepareSettings(roi="none"), workers=1)
    return store


def golden_overrides(store: Path, out: Path, *more: str) -> list[str]:
    """Its settings. A checkpoint comes every 2 steps, so that some fall inside an epoch.

    An activation may be so near to zero that rounding decides whether it is rectified, which moves
    gradients by up to a thousandth. At this learning rate that moves the loss by little more than
    rounding does; yet training moves the loss by a thousandth, so a tolerance of 1e-6 shows an
    error of a thousandth in the training.
    """
    settings = [
        f"store={store}",
        f"out={out}",
        "clip.size=[16, 16]",
        "plan.batch=32",
        "loader.workers=0",
        "model.name=resnet3d-10",
        "model.width=8",
        "model.stem_pool=false",
        "seed=5",
        "optim.lr=1e-6",
        "optim.ema=0.9",
        "train.epochs=2",
        "train.precision=fp32",
        "train.device=cpu",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=9",
        "snapshots.at=[1, 2]",
        *more,
    ]
    return last_of_each(settings)


def golden_config(store: Path, out: Path, *more: str) -> Config:
    return load_config(None, golden_overrides(store, out, *more))


def record(folder: Path) -> None:
    """Write ``GOLDEN`` anew: after a change that is meant to change the numbers."""
    run = folder / "run"
    train(golden_config(golden_store(folder), run))
    kept = ("step", "epoch", "train/loss", "train/lr", "train/grad_norm", "val/loss")
    lines = [{k: line[k] for k in kept if k in line} for line in metrics_of(run)]
    GOLDEN.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        record(Path(place))
