"""How fast ``dist-train check`` is, and how often it raises a false alarm.

Measures CPU time, which other work on the machine changes little: statistics of synthetic
capillaries against reading them alone; the search for pairs of like hashes in sets of two sizes;
leaks in a large set; and leaks in many small sets whose columns have nothing to do with the label.
docs/check.md explains the results.

    python tools/bench_check.py [--sets N] [--quick] [--json FILE]
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from measuring import finish, new_table, options, say, versions
from rich.table import Table

from dist_train.data.check.leaks import find_leaks
from dist_train.data.check.near_copies import similar_hashes
from dist_train.data.check.statistics import statistics_of
from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.store.reader import Store
from dist_train.data.synthetic.drawing import draw_clip
from dist_train.data.synthetic.render import synthesize
from dist_train.data.table.manifest import read_manifest

CLIPS, LARGE, TRIED, SET = 160, 573_048, 50_000, 300
ROUNDS = 5


def main() -> None:
    parser = options(__doc__, "fewer clips, hashes and sets")
    parser.add_argument("--sets", type=int, default=100, help="sets that false alarms are of")
    arguments = parser.parse_args()
    small = arguments.quick
    cv2.setNumThreads(1)
    summary = statistics(24 if small else CLIPS)
    summary |= hashes(LARGE // (100 if small else 1))
    summary |= leaks(TRIED // (20 if small else 1))
    summary |= false_alarms(2 if small else arguments.sets)
    result = {"summary": summary, "versions": versions("numpy", "scikit-learn")}
    finish(arguments.json, result, as_table(summary))


def statistics(clips: int) -> dict[str, float]:
    """Clips a second, of the median of ``ROUNDS`` rounds."""
    say(f"statistics of {clips} clips")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        synthesize(folder, clips=clips, seed=0)
        manifest = read_manifest(folder / "train_metadata.csv")
        prepare(manifest, folder / "videos", folder / "store", PrepareSettings())
        store = Store(folder / "store")

        def rate(use: Callable[[np.ndarray[Any, Any]], object]) -> float:
            times = []
            for _ in range(ROUNDS):
                begin = time.process_time()
                for number in range(clips):
                    use(store.read(number))
                times.append(time.process_time() - begin)
            return clips / float(np.median(times))

        return {
            "clips_per_s_read": rate(lambda clip: None),
            "clips_per_s_read_and_measured": rate(statistics_of),
            "mean_pixels": float(np.mean([math.prod(store.shape(n)) for n in range(clips)])),
        }


def hashes(clips: int) -> dict[str, float]:
    """Seconds to find up to 1,000 planted pairs among many hashes, and among a quarter of them.

    Bits are set with unequal probabilities, as in clips that look alike, so that bands are crowded.
    """
    random = np.random.default_rng(0)
    result = {}
    for count in (clips // 4, clips):
        say(f"hashes of {count} clips")
        bits = random.random((count, 192), dtype=np.float32) < random.beta(1, 1, 192)
        rows = np.packbits(bits, axis=1)
        planted = min(1000, count // 4)
        copies = rows[:planted].copy()
        copies[np.arange(planted), random.integers(0, 24, planted)] ^= 7
        rows[-planted:] = copies
        begin = time.process_time()
        pairs, _ = similar_hashes(rows)
        result[f"hashes_s_{count}"] = time.process_time() - begin
        wanted = {(n, count - planted + n) for n in range(planted)}
        found = wanted & set(map(tuple, pairs.tolist()))
        result[f"hashes_found_{count}"] = len(found) / planted
    return result


def drawn(seed: int, clips: int) -> tuple[pd.DataFrame, np.ndarray[Any, np.dtype[np.int64]]]:
    """Columns of a synthetic set, in 12 groups of uneven size and brightness, and labels that have
    nothing to do with them but a rate by group."""
    random = np.random.default_rng([seed, clips])
    specs = [draw_clip(seed, index) for index in range(min(clips, 2000))]
    specs = [specs[index % len(specs)] for index in range(clips)]
    group = random.choice(12, clips, p=np.arange(1, 13) / 78)
    columns = pd.DataFrame(
        {
            "depth": [spec.depth for spec in specs],
            "height": [spec.box.bottom - spec.box.top for spec in specs],
            "width": [spec.box.right - spec.box.left for spec in specs],
            "mean grey": random.normal(100, 20, 12)[group] + random.normal(0, 10, clips),
            "group": [f"P{number}" for number in group],
        }
    )
    rate = random.beta(2, 6, 12)
    return columns, (random.random(clips) < rate[group]).astype(np.int64)


def leaks(clips: int) -> dict[str, float]:
    say(f"leaks in {clips} clips")
    columns, label = drawn(0, clips)
    begin = time.process_time()
    found = find_leaks(columns, {"": label})
    seconds = time.process_time() - begin
    return {"leaks_s": seconds, "leaks_clips": clips, "leaks_columns": len(found)}


def false_alarms(sets: int) -> dict[str, float]:
    """Share of columns that are called a leak in clean sets; with groups, and without."""
    say(f"false alarms in 2 x {sets} sets")
    tried = {"apart": 0, "mixed": 0}
    false = {"apart": 0, "mixed": 0}
    for seed in range(sets):
        columns, label = drawn(seed, SET)
        shuffled = np.random.default_rng(seed).permutation(label)
        for name, found in {
            "apart": [leak for leak in find_leaks(columns, {"": label}) if leak.apart],
            "mixed": find_leaks(columns.drop(columns="group"), {"": shuffled}),
        }.items():
            tried[name] += len(found)
            false[name] += sum(leak.is_leak for leak in found)
    return {
        **{f"columns_tried_{name}": count for name, count in tried.items()},
        **{f"false_alarms_{name}": count for name, count in false.items()},
    }


def as_table(summary: dict[str, float]) -> Table:
    table = new_table("dist-train check", "", "")
    for name, value in summary.items():
        table.add_row(name, f"{value:,.3g}" if value < 100 else f"{value:,.0f}")
    return table


if __name__ == "__main__":
    main()
