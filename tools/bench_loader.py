"""How fast batches come: our loader beside its peers, and beside bare reading.

Makes clips with the depths and sizes of the Clog Loss challenge's clips, writes them in the format
of each contender, and loads balanced, shuffled batches, in fresh processes, in turns.
benchmarks/loader.md explains the results.

    python tools/bench_loader.py [--clips N] [--rounds N] [--workers N] [--quick] [--no-peers]
        [--json FILE]
    python tools/bench_loader.py --remote [--peers-python FILE] ...
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from loader_contenders import CONTENDERS, RATIO, WRITERS, Task
from measuring import (
    add_goals,
    finish,
    in_turns,
    new_table,
    options,
    say,
    versions,
    write_manifest,
)
from rich.table import Table

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.synthetic.challenge_stats import BOX_HEIGHT, BOX_WIDTH, CLIPS_BY_DEPTH
from dist_train.data.table.manifest import read_manifest

SEED = 3
BATCH, PREFETCH = 64, 2
OURS = ("ours", "ours, native")
PEERS = ("original", "plain files", "WebDataset")
TOOL = Path(__file__).with_name("loader_contenders.py")
#: Batches before the timed ones, as a multiple of the prefetched batches, so that buffers exist.
#: Together with the timed batches they are less than an epoch, at whose end some peers restart.
WARM_UP = 4
#: Seconds for one contender.
TIMEOUT = 300


def main() -> None:
    parser = options(__doc__, "one round, only some clips")
    parser.add_argument("--clips", type=int, default=3072, help="clips to make (default 3072)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument(
        "--batches", type=int, help="timed in a run (default 24; with --remote those of an epoch)"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help=f"its clips (default {BATCH})")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-peers", action="store_true", help="only our loader")
    parser.add_argument("--remote", action="store_true", help="read from a local S3 server")
    parser.add_argument("--peers-python", type=Path, help="Python that has Streaming and LitData")
    parser.add_argument("--latency", type=float, default=0.02, help="of the server (default 0.02)")
    parser.add_argument("--mb-s", type=float, default=1250.0, help="of the server (default 1250)")
    parser.add_argument("--stream-mb-s", type=float, default=80.0, help="of a connection (80)")
    parser.add_argument("--folder", type=Path, help="folder to keep and reuse the clips")
    arguments = parser.parse_args()
    # With --remote 0 times all of an epoch.
    batches = arguments.batches or (0 if arguments.remote else 24)
    if arguments.quick:
        arguments.clips, arguments.rounds = min(arguments.clips, 256), 1
        batches = min(batches, 6)
    if arguments.clips < 2 * arguments.batch:
        parser.error("--clips must be at least twice --batch, for batches without repeated clips")
    with tempfile.TemporaryDirectory(prefix="bench_loader.") as temporary:
        folder = arguments.folder or Path(temporary)
        bench, show = Bench(folder, OURS if arguments.no_peers else tuple(CONTENDERS)), as_table
        if arguments.remote:
            import bench_remote

            server = {name: getattr(arguments, name) for name in ("latency", "mb_s", "stream_mb_s")}
            bench = bench_remote.RemoteBench(
                folder, arguments.peers_python, peers=not arguments.no_peers, **server
            )
            show = bench_remote.as_table
        bench.write(arguments.clips)
        task = Task(arguments.batch, arguments.workers, PREFETCH)
        result = bench.measure(task, batches, arguments.rounds)
    finish(arguments.json, result, show(result))


# --- the clips ------------------------------------------------------------------------------------


def make_clips(folder: Path, clips: int) -> None:
    """Write clips of noise as .npy files, and a store of them. Depths and sizes are about those of
    the challenge, and the classes have the ratio ``RATIO``, so that all clips come equally often.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    counts = np.array(list(CLIPS_BY_DEPTH.values()))
    depths = rng.choice(np.array(list(CLIPS_BY_DEPTH)), clips, p=counts / counts.sum())
    heights, widths = (sides(rng, limits, clips) for limits in (BOX_HEIGHT, BOX_WIDTH))
    labels = [int(number % sum(RATIO) < RATIO[0]) for number in range(clips)]
    noise = rng.integers(0, 256, int(np.max(depths * heights * widths)), dtype=np.uint8)
    for number, shape in enumerate(zip(depths, heights, widths, strict=True)):
        np.save(raw / f"{number:06d}.npy", noise[: np.prod(shape)].reshape(shape))
    (folder / "labels.json").write_text(json.dumps(labels))
    manifest = read_manifest(write_manifest(raw, labels))
    prepare(manifest, raw, folder / "store", PrepareSettings(roi="none"), workers=1)


def sides(rng: np.random.Generator, limits: tuple[int, int, int], clips: int) -> Any:
    """Log-normal sizes with the given least, mean and largest value."""
    least, mean, most = limits
    drawn = np.exp(rng.normal(0, 0.25, clips))
    return np.clip(np.rint(drawn / drawn.mean() * mean), least, most).astype(np.int64)


# --- the runs -------------------------------------------------------------------------------------


class Bench:
    """Runs of contenders, each in a fresh process.

    Args:
        folder: where their clips are or will be.
        contenders: names of those that run.

    Attributes:
        cannot: contenders that failed, with the reason.
        pythons: of contenders that need another one.
        environment: variables for all contenders.
    """

    tool, writers = TOOL, WRITERS

    def __init__(self, folder: Path, contenders: Sequence[str]) -> None:
        self.folder, self.contenders = folder, contenders
        self.cannot: dict[str, str] = {}
        self.pythons: dict[str, str] = {}
        self.environment: dict[str, str] = {}

    def write(self, clips: int) -> None:
        if not (self.folder / "store" / "store.json").exists():
            say(f"making {clips} clips")
            make_clips(self.folder, clips)
        for name in filter(self.writers.__contains__, self.contenders):
            done = self.folder / f"{name}.written"
            if not done.exists():
                say(f"writing them for {name}")
                if self.child(name, f"write {name}", {}) is not None:
                    done.touch()

    def child(self, name: str, work: str, task: dict[str, Any]) -> dict[str, Any] | None:
        """The results of ``work`` in a fresh process. None if it fails; see ``cannot``."""
        python = self.pythons.get(name, sys.executable)
        command = [python, str(self.tool), work, str(self.folder), json.dumps(task)]
        environment = {**os.environ, **self.environment, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT, env=environment
            )
        except subprocess.TimeoutExpired:
            self.cannot[name] = f"no end within {TIMEOUT} s"
            return None
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            self.cannot[name] = lines[-1]
            say(f"{name}: {lines[-1]}")
            return None
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found

    def value(self, work: str, task: dict[str, Any], name: str) -> float | None:
        """One result of our loader; None if it fails."""
        return (self.child("ours", work, task) or {}).get(name)

    def measure(self, task: Task, batches: int, rounds: int) -> dict[str, Any]:
        timed = replace(task, warm_up=WARM_UP * task.workers * task.prefetch, batches=batches)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in self.contenders}
        say("a round that fills the page cache")
        for name in self.contenders:
            self.child(name, name, asdict(task))
        for name in in_turns(self.contenders, rounds):
            if name not in self.cannot:
                found = self.child(name, name, asdict(timed))
                if found is not None:
                    runs[name].append(found)
        say("resuming in the middle of an epoch")
        resumes = {
            name: self.resume(name, task) for name in self.contenders if name not in self.cannot
        }
        again, resumed = (
            self.value("again", asdict(each), "first_batch_s")
            for each in (task, replace(task, resume=True))
        )
        say("bare reading")
        read = self.child("ours", "pread", {"batch": task.batch, "rounds": 2 * rounds + 1}) or {}
        say("memory")
        held = asdict(replace(task, batches=batches, pause=0.5))
        own, empty = (self.value(work, held, "peak_mb") for work in ("ours", "ours, empty"))
        queue = self.value("queue", asdict(replace(task, batches=batches)), "queue_mb")
        clips_s, first = medians(runs, "clips_per_second"), medians(runs, "first_batch_s")
        best_peer = max(filter(None, map(clips_s.get, PEERS)), default=None)
        more = None if own is None or empty is None else own - empty
        return {
            "summary": {
                "vs_best_peer": ratio(clips_s["ours"], best_peer),
                "native_vs_best_peer": ratio(clips_s["ours, native"], best_peer),
                "vs_pread": ratio(read.get("store_gb_s"), read.get("pread_gb_s")),
                "resume_s": resumes.get("ours"),
                "resume_warm_s": resumed,
                "first_batch_s": again,
                "first_batch_cold_s": first["ours"],
                "memory_vs_queue": ratio(more, queue),
            },
            "clips_per_second": clips_s,
            "first_batch_s": first,
            "resume_s": resumes,
            "memory_mb": {"with batches": own, "without": empty},
            "queue_mb": queue,
            "read": read,
            "cannot": self.cannot,
            "runs": runs,
            "work": self.work(task),
            "versions": versions("torch", "numpy", "webdataset", "lmdb"),
        }

    def work(self, task: Task) -> dict[str, int]:
        clips = len(json.loads((self.folder / "labels.json").read_text()))
        return {"clips": clips} | {
            name: getattr(task, name) for name in ("batch", "workers", "prefetch")
        }

    def resume(self, name: str, task: Task) -> float | str | None:
        """Seconds to the first batch in mid-epoch, or why the contender cannot resume."""
        found = self.child(name, name, asdict(replace(task, resume=True)))
        if found is None:
            return None
        return str(found["cannot"]) if "cannot" in found else float(found["first_batch_s"])


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def medians(runs: dict[str, list[dict[str, Any]]], key: str) -> dict[str, float | None]:
    return {
        name: statistics.median(run[key] for run in of_name) if of_name else None
        for name, of_name in runs.items()
    }


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    table = new_table(
        "{clips} clips, batches of {batch}, {workers} workers x {prefetch}".format(
            **result["work"]
        ),
        *("", "clips/s", "first batch, cold", "resume, cold", "goal"),
    )
    for name in result["runs"]:
        if name in result["cannot"]:
            table.add_row(name, result["cannot"][name])
            continue
        resume = result["resume_s"][name]
        table.add_row(
            name,
            f"{result['clips_per_second'][name]:.0f}",
            f"{result['first_batch_s'][name]:.2f} s",
            f"{resume:.2f} s" if isinstance(resume, float) else "cannot",
        )
    table.add_section()
    add_goals(
        table,
        result["summary"],
        ("ours / best peer", "vs_best_peer", "{:.2f}", ">= 2"),
        ("ours, native / best peer", "native_vs_best_peer", "{:.2f}", ">= 5"),
        ("store / bare pread", "vs_pread", "{:.2f}", ">= 0.8"),
        ("resume in mid-epoch, cold", "resume_s", "{:.2f} s", "< 1 s"),
        ("  with a running fork server", "resume_warm_s", "{:.2f} s", "< 1 s"),
        ("first batch, cold", "first_batch_cold_s", "{:.2f} s", "< 1 s"),
        ("  with a running fork server", "first_batch_s", "{:.2f} s", "< 1 s"),
        ("memory / one prefetch queue", "memory_vs_queue", "{:.2f}", "<= 1.2"),
    )
    return table


if __name__ == "__main__":
    main()
