"""Check the GPUs that torch can use, and their driver."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import torch

from dist_train.doctor.finding import Finding


def check_devices(processes: int) -> Iterator[Finding]:
    """A finding for each GPU of this machine, or the reason why there is none.

    Args:
        processes: processes of the launch on this machine; each needs a GPU of its own.
    """
    drivers = _drivers()
    if not torch.cuda.is_available():
        yield judge_absence(drivers, torch.version.cuda)
        return
    yield Finding("driver", "ok", f"{drivers[0] if drivers else '?'}, CUDA {torch.version.cuda}")
    gpus = torch.cuda.device_count()
    found = f"{gpus} for {processes} processes"
    fix = f"Start at most {gpus} processes here (--num_processes, PET_NPROC_PER_NODE)."
    enough = Finding("devices", "ok", found)
    yield enough if processes <= gpus else Finding("devices", "bad", found, fix)
    for number in range(gpus):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        yield judge_device(
            f"device {number}",
            properties.name,
            (properties.major, properties.minor),
            free,
            total,
            torch.cuda.get_arch_list(),
        )


def _drivers() -> list[str]:
    """The driver version of each GPU, from nvidia-smi; empty if it finds no GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return said.stdout.split()


def judge_absence(drivers: list[str], cuda: str | None) -> Finding:
    """The reason why torch sees no GPU.

    Args:
        drivers: one driver version for each GPU that the driver sees.
        cuda: the CUDA version that torch was built for, if any.
    """
    if not drivers:
        return Finding("devices", "ok", "no GPU: training runs on CPUs")
    found = f"{len(drivers)} GPUs under driver {drivers[0]}"
    if cuda is None:
        fix = "Install torch by its CUDA build: https://pytorch.org/get-started/locally/"
        return Finding("devices", "bad", f"{found}, but torch is built without CUDA", fix)
    fix = (
        "Install a driver that is new enough for it, and check CUDA_VISIBLE_DEVICES and "
        "'python -c \"import torch; torch.cuda.init()\"'."
    )
    return Finding("devices", "bad", f"{found}, but torch for CUDA {cuda} sees none", fix)


def judge_device(
    what: str, name: str, capability: tuple[int, int], free: int, total: int, built_for: list[str]
) -> Finding:
    """The finding for one GPU.

    Args:
        what: the label of the finding.
        capability: compute capability, such as (9, 0).
        free, total: bytes of its memory.
        built_for: architectures of this torch build, such as sm_90.
    """
    major, minor = capability
    found = (
        f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, capability {major}.{minor}"
    )
    kernels = [int(arch.removeprefix("sm_").rstrip("af")) for arch in built_for if "sm_" in arch]
    # Code for one GPU also runs on later GPUs of the same generation.
    if kernels and not any(k // 10 == major and k % 10 <= minor for k in kernels):
        fix = f"Install a torch built for sm_{major}{minor}; this one has {' '.join(built_for)}."
        return Finding(what, "bad", found, fix)
    if free < 0.9 * total:
        return Finding(what, "warn", found, "Something else runs on it: see nvidia-smi.")
    if major < 8:
        return Finding(what, "warn", found, "It has no bf16: set train.precision to fp16 or fp32.")
    return Finding(what, "ok", found)
