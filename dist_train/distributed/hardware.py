"""Versions of cuDNN whose 3D convolutions are slow or reported as broken, and CPUs without bf16."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version

from dist_train.config import TrainSettings

LATER_CUDNN = "Install a later one: pip install 'nvidia-cudnn-cu13>=9.16' (or -cu12), or a newer "
LATER_CUDNN += "torch."
CPU_INFO = Path("/proc/cpuinfo")
#: Flags of CPUs with bfloat16 instructions: Linux names them so on x86 and, without prefix, on ARM.
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class CudnnProblem:
    """A problem of some versions of cuDNN.

    Attributes:
        first, last: versions that have it, without the last.
        precisions: values of ``train.precision`` that meet it.
        any_layout: it is met in the channels-last layout too.
        source: where it is reported.
    """

    first: str
    last: str
    precisions: tuple[str, ...]
    any_layout: bool
    what: str
    fix: str
    source: str


# torch's own wheels bring cuDNN 9.10.2 with 2.10, 9.19 with 2.11, 9.20 with 2.12.
KNOWN = (
    CudnnProblem(
        first="9.8",
        last="9.15",
        precisions=("bf16", "fp16"),
        any_layout=False,
        what="half-precision Conv3d is done without cuDNN: several times the time and memory",
        fix=f"Keep train.channels_last=true, which is spared. {LATER_CUDNN}",
        source="https://github.com/pytorch/pytorch/issues/166643",
    ),
    CudnnProblem(
        first="9.10.2",
        last="9.16",
        precisions=("fp32",),
        any_layout=True,
        what="a kernel for float32 Conv3d in TF32 is reported as broken",
        fix=f"Set NVIDIA_TF32_OVERRIDE=0, which turns TF32 off. {LATER_CUDNN}",
        source="https://github.com/pytorch/pytorch/pull/167024",
    ),
)


def known_problems(cudnn: int) -> list[CudnnProblem]:
    """The known problems of a cuDNN.

    Args:
        cudnn: as ``torch.backends.cudnn.version()``, such as 91002 for 9.10.2.
    """
    version, tf32_is_off = cudnn_name(cudnn), os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
    return [
        known
        for known in KNOWN
        if Version(known.first) <= Version(version) < Version(known.last)
        and not (tf32_is_off and "fp32" in known.precisions)
    ]


def cudnn_version() -> int | None:
    """The version of the cuDNN that runs here, such as 91002 for 9.10.2; None without one."""
    # ROCm answers with the version of its own library.
    if torch.version.cuda is None:
        return None
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def cudnn_name(number: int) -> str:
    """cuDNN's version as people write it; since 9 it is counted with five digits."""
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def cudnn_warnings(settings: TrainSettings, cudnn: int) -> list[str]:
    """Warnings for a training with these settings on CUDA devices."""
    return [
        f"cuDNN {cudnn_name(cudnn)}: {known.what}. {known.fix} ({known.source})"
        for known in known_problems(cudnn)
        if settings.precision in known.precisions
        and (known.any_layout or not settings.channels_last)
    ]


def lacks_bf16(cpu_info: Path = CPU_INFO) -> bool:
    """Whether PyTorch emulates bfloat16, as no core has instructions for it; False if unknown."""
    try:
        content = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", content, re.MULTILINE)
    return bool(flags) and not any(BF16_FLAGS & set(line.split()) for line in flags)
