"""What a user is spared unless he asks for it: warnings of libraries to their own developers, and
one message from each of many processes."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

#: Set to 1, all is shown. ``launch/elastic.py`` reads it too.
VERBOSE = "DIST_TRAIN_VERBOSE"
_MODULES = r"(?!torch\.cuda\b)(torch|accelerate|deepspeed|transformers)(\.|$)"


def is_verbose() -> bool:
    return os.environ.get(VERBOSE, "0") not in ("", "0")


def hush_libraries() -> None:
    """Drop what libraries say of their own interfaces and inner workings, such as that a function
    will be renamed, or how gradients lie in memory. What torch says of a driver is kept."""
    if is_verbose():
        return
    for kind in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=kind, module=_MODULES)


def is_told(message: str) -> bool:
    """Whether another process of this launch on this machine has told the same, or else from now on
    this one has. The first to fail tells, as its launcher may end the others at once."""
    given = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if given is None or is_verbose():
        return False
    # torchrun has a folder for each attempt, in it one for each process, and removes them.
    attempt = Path(given).parents[1]
    name = f"told-{hashlib.sha256(message.encode(errors='replace')).hexdigest()[:16]}"
    try:
        os.close(os.open(attempt / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return True
    except OSError:
        return False
    return False
