"""First line of tools/gpu.py's results: card, driver, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gpu_record import Record

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "accelerate",
    "transformers",
    "deepspeed",
    "lmdb",
    "albumentations",
    "av",
)


def steps(record: Record) -> dict[str, Callable[[Record], None]]:
    return {"machine": machine}


def machine(record: Record) -> None:
    """Raises ``SystemExit``: the device that is asked for is not there."""
    facts: dict[str, Any] = {
        "commit": record.commit,
        "device": record.device,
        "tiny": record.tiny,
        "smi": nvidia_smi(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {name: found_version(name) for name in PACKAGES},
        "arguments": sys.argv[1:],
    }
    try:
        import torch
    except Exception:
        record.fail(traceback.format_exc(), **facts)
        return
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    cuda = torch.cuda.is_available()
    if cuda:
        facts["card"] = torch.cuda.get_device_name(0)
        with suppress(Exception):
            # Names of these change between versions: no reason to measure nothing.
            facts |= more_of_the_card()
    record.line(**facts)
    if record.device == "cuda" and not cuda:
        raise SystemExit(
            f"torch {torch.__version__} sees no CUDA device here; --device cpu --tiny goes through "
            "all steps without one"
        )


def more_of_the_card() -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_properties(0)
    return {
        "gb": card.total_memory / 1e9,
        "capability": f"{card.major}.{card.minor}",
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
    }


def nvidia_smi() -> str | None:
    """Name, driver and memory of each card; None where the tool is not there."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def found_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
