from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from golden_run import golden_store
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Starts launches of many processes quickly."""
    made = Ranks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the golden run; not to be changed."""
    return golden_store(tmp_path_factory.mktemp("golden"))
