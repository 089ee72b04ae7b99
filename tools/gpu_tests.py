"""The tests that need CUDA, a line for each. Files run one by one, as imports of one may fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_record import ROOT, Record


def steps(record: Record) -> dict[str, Callable[[Record], None]]:
    """A step for each file that has CUDA tests; the tests of whole training steps come last."""
    files = cuda_files(ROOT / "tests")
    return {str(file.relative_to(ROOT)): partial(run_file, file) for file in files}


def cuda_files(tests: Path) -> list[Path]:
    found = [file for file in tests.rglob("test_*.py") if "pytest.mark.cuda" in file.read_text()]
    return sorted(found, key=lambda file: ("step" in file.name, file))


def run_file(file: Path, record: Record) -> None:
    """Run the tests of a file. Warnings are no errors, as each version of torch has its own."""
    try:
        import pytest
    except ImportError:
        record.skip("pytest is not installed")
        return
    plain = ["-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    command = ["-q", "-m", "cuda", *plain, "--rootdir", str(ROOT), str(file)]
    lines = Lines(record)
    code = pytest.main(["-c", str(ROOT / "pyproject.toml"), *command], plugins=[lines])
    if not lines.written:
        raise RuntimeError(f"pytest ended with code {int(code)} and ran no test; see the log")


class Lines:
    """A plugin of pytest that writes a line for each test."""

    def __init__(self, record: Record) -> None:
        self.record, self.written = record, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report, seconds=round(report.duration, 3))

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self._write(report)

    def _write(self, report: Any, **more: Any) -> None:
        self.written += 1
        text, name = report.longreprtext, report.nodeid
        # A package that only the tests need.
        missing = [line for line in text.splitlines() if "ModuleNotFoundError: " in line]
        if report.outcome == "skipped":
            self.record.skip(report.longrepr[2], name)
        elif missing and "dist_train" not in missing[-1]:
            self.record.skip(missing[-1].removeprefix("E").strip(), name)
        elif report.outcome == "failed":
            self.record.fail(text, name, **more)
        else:
            self.record.line(name, outcome="passed", **more)
