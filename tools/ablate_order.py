"""Does an order by depth bands cost learning? Random against banded, on the demo's synthetic set.

Trains the demo's network nearly as the demo does, with several seeds in either order, and compares
the held-out figures seed by seed. Needs the store that `make demo` leaves.

    python tools/ablate_order.py [--seeds N] [--store STORE] [--out DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.store.reader import Store
from dist_train.data.table.manifest import read_manifest

CONFIG = Path("configs/demo_cpu.yaml")
# Of clips cut to the demo's 32 frames nearly all are of one depth, and bands the same as random. So
# each clip is its own first half, of 13 frames and more, before it is cut. (Of the first quarter,
# uncut, a run may learn nothing.) Fewer epochs, for ten runs to be bearable.
SHARE = 2
SETTINGS = ("train.epochs=24", "snapshots.at=[20, 21, 22, 23, 24]")
ORDERS = ("random", "banded")
# Of held-out clips: the first at the threshold fitted on val, the second at none.
FIGURES = ("mcc", "auc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of either order (default 5)")
    parser.add_argument("--store", type=Path, default=Path("runs/demo-data/store"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablate-order"))
    parser.add_argument("--json", type=Path, help="write the figures there, under 'summary'")
    arguments = parser.parse_args()
    store = arguments.out / "store"
    if not store.exists():
        shorten(arguments.store, store)
    runs = list(product(ORDERS, range(arguments.seeds)))
    # A run takes one core.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        judged = list(pool.map(lambda run: figures_of(store, arguments.out, *run), runs))
    by_order = {
        order: [figures for (name, _), figures in zip(runs, judged, strict=True) if name == order]
        for order in ORDERS
    }
    result = {"summary": compare(by_order), "runs": by_order}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    Console().print(as_table(result))


def shorten(whole: Path, out: Path) -> None:
    """A store of the first ``1 / SHARE`` of each clip of another."""
    store = Store(whole)
    lines = ["filename,label"]
    with TemporaryDirectory() as folder:
        for clip, label in enumerate(store.table["label"]):
            volume = store.read(clip)
            np.save(Path(folder) / f"{clip:04d}.npy", volume[: -(-len(volume) // SHARE)])
            lines.append(f"{clip:04d}.npy,{label}")
        table = Path(folder) / "clips.csv"
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
        prepare(read_manifest(table), Path(folder), out, PrepareSettings(roi="none"), workers=1)


def figures_of(store: Path, out: Path, order: str, seed: int) -> dict[str, float]:
    """Train one run, unless it is there, and judge it on the clips held out."""
    run = out / f"{order}-{seed}"
    command = [sys.executable, "-m", "dist_train"]
    settings = [f"store={store}", f"out={run}", f"plan.order={order}", f"seed={seed}", *SETTINGS]
    # The seed cuts the folds too: each seed's two runs are judged on the same clips.
    train = ["train", "--config", str(CONFIG), "--resume", "auto", *settings]
    for arguments in (train, ["predict", str(run)], ["evaluate", str(run)]):
        done = subprocess.run(
            [*command, *arguments], check=False, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"error: '{arguments[0]}' of {run} failed: {done.stderr}")
    test = json.loads((run / "evaluation.json").read_text())
    print(f"{run}: " + ", ".join(f"{name} {test[name]:.3f}" for name in FIGURES), flush=True)
    return {name: test[name] for name in FIGURES}


def compare(by_order: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Means, the mean difference (banded less random) over seeds, and its standard error."""
    summary: dict[str, float] = {}
    for name in FIGURES:
        values = {order: np.array([run[name] for run in runs]) for order, runs in by_order.items()}
        difference = values["banded"] - values["random"]
        summary |= {f"{name}_{order}": float(values[order].mean()) for order in ORDERS}
        summary[f"{name}_difference"] = float(difference.mean())
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
        summary[f"{name}_standard_error"] = float(error)
    return summary


def as_table(result: dict[str, Any]) -> Table:
    summary, runs = result["summary"], result["runs"]
    table = Table(title="held-out figures by order")
    for heading in ("", *ORDERS, "banded - random"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in FIGURES:
        for seed, pair in enumerate(zip(*(runs[order] for order in ORDERS), strict=True)):
            values = [run[name] for run in pair]
            difference = values[1] - values[0]
            table.add_row(
                f"{name}, seed {seed}", *(f"{v:.3f}" for v in values), f"{difference:+.3f}"
            )
        means = (f"{summary[f'{name}_{order}']:.3f}" for order in ORDERS)
        table.add_row(
            f"{name}, mean",
            *means,
            f"{summary[f'{name}_difference']:+.3f} ± {summary[f'{name}_standard_error']:.3f}",
            end_section=True,
        )
    return table


if __name__ == "__main__":
    main()
