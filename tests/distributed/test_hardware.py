"""Known problems of cuDNN's versions, and CPUs without bfloat16, by what Linux says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.config import TrainSettings
from dist_train.distributed.hardware import cudnn_name, cudnn_warnings, lacks_bf16


def settings(**given: object) -> TrainSettings:
    return TrainSettings.model_validate(given)


@pytest.mark.parametrize(
    ("number", "name"), [(8907, "8.9.7"), (90100, "9.1.0"), (91002, "9.10.2"), (92000, "9.20.0")]
)
def test_names_of_cudnn(number: int, name: str) -> None:
    assert cudnn_name(number) == name


@pytest.mark.parametrize(
    ("cudnn", "slow"),
    # That of torch 2.10, and the edges.
    [(91002, True), (90701, False), (90800, True), (91400, True), (91500, False)],
)
def test_half_precision(cudnn: int, slow: bool) -> None:
    warnings = cudnn_warnings(settings(precision="bf16", channels_last=False), cudnn)
    assert bool(warnings) == slow
    for warning in warnings:
        assert warning.startswith(f"cuDNN {cudnn_name(cudnn)}: ")
        assert "channels_last=true" in warning
        assert "https://github.com/pytorch/pytorch/" in warning
    assert not cudnn_warnings(settings(precision="bf16"), cudnn), "channels-last is spared"


def test_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)

    def told(cudnn: int) -> bool:
        return bool(cudnn_warnings(settings(precision="fp32"), cudnn))

    assert [told(n) for n in (91001, 91002, 91501, 91600)] == [False, True, True, False]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert not told(91002)


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
    assert not lacks_bf16(tmp_path / "missing"), "unknown on other systems"
