"""How fast batches come: our loader beside its peers, and beside bare reading.

Makes clips with the depths and sizes of the Clog Loss challenge's, writes them in each contender's
own format, and takes balanced, shuffled batches of them through each, in fresh processes, by turns.
benchmarks/loader.md says how to read the figures.

    python tools/bench_loader.py [--clips N] [--rounds N] [--workers N] [--quick] [--no-peers]
        [--json FILE]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from loader_contenders import CONTENDERS, RATIO, WRITERS, Task
from measuring import finish, options, say
from rich.table import Table

from dist_train.data.raw.clip import PrepareSettings
from dist_train.data.store.build import prepare
from dist_train.data.synthetic.challenge_stats import BOX_HEIGHT, BOX_WIDTH, CLIPS_BY_DEPTH
from dist_train.data.table.manifest import read_manifest

SEED = 3
BATCH, PREFETCH = 64, 2
OURS = ("ours", "ours, native")
PEERS = ("original", "plain files", "WebDataset", "Streaming", "LitData")
#: Without their own requirements: Streaming asks for an old NumPy, both for torchvision and clients
#: of clouds. What they really import beside what this package has follows them.
PACKAGES = {
    "Streaming": (
        "mosaicml-streaming==0.13.0",
        *("brotli", "python-snappy", "cramjam", "zstd", "xxhash<4", "catalogue<3"),
    ),
    "LitData": ("litdata==0.2.76", "obstore"),
}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "dist_train", "bench_peers")
TOOL = Path(__file__).with_name("loader_contenders.py")
#: Of what is prefetched at most: as much is taken before anything is timed, so that memory that is
#: used again and again is there. With the batches that are timed it is less than an epoch, at whose
#: end some peers start anew.
WARM_UP = 4
#: Seconds for one contender.
PATIENCE = 300


def main() -> None:
    parser = options(__doc__, "one round, only some clips")
    parser.add_argument("--clips", type=int, default=3072, help="clips to make (default 3072)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--batches", type=int, default=24, help="of a run (default 24)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"clips (default {BATCH})")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-peers", action="store_true", help="only ours: installs nothing")
    parser.add_argument("--peers-python", type=Path, help="has Streaming and LitData; else it is")
    parser.add_argument("--folder", type=Path, help="keeps the clips; used again if they are there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clips, arguments.rounds = min(arguments.clips, 256), 1
        arguments.batches = min(arguments.batches, 6)
    with tempfile.TemporaryDirectory(prefix="bench_loader.") as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.no_peers:
            bench = Bench(folder, Path(sys.executable), OURS)
        else:
            bench = Bench(folder, arguments.peers_python or peers_python(CACHE))
        bench.write(arguments.clips)
        task = Task(arguments.batch, arguments.workers, PREFETCH)
        result = bench.measure(task, arguments.batches, arguments.rounds)
    finish(arguments.json, result, as_table(result))


# --- the peers ------------------------------------------------------------------------------------


def peers_python(folder: Path) -> Path:
    """The Python of an environment that sees all of this one's packages, and has the peers."""
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"an environment for the peers, {folder}")
        venv.create(folder, with_pip=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "dist_train.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name, packages in PACKAGES.items():
        marker = folder / f"{name}.installed"
        if not marker.exists():
            command = [str(python), "-m", "pip", "install", "-q", "--no-deps", *packages]
            if subprocess.run(command, check=False).returncode == 0:
                marker.touch()
    return python


# --- the clips ------------------------------------------------------------------------------------


def make_clips(folder: Path, clips: int) -> None:
    """Noise, as .npy files, with the challenge's depths and about its sizes; and a store of them.

    A share of ``RATIO`` is positive, so that all of them come equally often.
    """
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    counts = np.array(list(CLIPS_BY_DEPTH.values()))
    depths = rng.choice(np.array(list(CLIPS_BY_DEPTH)), clips, p=counts / counts.sum())
    heights, widths = (sides(rng, facts, clips) for facts in (BOX_HEIGHT, BOX_WIDTH))
    labels = [int(number % sum(RATIO) < RATIO[0]) for number in range(clips)]
    noise = rng.integers(0, 256, int(np.max(depths * heights * widths)), dtype=np.uint8)
    lines = ["filename,label"]
    for number, shape in enumerate(zip(depths, heights, widths, strict=True)):
        np.save(folder / "raw" / f"{number:06d}.npy", noise[: np.prod(shape)].reshape(shape))
        lines.append(f"{number:06d}.npy,{labels[number]}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    (folder / "labels.json").write_text(json.dumps(labels))
    manifest = read_manifest(folder / "clips.csv")
    prepare(manifest, folder / "raw", folder / "store", PrepareSettings(roi="none"), workers=1)


def sides(rng: np.random.Generator, facts: tuple[int, int, int], clips: int) -> Any:
    """Log-normal, with the mean and within the limits of the facts; a fifth of it is spread."""
    least, mean, most = facts
    drawn = np.exp(rng.normal(0, 0.25, clips))
    return np.clip(np.rint(drawn / drawn.mean() * mean), least, most).astype(np.int64)


# --- the runs -------------------------------------------------------------------------------------


class Bench:
    """Runs of contenders, each in a fresh process.

    Args:
        folder: where their clips are or will be.
        peers: the Python that has Streaming and LitData.
        contenders: names of those that run.

    Attributes:
        cannot: by contender that failed, why.
    """

    def __init__(
        self, folder: Path, peers: Path, contenders: Sequence[str] = tuple(CONTENDERS)
    ) -> None:
        self.folder, self.peers, self.contenders = folder, peers, contenders
        self.cannot: dict[str, str] = {}

    def write(self, clips: int) -> None:
        if not (self.folder / "store" / "store.json").exists():
            say(f"making {clips} clips")
            make_clips(self.folder, clips)
        for name in filter(WRITERS.__contains__, self.contenders):
            done = self.folder / f"{name}.written"
            if not done.exists():
                say(f"writing them for {name}")
                if self.child(name, f"write {name}", {}) is not None:
                    done.touch()

    def child(self, name: str, what: str, task: dict[str, Any]) -> dict[str, Any] | None:
        """Of a fresh process; None, and why in ``cannot``, if it gives none."""
        python = str(self.peers) if name in PACKAGES else sys.executable
        command = [python, str(TOOL), what, str(self.folder), json.dumps(task)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, env=environment
            )
        except subprocess.TimeoutExpired:
            self.cannot[name] = f"no end within {PATIENCE} s"
            return None
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            self.cannot[name] = lines[-1]
            say(f"{name}: {lines[-1]}")
            return None
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found

    def measure(self, task: Task, batches: int, rounds: int) -> dict[str, Any]:
        versions = {name: found_version(name) for name in ("torch", "numpy", "webdataset", "lmdb")}
        timed = replace(task, warm_up=WARM_UP * task.workers * task.prefetch, batches=batches)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in self.contenders}
        # The first round warms the page cache up.
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}")
            for name in self.contenders:
                if name in self.cannot:
                    continue
                found = self.child(name, name, asdict(timed if number else task))
                if found is not None and number:
                    runs[name].append(found)
        clips_s = medians(runs, "clips_per_second")
        first = medians(runs, "first_batch_s")
        say("going on in the middle of an epoch")
        resumes = {
            name: self.resume(name, task) for name in self.contenders if name not in self.cannot
        }
        again = {
            what: (self.child("ours", "again", asdict(each)) or {}).get("first_batch_s")
            for what, each in (("first", task), ("resume", replace(task, resume=True)))
        }
        say("bare reading")
        read = self.child("ours", "pread", {"batch": task.batch, "rounds": 2 * rounds + 1}) or {}
        say("memory")
        held = replace(task, batches=batches, pause=0.5)
        own, empty = (
            (self.child("ours", name, asdict(held)) or {})["peak_mb"]
            for name in ("ours", "ours, empty")
        )
        queue = replace(task, warm_up=0, batches=batches)
        queue_mb = (self.child("ours", "queue", asdict(queue)) or {})["queue_mb"]
        rate, native = clips_s["ours"], clips_s["ours, native"]
        peers = [of_peer for name in PEERS if (of_peer := clips_s.get(name)) is not None]
        return {
            "summary": {
                "vs_best_peer": rate / max(peers) if rate and peers else None,
                "native_vs_best_peer": native / max(peers) if native and peers else None,
                "vs_pread": read["store_gb_s"] / read["pread_gb_s"],
                "resume_s": resumes["ours"],
                "resume_warm_s": again["resume"],
                "first_batch_s": again["first"],
                "first_batch_cold_s": first["ours"],
                "memory_vs_queue": (own - empty) / queue_mb,
            },
            "clips_per_second": clips_s,
            "first_batch_s": first,
            "resume_s": resumes,
            "memory_mb": {"with batches": own, "without": empty},
            "queue_mb": queue_mb,
            "read": read,
            "cannot": self.cannot,
            "runs": runs,
            "work": {"clips": len(json.loads((self.folder / "labels.json").read_text()))}
            | {"batch": task.batch, "workers": task.workers, "prefetch": task.prefetch},
            "versions": versions,
            "peers": {name: packages[0] for name, packages in PACKAGES.items()},
        }

    def resume(self, name: str, task: Task) -> float | str | None:
        """Seconds to the first batch, or why there is none."""
        found = self.child(name, name, asdict(replace(task, resume=True)))
        if found is None:
            return None
        return str(found["cannot"]) if "cannot" in found else float(found["first_batch_s"])


def found_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def medians(runs: dict[str, list[dict[str, Any]]], what: str) -> dict[str, float | None]:
    def median(values: Iterable[float]) -> float | None:
        found = list(values)
        return statistics.median(found) if found else None

    return {name: median(run[what] for run in of_name) for name, of_name in runs.items()}


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> Table:
    summary, work = result["summary"], result["work"]
    table = Table(
        title="{clips} clips, batches of {batch}, {workers} workers x {prefetch}".format(**work)
    )
    for heading in ("", "clips/s", "first batch, cold", "resume, cold"):
        table.add_column(heading, justify="right" if heading else "left")
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
    for label, name, goal in (
        ("ours / best peer", "vs_best_peer", ">= 2"),
        ("ours, native / best peer", "native_vs_best_peer", ">= 5"),
        ("store / bare pread", "vs_pread", ">= 0.8"),
        ("seconds to go on in mid-epoch, cold", "resume_s", "< 1"),
        ("  with the fork server up", "resume_warm_s", "< 1"),
        ("seconds to the first batch, cold", "first_batch_cold_s", "< 1"),
        ("  with the fork server up", "first_batch_s", "< 1"),
        ("memory / one prefetch queue", "memory_vs_queue", "<= 1.2"),
    ):
        figure = summary[name]
        table.add_row(label, "-" if figure is None else f"{figure:.2f}", goal)
    return table


if __name__ == "__main__":
    main()
