"""Files of weights: what is unwrapped, and what is refused without running its code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_train.errors import DistTrainError
from dist_train.training.weights_file import read_weights

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def with_prefix(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in WEIGHTS.items()}


FORMS: dict[str, tuple[Any, bool]] = {
    "plain": (WEIGHTS, False),
    "a checkpoint": ({"epoch": 3, "arch": "resnet", "state_dict": WEIGHTS, "optimizer": {}}, False),
    "of DataParallel": ({"state_dict": with_prefix("module.")}, True),
    "nested": ({"model": {"model_state_dict": with_prefix("_orig_mod.module.")}}, True),
    "with more than tensors": (WEIGHTS | {"version": 2, "sizes": [1, 2]}, False),
}


@pytest.mark.parametrize(("content", "is_parallel"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_unwrapped(
    tmp_path: Path, content: Any, is_parallel: bool, legacy: bool
) -> None:
    path = tmp_path / "weights.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    given = read_weights(path)
    assert given.is_parallel == is_parallel
    assert given.tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in given.tensors.items())


def test_safetensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    given = read_weights(tmp_path / "weights.safetensors")
    assert all(torch.equal(given.tensors[name], tensor) for name, tensor in WEIGHTS.items())


class Harm:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def saved(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a network": ("net.pt", saved(nn.Linear(2, 2)), "more than weights (torch.nn.modules.linear"),
    "code": ("code.pth", lambda p: torch.save(Harm(p.with_name("harmed")), p), "more than weights"),
    "a number": ("number.pt", saved(7), "it holds no weights"),
    "an empty list": ("none.pt", saved({"state_dict": {}}), "it holds no weights"),
    "no finite value": (
        "nan.pt", saved(WEIGHTS | {"b": torch.tensor([torch.nan])}), "b is not finite"
    ),
    "text": ("text.pth", lambda p: p.write_text("no weights"), "is damaged, or no file of torch"),
    "nothing": ("empty.pth", lambda p: p.write_bytes(b""), "is damaged, or no file of torch"),
    "damaged": ("bad.safetensors", lambda p: p.write_bytes(b"\x08" * 99), "is damaged"),
    "a folder": ("folder.pt", lambda p: p.mkdir(), "cannot be read"),
    "another ending": ("weights.h5", lambda p: p.touch(), "ends in .safetensors, .pth"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "write", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_weights_is_refused(
    tmp_path: Path, name: str, write: Callable[[Path], object], part: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(DistTrainError) as caught:
        read_weights(tmp_path / name)
    assert part in str(caught.value)
    assert name in str(caught.value)
    assert caught.value.fix or name == "folder.pt"
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_cut_file_is_refused(tmp_path: Path, place: float) -> None:
    path = tmp_path / "weights.pt"
    torch.save(WEIGHTS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(place * len(content))])
    with pytest.raises(DistTrainError, match="is damaged"):
        read_weights(path)
