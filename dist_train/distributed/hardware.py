"""Pairs of torch and cuDNN whose 3D convolutions are wrong or slow, and what to do about each."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version

from dist_train.config import TrainSettings
from dist_train.errors import BackendError

LATER_CUDNN = "Install a later one: pip install 'nvidia-cudnn-cu13>=9.16' (or -cu12), or a newer "
LATER_CUDNN += "torch."


@dataclass(frozen=True)
class BadPair:
    """Versions, from the first (included) to the last (excluded), and when they matter.

    Attributes:
        torch, cudnn: the ranges; both must hold.
        precisions: values of ``train.precision`` that meet it.
        any_layout: it is met in the channels-last layout too.
        wrong: results are wrong; else convolutions are slow, and take more memory.
        source: where it is told.
    """

    torch: tuple[str, str]
    cudnn: tuple[str, str]
    precisions: frozenset[str]
    any_layout: bool
    wrong: bool
    what: str
    fix: str
    source: str


HALF = frozenset({"bf16", "fp16"})
ALL_TORCH = ("0", "999")
# What torch's own wheels bring: cuDNN 9.10.2 from 2.8 to 2.10, 9.19 with 2.11, 9.20 with 2.12.
PAIRS = (
    BadPair(
        torch=("0", "2.9"),
        cudnn=("9.8", "9.15"),
        precisions=HALF,
        any_layout=False,
        wrong=True,
        what="half-precision Conv3d gives wrong results",
        fix=LATER_CUDNN,
        source="https://github.com/pytorch/pytorch/issues/163539",
    ),
    # 2.9.0 looks at the version that it was built with, later ones at the one that runs.
    BadPair(
        torch=("2.9.0", "2.9.1"),
        cudnn=("9.8", "999"),
        precisions=HALF,
        any_layout=False,
        wrong=False,
        what="half-precision Conv3d is done without cuDNN: several times the time and memory",
        fix="Keep train.channels_last=true, which is spared, or install a newer torch.",
        source="https://github.com/pytorch/pytorch/issues/166122",
    ),
    BadPair(
        torch=("2.9.1", "999"),
        cudnn=("9.8", "9.15"),
        precisions=HALF,
        any_layout=False,
        wrong=False,
        what="half-precision Conv3d is done without cuDNN: several times the time and memory",
        fix=f"Keep train.channels_last=true, which is spared. {LATER_CUDNN}",
        source="https://github.com/pytorch/pytorch/issues/166643",
    ),
    BadPair(
        torch=ALL_TORCH,
        cudnn=("9.10.2", "9.16"),
        precisions=frozenset({"fp32"}),
        any_layout=True,
        wrong=False,
        what="a kernel for float32 Conv3d in TF32 is reported as broken",
        fix=f"Set NVIDIA_TF32_OVERRIDE=0, which turns TF32 off. {LATER_CUDNN}",
        source="https://github.com/pytorch/pytorch/pull/167024",
    ),
)


def bad_pairs(version: str, cudnn: int) -> list[BadPair]:
    """What is known of a torch and a cuDNN.

    Args:
        version: as ``torch.__version__``.
        cudnn: as ``torch.backends.cudnn.version()``, such as 91002 for 9.10.2.
    """
    # A build's own suffix, as in 2.9.0+cu128, makes it no later version.
    ours, theirs = Version(Version(version).public), Version(cudnn_name(cudnn))
    return [
        pair
        for pair in PAIRS
        if Version(pair.torch[0]) <= ours < Version(pair.torch[1])
        and Version(pair.cudnn[0]) <= theirs < Version(pair.cudnn[1])
        and not ("fp32" in pair.precisions and os.environ.get("NVIDIA_TF32_OVERRIDE") == "0")
    ]


def cudnn_version() -> int | None:
    """Of the cuDNN that runs here, such as 91002 for 9.10.2; None without one."""
    # ROCm answers with the version of its own library.
    if torch.version.cuda is None:
        return None
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def cudnn_name(number: int) -> str:
    """cuDNN's version as people write it; since 9 it is counted with five digits."""
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def check_pair(settings: TrainSettings, version: str, cudnn: int) -> list[str]:
    """Warnings for a training with these settings on CUDA devices.

    Raises:
        BackendError: its results would be wrong.
    """
    warnings = []
    for pair in bad_pairs(version, cudnn):
        if settings.precision not in pair.precisions:
            continue
        if settings.channels_last and not pair.any_layout:
            continue
        told = f"torch {version} with cuDNN {cudnn_name(cudnn)}: {pair.what}"
        if pair.wrong:
            raise BackendError(told, where=pair.source, fix=pair.fix)
        warnings.append(f"{told}. {pair.fix} ({pair.source})")
    return warnings


# Whether this CPU computes in bfloat16, or PyTorch has to imitate it.


CPU_INFO = Path("/proc/cpuinfo")
#: As Linux calls them on x86 and, without a prefix, on ARM.
BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def lacks_bf16(cpu_info: Path = CPU_INFO) -> bool:
    """Whether no core has instructions for bfloat16; False where that cannot be known."""
    try:
        content = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", content, re.MULTILINE)
    return bool(flags) and not any(BF16 & set(line.split()) for line in flags)
