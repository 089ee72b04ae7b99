"""What the benches share: options, rounds, timing, memory, noise for clips, tables and JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dist_train.files import write_whole

CPU = torch.device("cpu")
Name = TypeVar("Name", bound=str)


def options(doc: str, quick: str) -> argparse.ArgumentParser:
    """A parser with ``--quick`` and ``--json``, which every bench has.

    Args:
        doc: docstring of the bench, whose first line becomes the description.
        quick: help of ``--quick``.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    return parser


def say(line: str) -> None:
    print(f"== {line}", file=sys.stderr, flush=True)


def in_turns(names: Sequence[Name], rounds: int) -> Iterator[Name]:
    """Each name once per round; every round starts with another name, so that none always runs
    right after the same one."""
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        first = number % len(names)
        yield from (*names[first:], *names[:first])


def write_results(path: Path | None, result: dict[str, Any]) -> None:
    """Write ``result`` as JSON if a path was given."""
    if path is not None:
        write_whole(path, json.dumps(result, indent=2) + "\n")


def finish(path: Path | None, result: dict[str, Any], table: Table) -> None:
    """Write the results, and print a table that is wide enough for a log."""
    write_results(path, result)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def new_table(title: str, *headings: str) -> Table:
    """An empty table: the first column is aligned to the left, the others to the right."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right" if table.columns else "left")
    return table


def add_goals(table: Table, summary: dict[str, Any], *goals: tuple[str, str, str, str]) -> None:
    """Add a row for each (label, name in the summary, format, goal). The value stands in the second
    column, the goal in the last."""
    blank = [""] * (len(table.columns) - 3)
    for label, name, form, goal in goals:
        value = summary[name]
        table.add_row(label, "-" if value is None else form.format(value), *blank, goal)


def versions(*packages: str) -> dict[str, str | None]:
    """Version of each package; None if it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# --- time and memory ------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds that ``work`` takes, until the device has finished it."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def reset_peak_memory() -> bool:
    """Restart the peak that ``memory("VmHWM")`` reads; False if the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" is what it holds now, "VmHWM" is the peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


# --- clips ----------------------------------------------------------------------------------------


def write_manifest(folder: Path, labels: Sequence[int]) -> Path:
    """Write ``clips.csv``, which labels the volumes and videos in ``folder`` in order of name."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".mp4", ".npy"))
    lines = [f"{name},{label}\n" for name, label in zip(names, labels, strict=True)]
    path = folder / "clips.csv"
    path.write_text("filename,label\n" + "".join(lines), encoding="utf-8")
    return path


def write_npz(path: Path, splits: dict[str, tuple[int, int]], shape: tuple[int, int, int]) -> None:
    """Write a file in MedMNIST's form: clips of noise, the positives with a bright middle.

    Args:
        splits: positives and negatives of each split.
        shape: of a clip, [D, H, W].
    """
    rng = np.random.default_rng(0)
    middle = slice(shape[1] // 3, 2 * shape[1] // 3)
    arrays: dict[str, Any] = {}
    for split, (positives, negatives) in splits.items():
        labels = rng.permutation([1] * positives + [0] * negatives)
        images = rng.integers(0, 120, (len(labels), *shape), dtype=np.uint8)
        images[labels == 1, :, middle, middle] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(path, **arrays)
