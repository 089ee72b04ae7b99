"""What ``bench_loader.py --remote`` measures: loaders that read from a distant, narrow server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench_loader import Bench, ratio
from loader_contenders import Task
from measuring import add_goals, in_turns, new_table, versions
from remote_contenders import CONTENDERS, WRITERS, RemoteTask
from rich.table import Table

OURS, LOCAL = "ours", "ours, local"
PEERS = ("WebDataset", "Streaming", "LitData")
#: Contenders that need the other Python.
ELSEWHERE = ("Streaming", "LitData")
BUCKET = "bench"
KEYS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class RemoteBench(Bench):
    """Runs of remote contenders.

    Args:
        peers_python: Python that has Streaming and LitData; None leaves them out.
        peers: whether any peer runs.
        latency, mb_s, stream_mb_s: of the server.
    """

    tool, writers = Path(__file__).with_name("remote_contenders.py"), WRITERS

    def __init__(
        self,
        folder: Path,
        peers_python: Path | None,
        *,
        peers: bool = True,
        latency: float,
        mb_s: float,
        stream_mb_s: float,
    ) -> None:
        missing: tuple[str, ...] = () if peers_python else ELSEWHERE
        if not peers:
            missing = PEERS
        super().__init__(folder, tuple(name for name in CONTENDERS if name not in missing))
        self.pythons = dict.fromkeys(ELSEWHERE, str(peers_python))
        self.server = {"latency": latency, "mb-s": mb_s, "stream-mb-s": stream_mb_s}

    @contextmanager
    def serving(self) -> Iterator[str]:
        """The URL of a server of the folder, within the context."""
        options = [f"--{name}={value}" for name, value in self.server.items()]
        command = [sys.executable, str(Path(__file__).with_name("slow_s3.py")), str(self.folder)]
        with subprocess.Popen(
            [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            assert server.stdin is not None
            url = server.stdout.readline().strip()
            if not url:
                # Without one, all would be read from the disk.
                sys.exit("error: slow_s3.py did not start")
            yield url
            server.stdin.close()

    def measure(self, task: Task, batches: int, rounds: int) -> dict[str, Any]:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in self.contenders}
        warm_up = task.workers * task.prefetch
        steps = self.work(task)["clips"] // task.batch
        if steps < warm_up + 2:
            sys.exit(
                f"error: an epoch has {steps} batches, of which {warm_up + 1} are not counted. "
                "Give more --clips, or fewer --workers."
            )
        with self.serving() as url:
            endpoints = ("FSSPEC_S3_ENDPOINT_URL", "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL")
            self.environment = KEYS | dict.fromkeys(endpoints, url)
            for name in in_turns(self.contenders, rounds):
                with TemporaryDirectory(dir=self.folder, prefix="cache.") as cache:
                    place = "" if name == LOCAL else url
                    own = RemoteTask(
                        task.batch, task.workers, task.prefetch, warm_up=warm_up, batches=batches,
                        endpoint=place, bucket=BUCKET, cache=cache,
                    )  # fmt: skip
                    found = self.child(name, name, asdict(own))
                # Peers that fail under load are tried again in the next round.
                if found is not None:
                    runs[name].append(found)
                    self.cannot.pop(name, None)
        first, second = (
            {
                name: median(run["clips_per_second"][epoch] for run in of_name) if of_name else None
                for name, of_name in runs.items()
            }
            for epoch in (0, 1)
        )
        best_peer = max(filter(None, map(first.get, PEERS)), default=None)
        return {
            "summary": {
                "remote_vs_best_peer": ratio(first[OURS], best_peer),
                "remote_native_vs_best_peer": ratio(first["ours, native"], best_peer),
                "second_epoch_vs_local": ratio(second[OURS], second[LOCAL]),
            },
            "first_epoch_clips_per_second": first,
            "second_epoch_clips_per_second": second,
            "processor_ms": {
                name: [median(run["processor_ms"][epoch] for run in of_name) for epoch in (0, 1)]
                for name, of_name in runs.items()
                if of_name
            },
            "cannot": self.cannot,
            "runs": runs,
            "server": self.server,
            "work": self.work(task),
            "versions": versions("torch", "numpy", "webdataset", "obstore"),
        }


def as_table(result: dict[str, Any]) -> Table:
    title = "{clips} clips, batches of {batch}, {workers} workers x {prefetch}; a server "
    title += "{latency} s away, {mb-s} MB/s, {stream-mb-s} a connection"
    table = new_table(
        title.format(**result["work"], **result["server"]),
        *("", "clips/s, first epoch", "second epoch", "processor ms a clip", "goal"),
    )
    for name in result["runs"]:
        rates = [result[f"{epoch}_epoch_clips_per_second"][name] for epoch in ("first", "second")]
        shown = ["-" if rate is None else f"{rate:.0f}" for rate in rates]
        took = result["processor_ms"].get(name, [None])[0]
        shown.append("-" if took is None else f"{took:.2f}")
        table.add_row(name, result["cannot"].get(name, shown[0]), *shown[1:])
    table.add_section()
    add_goals(
        table,
        result["summary"],
        ("ours / best peer", "remote_vs_best_peer", "{:.2f}", ">= 2"),
        ("ours, native / best peer", "remote_native_vs_best_peer", "{:.2f}", ""),
        ("second epoch / local", "second_epoch_vs_local", "{:.2f}", ">= 1"),
    )
    return table
