"""First line of tools/gpu.py's results: card, driver, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from typing import Any

from gpu_record import Record

PACKAGES = {
    *("torch", "triton", "numpy", "accelerate", "transformers", "deepspeed", "lmdb"),
    *("albumentations", "av"),
}
SMI = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]


def steps(record: Record) -> dict[str, Callable[[Record], None]]:
    return {"machine": machine}


def machine(record: Record) -> None:
    """Record the machine.

    Raises:
        SystemExit: it has no CUDA device, and one was asked for.
    """
    import torch

    found: dict[str, Any] = {
        "commit": record.commit,
        "device": record.device,
        "tiny": record.tiny,
        "smi": nvidia_smi(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {each.name: each.version for each in distributions() if each.name in PACKAGES},
        "arguments": sys.argv[1:],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    cuda = torch.cuda.is_available()
    if cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "gb": card.total_memory / 1e9,
            "capability": f"{card.major}.{card.minor}",
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        }
    record.line(**found)
    if record.device == "cuda" and not cuda:
        raise SystemExit(
            f"torch {torch.__version__} sees no CUDA device here; --device cpu --tiny runs all "
            "steps without one"
        )


def nvidia_smi() -> str | None:
    """Name, driver and memory of each card; None without the program."""
    try:
        done = subprocess.run(SMI, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
