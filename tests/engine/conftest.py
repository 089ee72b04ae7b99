"""What several tests of the engine need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from room import LittleRoom, limited


@pytest.fixture
def little_room() -> Iterator[LittleRoom]:
    with limited() as set_limit:
        yield set_limit
