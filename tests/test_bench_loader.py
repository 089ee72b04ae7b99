"""The bench of the loader: tiny real runs of contenders that need no environment of their own."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from bench_loader import Bench, make_clips  # noqa: E402
from loader_contenders import Task  # noqa: E402


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench_loader")
    make_clips(folder, 16)
    return Bench(folder, Path(sys.executable))


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_ours_and_plain_files(bench: Bench, resume: bool) -> None:
    task = replace(Task(4, 1, 1, warm_up=1, batches=2), resume=resume)
    for name in ("ours", "plain files"):
        found = bench.child(name, name, asdict(task))
        assert found is not None, bench.cannot
        assert found["first_batch_s"] > 0
        assert found["clips_per_second"] > 0


@pytest.mark.slow
def test_bare_reading(bench: Bench) -> None:
    found = bench.child("ours", "pread", {"batch": 4, "rounds": 1})
    assert found is not None, bench.cannot
    assert found["store_gb_s"] > 0
    assert found["pread_gb_s"] > 0


@pytest.mark.slow
def test_contender_that_fails_is_told(bench: Bench) -> None:
    assert bench.child("original", "original", asdict(Task(4, 1, 1))) is None
    assert "No such file" in bench.cannot["original"]
