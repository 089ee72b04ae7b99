"""Commands that must be refused: in one message, with nothing else said."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import pytest

from dist_train import cli


def ended(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``dist-train``, in this process.

    An exception that the command line does not turn into a message comes through.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["dist-train", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        cli.main()
    code = caught.value.code
    assert code is None or isinstance(code, int)
    return code or 0, out.getvalue(), err.getvalue()


def refused(*arguments: object) -> str:
    """The one line that a command is refused with."""
    code, _, err = ended(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert code != 0
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]
