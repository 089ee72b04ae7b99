"""Whether a CPU has bfloat16, by what Linux says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.engine.cpu_flags import lacks_bf16

PLAIN = "processor\t: 0\nmodel name\t: bf16 by name alone\nflags\t\t: fpu avx2 fma\n"


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        (PLAIN, True),
        (PLAIN.replace("fma", "fma avx512_bf16"), False),
        (PLAIN.replace("fma", "amx_bf16 fma"), False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", True),
        ("cpu\t\t: POWER9\n", False),
    ],
)
def test_flags_of_linux(tmp_path: Path, content: str, lacks: bool) -> None:
    (tmp_path / "cpuinfo").write_text(content)
    assert lacks_bf16(tmp_path / "cpuinfo") == lacks


def test_another_system_is_not_known(tmp_path: Path) -> None:
    assert not lacks_bf16(tmp_path / "none")
