"""Lets tests import timm where torchvision is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

#: Folder of the stand-in, for ``PYTHONPATH`` of another process; empty if torchvision is there.
STAND_INS = "" if find_spec("torchvision") else str(Path(__file__).parent / "stand_ins")


def import_timm() -> None:
    """Import timm, with a stand-in for torchvision if need be.

    The stand-in is taken away again, as other libraries ask whether torchvision is installed.
    """
    if not STAND_INS:
        return
    sys.path.append(STAND_INS)
    try:
        import timm  # noqa: F401
    finally:
        sys.path.remove(STAND_INS)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
