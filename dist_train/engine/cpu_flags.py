"""Whether this CPU computes in bfloat16, or PyTorch has to imitate it."""

from __future__ import annotations

import re
from pathlib import Path

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
