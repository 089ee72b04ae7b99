"""Which versions of cuDNN have known problems, and what a training does about it."""

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
    [
        # As torch's own wheels are: 2.10, 2.11, 2.12.
        (91002, True),
        (91900, False),
        (92000, False),
        # The edges.
        (90701, False),
        (90800, True),
        (91400, True),
        (91500, False),
    ],
)
def test_half_precision(cudnn: int, slow: bool) -> None:
    plain = settings(precision="bf16", channels_last=False)
    assert bool(cudnn_warnings(plain, cudnn)) == slow
    assert not cudnn_warnings(settings(precision="bf16"), cudnn), "channels-last is spared"


def test_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)

    def told(cudnn: int) -> bool:
        return bool(cudnn_warnings(settings(precision="fp32"), cudnn))

    assert [told(n) for n in (91001, 91002, 91501, 91600)] == [False, True, True, False]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert not told(91002)


def test_a_warning_says_what_to_do_and_where_it_is_reported() -> None:
    (warning,) = cudnn_warnings(settings(precision="bf16", channels_last=False), 91002)
    assert "cuDNN 9.10.2" in warning
    assert "channels_last=true" in warning
    assert "https://github.com/pytorch/pytorch/" in warning


# Whether a CPU has bfloat16, by what Linux says of it.


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
