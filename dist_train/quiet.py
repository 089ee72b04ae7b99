"""Suppress noise: warnings of libraries to their developers, and repeated messages of processes."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

#: Set to 1 to show everything. ``launch/elastic.py`` reads it too.
VERBOSE = "DIST_TRAIN_VERBOSE"
_MODULES = r"(?!torch\.cuda\b)(torch|accelerate|deepspeed|transformers)(\.|$)"


def is_verbose() -> bool:
    return os.environ.get(VERBOSE, "0") not in ("", "0")


def hush_libraries() -> None:
    """Ignore warnings of libraries about their interfaces and internals, such as deprecations or
    memory layouts of gradients. torch's warnings about CUDA drivers are kept."""
    if is_verbose():
        return
    for kind in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=kind, module=_MODULES)


def is_told(message: str) -> bool:
    """Whether another process of this launch on this machine has printed the message already.

    The first caller gets False, and should print: its launcher may end the others at once.
    """
    given = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if given is None or is_verbose():
        return False
    # torchrun makes a folder per attempt, with one per process, and removes them at the end.
    attempt = Path(given).parents[1]
    name = f"told-{hashlib.sha256(message.encode(errors='replace')).hexdigest()[:16]}"
    try:
        os.close(os.open(attempt / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return True
    except OSError:
        return False
    return False
