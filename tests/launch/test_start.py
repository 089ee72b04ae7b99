"""launch/start.py, and what is said where all processes fail alike."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from helpers import LAUNCH, free_port, overrides, run

from dist_train.quiet import VERBOSE, hush_libraries, is_told


@pytest.mark.slow
def test_processes_that_fail_alike_say_so_once_and_the_launcher_adds_a_line(
    tmp_path: Path,
) -> None:
    command = [
        sys.executable, str(LAUNCH / "start.py"), "--config_file", str(LAUNCH / "cpu_2proc.yaml"),
        "-m", "dist_train", "train", *overrides(tmp_path / "none", tmp_path / "run"),
    ]  # fmt: skip
    done = run(command, **{VERBOSE: ""})
    assert (done.returncode, done.stdout) == (1, "")
    error, launcher = done.stderr.splitlines()
    assert error.partition(": ")[0] in ("error", "error (process 1)")
    assert f"{tmp_path / 'none'}: there is no store here" in error
    assert launcher.startswith("launcher: a process failed (code 1); what it said is above.")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_finds_no_other_says_so_in_one_line(tmp_path: Path, rank: int) -> None:
    """The first waits for the second, or the second looks for the first."""
    command = [
        sys.executable, str(LAUNCH / "start.py"),
        "--config_file", str(LAUNCH / "gpu_multinode.yaml"), "--num_processes", "2",
        "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(free_port()), "--rdzv_conf", "timeout=2",
        "-m", "dist_train", "train", *overrides(tmp_path / "none", tmp_path / "run"),
    ]  # fmt: skip
    done = run(command, **{VERBOSE: ""})
    assert (done.returncode, done.stdout) == (75, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the launchers of all machines did not find each other (")


def test_the_first_process_of_an_attempt_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VERBOSE, raising=False)

    def of_rank(rank: int, attempt: int) -> None:
        folder = tmp_path / f"attempt_{attempt}"
        (folder / str(rank)).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / str(rank) / "error.json"))

    of_rank(1, 0)
    assert not is_told("no store")
    of_rank(0, 0)
    assert is_told("no store")
    assert not is_told("another fault")
    of_rank(0, 1)
    assert not is_told("no store"), "each attempt tells"
    monkeypatch.setenv(VERBOSE, "1")
    assert not is_told("no store")
    monkeypatch.delenv(VERBOSE)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert not is_told("no store"), "nothing is known of others without a launcher"


def test_what_libraries_warn_their_developers_of_is_dropped_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def heard() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hush_libraries()
            for module in ("torch.utils", "torch.cuda", "accelerate.state", "torchelse", "mine"):
                for kind in (FutureWarning, UserWarning):
                    warnings.warn_explicit(module, kind, f"{module}.py", 1, module=module)
            return [f"{w.category.__name__} {w.message}" for w in caught]

    monkeypatch.delenv(VERBOSE, raising=False)
    kinds = ("FutureWarning", "UserWarning")
    kept = ("torch.cuda", "torchelse", "mine")
    assert heard() == [f"{kind} {module}" for module in kept for kind in kinds]
    monkeypatch.setenv(VERBOSE, "1")
    assert len(heard()) == 10
