"""What is told where another process of the run is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from dist_train.errors import LostProcessError

#: gloo's errors have no type of their own. All but this one name the line of gloo they are from.
OF_GLOO = ("/gloo/", "Application timeout caused pair closure")


@contextmanager
def losses_explained(then: str = "Go on by --resume auto.") -> Iterator[None]:
    """Within it, what torch raises where another process does not answer is a user's error.

    Args:
        then: what the user does once the cause is mended.

    Raises:
        LostProcessError: in place of that.
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
    """The first sentence of its message, without the line of torch's code that it is from."""
    first_line = str(error).partition("\n")[0]
    return re.sub(r"\[\S*\.cc:\d+\] ", "", first_line).partition(". ")[0]
