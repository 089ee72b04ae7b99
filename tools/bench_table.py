"""What a store's clip table costs each process, and how long a training of a large one takes to
start.

Writes tables of as many clips as the Clog Loss challenge has and of --clips, without pixels. Fresh
processes open them, from the table and, as before it, from the index, and go as far as a
training's first batch of clip numbers, twice. benchmarks/table.md explains the results.

    python tools/bench_table.py [--clips N] [--folder DIR] [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import lmdb
import numpy as np
import psutil
from measuring import add_goals, finish, memory, new_table, options, say, versions
from rich.table import Table

from dist_train.array_file import Array, write_arrays
from dist_train.config import Config, load_config
from dist_train.data.loading.dataset import ClipDataset
from dist_train.data.loading.sampler import PlanSampler, held_out_batches
from dist_train.data.loading.worker import BatchDataset
from dist_train.data.plan.shuffle import mix
from dist_train.data.store.clip_table import TABLE
from dist_train.data.store.index import index_checksum
from dist_train.data.store.reader import FORMAT, INDEX, MARKER, Store
from dist_train.data.synthetic.challenge_stats import CLIPS_BY_DEPTH
from dist_train.files import sealed, write_whole, written_whole
from dist_train.places import CACHE
from dist_train.run.data import check_same_data, open_data, write_splits
from dist_train.run.record import begin_session

CHALLENGE, POSITIVES = 573_048, 1_887
GROUPS, CLIPS_A_SHARD = 1_000, 10_000
#: Clips that are made at a time.
PIECE = 1 << 20
#: Fresh processes of which a figure is the median; clips that a worker reads.
PROCESSES, READ = 3, 1_000


def main() -> None:
    parser = options(__doc__, "few clips, to see that it runs")
    parser.add_argument("--clips", type=int, default=10**8, help="clips of the large table")
    parser.add_argument(
        "--folder", type=Path, help="where the tables are written (130 bytes a clip)"
    )
    arguments = parser.parse_args()
    small, large = (100_000, 200_000) if arguments.quick else (CHALLENGE, arguments.clips)
    with (
        TemporaryDirectory(dir=arguments.folder) as folder,
        mock.patch.dict(os.environ, {CACHE: str(Path(folder) / "cache")}),
    ):
        result = measure(Path(folder), small, large)
    finish(arguments.json, result, as_table(result))


def measure(folder: Path, small: int, large: int) -> dict[str, Any]:
    say(f"{small} clips")
    store = write_store(folder / "small", small)
    opened = [fresh(open_store, store) for _ in range(PROCESSES)]
    summary = {f"{name}_573k": median(one[name] for one in opened) for name in opened[0]}
    summary["worker_pickle_kb"] = summary.pop("pickle_kb_573k")
    started = fresh(start, store, folder / "small-run", False)
    summary |= {f"{name}_573k": started[name] for name in ("start_s", "rank_mb")}
    without = without_table(store, folder / "without")
    before = fresh(open_store, without)
    summary |= {f"index_{name}_573k": value for name, value in before.items()}

    say(f"{large} clips")
    store = write_store(folder / "large", large)
    name = f"1e{len(str(large)) - 1}"
    summary[f"open_s_{name}"] = median(fresh(open_store, store)["open_s"] for _ in range(PROCESSES))
    run = folder / "large-run"
    for kind, again in (("start", False), ("again", True)):
        found = fresh(start, store, run, again)
        say(f"{kind}: {found['parts']}")
        summary[f"{kind}_s_{name}"] = found["start_s"]
        summary[f"{kind}_cpu_s_{name}"] = found["cpu_s"]
        summary[f"{kind}_peak_mb_{name}"] = found["peak_mb"]
        summary[f"{kind}_private_mb_{name}"] = found["rank_mb"]
    return {
        "summary": summary,
        "clips": {"small": small, "large": large},
        "table_bytes": (store / TABLE).stat().st_size,
        "versions": versions("numpy", "pandas"),
    }


# --- what a fresh process does --------------------------------------------------------------------


def fresh(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What ``work`` finds in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def open_store(folder: Path) -> dict[str, float]:
    """Open a store, and take what a worker takes of its table.

    ``extra_mb`` counts all pages that the process holds more than before, shared ones too.
    """
    before = memory("VmRSS")
    began = time.perf_counter()
    store = Store(folder)
    opened = time.perf_counter() - began
    clips = ClipDataset(store, size=(160, 160), max_frames=None, augment=None)
    numbers = np.random.default_rng(0).integers(0, len(store.table), READ).tolist()
    assert len(clips.depths(numbers)) == len(clips.labels(numbers)) == READ
    for clip in numbers:
        assert clips.native_shape(clip) == store.shape(clip)
    extra = memory("VmRSS") - before
    # As the loader pickles it for a worker.
    pickled = pickle.dumps(BatchDataset(clips, None, None, 0.0))
    return {"open_s": opened, "extra_mb": extra / 1e6, "pickle_kb": len(pickled) / 1e3}


def start(store: Path, run: Path, again: bool) -> dict[str, Any]:
    """Begin a training, or resume it, as far as the first batch of clip numbers."""
    config = config_of(store, run)
    parts: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        parts[name] = round(time.perf_counter() - began, 2)

    before = private_bytes()
    began, cpu_before = time.perf_counter(), time.process_time()
    with timed("data"):
        data = open_data(config, training=True)
    with timed("plan"):
        plan = data.plan()
        assert len(plan.fingerprint) == 16
    with timed("splits"):
        if again:
            check_same_data(run, data)
        else:
            run.mkdir()
        begin_session(run, {"checkpointed": True, **write_splits(run, data)}, {})
    with timed("first batch"):
        val = data.numbers("val")
        held_out = held_out_batches(val, data.store.table["frames"][val], rank=0, world=8, batch=32)
        sampler = PlanSampler(plan, rank=0, world=8, accumulate=1, first=0, last=1)
        assert len(next(iter(sampler))) == len(held_out[0]) == 32
        assert data.deepest() > 0
        assert data.natural_rate() > 0
    return {
        "start_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu_before,
        "parts": parts,
        "rank_mb": (private_bytes() - before) / 1e6,
        "peak_mb": memory("VmHWM") / 1e6,
    }


def private_bytes() -> int:
    return int(psutil.Process().memory_full_info().uss)


def config_of(store: Path, run: Path) -> Config:
    return load_config(None, [f"store={store}", f"out={run}", "plan.batch=256"])


# --- stores without pixels ------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A column that is made in pieces from clip numbers, int64 [n]; ``width`` values a clip."""

    clips: int
    dtype: np.dtype[Any]
    values: Callable[[Array], Array]
    width: int = 1

    def __len__(self) -> int:
        return self.clips * self.width

    def pieces(self) -> Iterator[Array]:
        for first in range(0, self.clips, PIECE):
            numbers = np.arange(first, min(first + PIECE, self.clips))
            yield np.ascontiguousarray(self.values(numbers), self.dtype).reshape(-1)


def write_store(folder: Path, clips: int) -> Path:
    """A finished store's marker and clip table. Depths and the share of positives are the
    challenge's, groups are ``GROUPS`` projects, no two checksums are equal."""
    folder.mkdir()
    depths = np.repeat(np.array(list(CLIPS_BY_DEPTH)), list(CLIPS_BY_DEPTH.values()))
    columns = {
        "label": (np.int8, lambda n: _random(n, 1) % CHALLENGE < POSITIVES),
        "frames": (np.int32, lambda n: depths[_random(n, 2) % len(depths)]),
        "height": (np.int32, lambda n: 40 + _random(n, 3) % 120),
        "width": (np.int32, lambda n: 40 + _random(n, 4) % 120),
        "weight": (np.float64, lambda n: np.ones(len(n))),
        "crowd_score": (np.float64, lambda n: (_random(n, 5) % 1_000) / 1_000),
        "tier1": (np.bool_, lambda n: np.ones(len(n))),
        "shard": (np.int32, lambda n: n // CLIPS_A_SHARD),
        "offset": (np.int64, lambda n: n % CLIPS_A_SHARD * 500_000),
        # A bijection of 32-bit words.
        "crc32c": (np.uint32, lambda n: (n * 2_654_435_761) % (1 << 32)),
        "group.codes": (np.int32, lambda n: 1 + _random(n, 6) % GROUPS),
        "split.codes": (np.int32, lambda n: np.zeros(len(n))),
    }
    arrays: dict[str, Any] = {
        name: Made(clips, np.dtype(dtype), values) for name, (dtype, values) in columns.items()
    }
    for name, suffix in (("key", ""), ("filename", ".mp4")):
        width = len(_key(0)) + len(suffix)
        arrays[f"{name}.bytes"] = Made(clips, np.dtype(np.uint8), _text(suffix), width)
        arrays[f"{name}.ends"] = Made(clips, np.dtype(np.int64), _ends(width))
    for name, names in (
        ("group", ["", *(f"project{n:04}" for n in range(GROUPS))]),
        ("split", [""]),
    ):
        arrays[f"{name}.names.bytes"] = np.frombuffer("".join(names).encode(), np.uint8)
        arrays[f"{name}.names.ends"] = np.cumsum([len(n) for n in names], dtype=np.int64)
    with written_whole(folder / TABLE) as file:
        checksum = write_arrays(file, arrays)
    marker = {
        "format": FORMAT,
        "fingerprint": "0" * 64,
        "settings": {},
        "clips": clips,
        "shards": -(-clips // CLIPS_A_SHARD),
        "rejected": {},
        "index_crc32c": 0,
        "content": f"{clips:064x}",
        "table_crc32c": checksum,
    }
    write_whole(folder / MARKER, sealed(marker))
    return folder


def without_table(store: Path, folder: Path) -> Path:
    """The same store as it was before there were tables: with an index."""
    table = Store(store).table
    folder.mkdir()
    with lmdb.open(str(folder / INDEX), subdir=False, lock=False, map_size=1 << 33) as env:
        for first in range(0, len(table), 1 << 15):
            frame = table.frame(np.arange(first, min(first + (1 << 15), len(table))))
            with env.begin(write=True) as transaction:
                for row in frame.to_dict("records"):
                    row["shape"] = [row.pop(name) for name in ("frames", "height", "width")]
                    key = row.pop("key")
                    value = json.dumps(row | {"length": int(np.prod(row["shape"]))}).encode()
                    transaction.put(key.encode(), value, append=True)
    marker = Store(store).info | {"index_crc32c": index_checksum(folder / INDEX)}
    del marker["table_crc32c"]
    write_whole(folder / MARKER, sealed(marker))
    return folder


def _key(clip: int) -> str:
    return f"clip{clip:09}"


def _text(suffix: str) -> Callable[[Array], Array]:
    def values(numbers: Array) -> Array:
        text = np.empty((len(numbers), len(_key(0)) + len(suffix)), np.uint8)
        text[:] = np.frombuffer((_key(0) + suffix).encode(), np.uint8)
        for digit in range(9):
            text[:, 4 + digit] += (numbers // 10 ** (8 - digit) % 10).astype(np.uint8)
        return text

    return values


def _ends(width: int) -> Callable[[Array], Array]:
    return lambda numbers: (numbers + 1) * width


def _random(numbers: Array, column: int) -> Array:
    """Numbers from 0 to 2^31 that depend on clip and column alone."""
    mixed = mix(numbers.astype(np.uint64) * np.uint64(16) + np.uint64(column))
    return (mixed >> np.uint64(33)).astype(np.int64)


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    summary = result["summary"]
    table = new_table("{small} and {large} clips".format(**result["clips"]), "", "", "goal")
    add_goals(
        table,
        summary,
        ("open, small", "open_s_573k", "{:.4f} s", "<= 0.2 s"),
        ("  from the index", "index_open_s_573k", "{:.1f} s", ""),
        ("memory of a further process", "extra_mb_573k", "{:.1f} MB", "<= 30 MB"),
        ("  from the index", "index_extra_mb_573k", "{:.0f} MB", ""),
        ("pickled for a worker", "worker_pickle_kb", "{:.1f} kB", "< 10 kB"),
        ("  from the index", "index_pickle_kb_573k", "{:.0f} kB", ""),
        ("start of a training", "start_s_573k", "{:.1f} s", ""),
        ("  memory of a rank's own", "rank_mb_573k", "{:.0f} MB", ""),
    )
    table.add_section()
    name = next(key.removeprefix("start_s_") for key in summary if key.startswith("start_s_1e"))
    add_goals(
        table,
        summary,
        ("open, large", f"open_s_{name}", "{:.4f} s", "<= 2 s"),
        ("start of a training", f"start_s_{name}", "{:.1f} s", "<= 120 s"),
        ("  processor time of its main process", f"start_cpu_s_{name}", "{:.1f} s", ""),
        ("  again", f"again_s_{name}", "{:.1f} s", "<= 10 s"),
        ("  processor time", f"again_cpu_s_{name}", "{:.1f} s", ""),
        ("  peak memory, the first time", f"start_peak_mb_{name}", "{:.0f} MB", ""),
        ("  a rank's own memory, again", f"again_private_mb_{name}", "{:.0f} MB", ""),
    )
    return table


if __name__ == "__main__":
    main()
