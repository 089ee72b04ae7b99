from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The folder of raw files that ``stores.make`` prepares."""
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"
