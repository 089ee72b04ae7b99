"""Files of weights from other libraries. Code in them is never run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from dist_train.errors import FileError, RunError
from dist_train.files import open_plain, reason_of
from dist_train.models.transfer import Given
from dist_train.run.snapshots import check_finite
from dist_train.system.advice import blame_machine

SAFETENSORS = ".safetensors"
OF_TORCH = (".pth", ".pt", ".tar", ".bin", ".ckpt")
#: Keys under which checkpoints hold the weights, and prefixes that wrappers give all names.
KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
PARALLEL = "module."
PREFIXES = (PARALLEL, "_orig_mod.", "model.", "net.")


def read_weights(path: Path) -> Given:
    """Read the weights of a file by torch or safetensors.

    Raises:
        RunError: the file cannot be read, would run code, or holds no weights.
    """
    if path.suffix.lower() not in (SAFETENSORS, *OF_TORCH):
        raise RunError(
            f"a file of weights ends in {', '.join((SAFETENSORS, *OF_TORCH))}",
            where=path,
            fix="Give it the ending of what it is.",
        )
    try:
        with open_plain(path) as file:
            if path.suffix.lower() == SAFETENSORS:
                content: Any = load(file.read())
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except (FileError, OSError) as error:
        blame_machine(error, path)
        raise RunError(f"it cannot be read ({reason_of(error)})", where=path) from None
    except Exception as error:
        # A damaged file makes torch raise anything.
        raise _unreadable(path, error) from None
    given = _unwrapped(content)
    if given is None:
        raise RunError(
            "it holds no weights",
            where=path,
            fix="Save them by torch.save(net.state_dict(), 'weights.pt').",
        )
    try:
        check_finite(given.tensors)
    except ValueError as error:
        raise RunError(str(error), where=path, fix="Use other weights.") from None
    return given


def _unreadable(path: Path, error: Exception) -> RunError:
    """Say what would run code, or that the file is damaged."""
    text = " ".join(str(error).split())
    named = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", text)
    if named is not None or "TorchScript" in text:
        what = "" if named is None else f" ({named[1]})"
        return RunError(
            f"it holds more than weights{what}, and to read that would run code of the file",
            where=path,
            fix="Where you trust it, load it by torch.load(..., weights_only=False), and save "
            "torch.save(net.state_dict(), 'weights.pt').",
        )
    return RunError(
        f"it is damaged, or no file of torch or safetensors ({text[:200]})",
        where=path,
        fix="Fetch it again.",
    )


def _unwrapped(content: Any) -> Given | None:
    """The weights in what a file holds; None if there are none."""
    while isinstance(content, dict):
        tensors = {
            name: tensor
            for name, tensor in content.items()
            if isinstance(name, str) and _is_plain(tensor)
        }
        inner = next((content[key] for key in KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            return _without_prefix(tensors) if tensors else None
        content = inner
    return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _without_prefix(tensors: dict[str, Tensor]) -> Given:
    is_parallel = False
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in tensors)), None):
        is_parallel |= prefix == PARALLEL
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Given(tensors, is_parallel)
