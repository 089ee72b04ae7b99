"""Imports timm where torchvision is missing."""

import sys
from importlib.util import find_spec
from pathlib import Path

#: For ``PYTHONPATH`` of another process. Empty if torchvision is installed.
STAND_INS = "" if find_spec("torchvision") else str(Path(__file__).parent / "stand_ins")


def import_timm() -> None:
    """Import timm, and leave no trace of the stand-in: other libraries ask whether torchvision is
    there."""
    if not STAND_INS:
        return
    sys.path.append(STAND_INS)
    try:
        import timm  # noqa: F401
    finally:
        sys.path.remove(STAND_INS)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
