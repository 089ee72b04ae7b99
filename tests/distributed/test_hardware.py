"""Which pairs of torch and cuDNN are known as bad, and what a training does about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.config import TrainSettings
from dist_train.distributed.hardware import PAIRS, bad_pairs, check_pair, cudnn_name, lacks_bf16
from dist_train.errors import BackendError


def settings(**given: object) -> TrainSettings:
    return TrainSettings.model_validate(given)


@pytest.mark.parametrize(
    ("number", "name"), [(8907, "8.9.7"), (90100, "9.1.0"), (91002, "9.10.2"), (92000, "9.20.0")]
)
def test_names_of_cudnn(number: int, name: str) -> None:
    assert cudnn_name(number) == name


@pytest.mark.parametrize(
    ("torch", "cudnn", "half"),
    [
        # As torch's own wheels are: 2.6, 2.8, 2.9, 2.10, 2.11, 2.12.
        ("2.6.0+cu124", 90100, []),
        ("2.8.0+cu128", 91002, [True]),
        ("2.9.0", 91002, [False]),
        ("2.9.1+cu128", 91002, [False]),
        ("2.10.0", 91002, [False]),
        ("2.11.0", 91900, []),
        ("2.12.0", 92000, []),
        # With a cuDNN installed beside it: 2.9.0 goes by the one that it was built with.
        ("2.9.0", 91501, [False]),
        ("2.9.1", 91501, []),
        # The edges.
        ("2.8.0", 90701, []),
        ("2.8.0", 90800, [True]),
        ("2.10.0", 91400, [False]),
        ("2.10.0", 91500, []),
    ],
)
def test_half_precision(torch: str, cudnn: int, half: list[bool]) -> None:
    found = [pair.wrong for pair in bad_pairs(torch, cudnn) if "bf16" in pair.precisions]
    assert found == half


def test_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)

    def told(cudnn: int) -> bool:
        return bool(check_pair(settings(precision="fp32"), "2.13.0", cudnn))

    assert [told(n) for n in (91001, 91002, 91501, 91600)] == [False, True, True, False]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert not told(91002)


def test_wrong_results_are_refused() -> None:
    plain = settings(precision="bf16", channels_last=False)
    with pytest.raises(BackendError, match=r"cuDNN 9\.10\.2: .* wrong results.*pip install"):
        check_pair(plain, "2.8.0+cu128", 91002)
    # Float32 does not meet it, nor does the channels-last layout.
    assert not check_pair(settings(precision="fp32", channels_last=False), "2.8.0", 90800)
    assert not check_pair(settings(precision="bf16"), "2.8.0", 91002)


def test_slow_convolutions_are_warned_of() -> None:
    plain = settings(precision="bf16", channels_last=False)
    (warning,) = check_pair(plain, "2.10.0", 91002)
    assert "torch 2.10.0 with cuDNN 9.10.2" in warning
    assert "channels_last=true" in warning
    assert not check_pair(settings(precision="bf16"), "2.10.0", 91002)
    assert not check_pair(plain, "2.12.0", 92000)


def test_every_pair_says_what_to_do_and_where_it_is_told() -> None:
    for pair in PAIRS:
        assert pair.fix
        assert pair.source.startswith("https://github.com/pytorch/pytorch/")


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
