"""What all benches share: options, progress, the file of figures, memory, waiting for a device."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dist_train.files import write_whole


def options(doc: str, quick: str) -> argparse.ArgumentParser:
    """A parser with ``--quick`` and ``--json``, which every bench has.

    Args:
        doc: docstring of the bench, whose first line becomes the description.
        quick: help of ``--quick``.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="write the figures there, under 'summary'")
    return parser


def say(what: str) -> None:
    print(f"== {what}", file=sys.stderr, flush=True)


def write_figures(path: Path | None, result: dict[str, Any]) -> None:
    """Write ``result`` as JSON if ``path`` was given."""
    if path is not None:
        write_whole(path, json.dumps(result, indent=2) + "\n")


def finish(path: Path | None, result: dict[str, Any], *tables: Table) -> None:
    """Write the figures and print the tables, wide enough for a log that is no terminal."""
    write_figures(path, result)
    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in tables:
        console.print(table)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory() -> bool:
    """Let ``memory("VmHWM")`` count from now (Linux: proc(5), clear_refs); False if not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" is what it holds, "VmHWM" the most that it held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024
