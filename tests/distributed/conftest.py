from __future__ import annotations

from pathlib import Path

import pytest
from golden_run import golden_store


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the golden run; not to be changed."""
    return golden_store(tmp_path_factory.mktemp("golden"))
