"""Errors of communication with other processes, as errors for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from dist_train.errors import LostProcessError

#: gloo's errors have no type of their own. All but the second name a source file of gloo.
OF_GLOO = ("/gloo/", "Application timeout caused pair closure")


@contextmanager
def translate_peer_loss(then: str = "Go on by --resume auto.") -> Iterator[None]:
    """Turn torch's errors about processes that do not answer into errors for the user.

    Args:
        then: what the user does once the cause is removed.

    Raises:
        LostProcessError: in place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistError) or any(part in str(error) for part in OF_GLOO)):
            raise
        raise LostProcessError(
            f"another process of the run has ended, or cannot be reached ({first_sentence(error)})",
            fix=f"What it said is above or in its own log. {then}",
        ) from error


def first_sentence(error: Exception) -> str:
    """The first sentence of the error's message, without torch's source file and line."""
    first_line = str(error).partition("\n")[0]
    return re.sub(r"\[\S*\.cc:\d+\] ", "", first_line).partition(". ")[0]
