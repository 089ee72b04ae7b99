"""What all tests share: where the real data is, and property tests that are the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    # A GPU machine may lack it, and its tests need none.
    pass
else:
    settings.register_profile(
        "deterministic",
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=60,
        # Fixtures of module scope hold nothing that an example changes.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real clips and volumes, which is not part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data is not here: {folder}")
    return folder
