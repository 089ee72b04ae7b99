"""The doctor's checks, if possible on a machine with the fault."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from helpers import environment
from rich.console import Console
from thread_group import Threads, on_each_rank

from dist_train.doctor.devices import check_devices, judge_absence, judge_device
from dist_train.doctor.disk import check_disk
from dist_train.doctor.examine import joined
from dist_train.doctor.finding import Finding, table
from dist_train.doctor.limits import check_cpus, check_limits
from dist_train.doctor.links import (
    Rate,
    check_shared,
    judge_clocks,
    judge_collectives,
    judge_pairs,
)
from dist_train.doctor.versions import check_versions, judge_packages, judge_pair


def states(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.what: finding.state for finding in findings}


def test_this_machine_has_what_the_package_needs() -> None:
    found = list(check_versions())
    assert {"python", "torch", "accelerate", "deepspeed", "numpy"} <= {f.what for f in found}
    assert [f for f in found if f.state != "ok"] == []


def test_packages_that_are_missing_or_old() -> None:
    needed = ["torch>=2.10", "NumPy>=2.0", "a.b_c>=1", "onnx>=1; extra == 'export'", "x>=1"]
    found = {f.what: f for f in judge_packages(needed, {"torch": "2.9.1+cu128", "a-b-c": "1.0"})}
    assert {name: f.state for name, f in found.items()} == {
        "torch": "bad",
        "NumPy": "bad",
        "x": "bad",
        "other packages": "ok",
    }
    assert found["torch"].found == "2.9.1+cu128, needed >=2.10"
    assert found["torch"].fix == "Run: pip install 'torch>=2.10'"
    assert found["NumPy"].found == "not installed"


def test_packages_that_some_commands_need() -> None:
    (found,) = judge_packages(["deepspeed>=0.18"], {})
    assert (found.state, found.fix) == ("warn", "Run: pip install 'deepspeed>=0.18'")
    assert "needed for train.backend zero1, zero2 and zero3 only" in found.found


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "expected"),
    [
        ("2.13.0+cpu", None, ["ok"]),
        ("2.12.0", 92000, ["ok"]),
        ("2.10.0", 91002, ["warn", "warn"]),
    ],
)
def test_pairs(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, cudnn: int | None, expected: list[str]
) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    found = list(judge_pair(torch_version, cudnn))
    assert [finding.state for finding in found] == expected


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tiny_disk: Path) -> None:
    room, disk = check_disk(tiny_disk)
    assert (room.state, disk.state) == ("bad", "bad")
    assert disk.found == "No space left on device"
    assert list(tiny_disk.iterdir()) == [], "nothing is left there"


def test_a_disk_that_is_fine(tmp_path: Path) -> None:
    found = list(check_disk(tmp_path))
    assert [f.what.partition(": ")[2] for f in found] == ["room", "write + fsync", "random reads"]
    assert "bad" not in [f.state for f in found[1:]]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (found,) = check_disk(tmp_path / "none")
    assert (found.state, found.found) == ("bad", "No such file or directory")


def test_little_shared_memory(tiny_disk: Path) -> None:
    assert states(check_limits(tiny_disk))[str(tiny_disk)] == "bad"
    assert states(check_limits(tiny_disk / "none"))[str(tiny_disk / "none")] == "bad"


@pytest.mark.parametrize(("files", "state"), [(400, "bad"), (1024, "warn"), (8192, "ok")])
def test_few_open_files(files: int, state: str) -> None:
    """In a separate process, as the limit applies to a process."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < files:
        pytest.skip("this machine's own limit is lower")
    code = (
        "from dist_train.doctor.limits import check_limits\n"
        "print([f.state for f in check_limits() if f.what == 'open files'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    assert done.stdout == f"['{state}']\n", done.stderr


def test_cpus() -> None:
    assert check_cpus(8.0, 2, 4).state == "ok"
    crowded = check_cpus(8.0, 2, 8)
    assert (crowded.state, crowded.fix) == ("warn", "Set OMP_NUM_THREADS=4 before the launch.")
    assert check_cpus(1.5, 2, 1).fix.startswith("Start at most 1 processes")


def test_devices_here() -> None:
    found = list(check_devices(1))
    if not torch.cuda.is_available():
        assert [f.what for f in found] == ["devices"]
    else:
        assert [f.what for f in found[:3]] == ["driver", "devices", "device 0"]


def test_cards_that_torch_does_not_see() -> None:
    assert judge_absence([], None).state == "ok"
    assert "without CUDA" in judge_absence(["570.1"], None).found
    assert judge_absence(["450.2"], "12.8").state == "bad"


GIB = 2**30


@pytest.mark.parametrize(
    ("capability", "free", "built_for", "state"),
    [
        ((9, 0), 79, ["sm_80", "sm_90"], "ok"),
        ((8, 6), 79, ["sm_80", "sm_90"], "ok"),
        ((9, 0), 40, ["sm_90a"], "warn"),
        ((7, 0), 79, ["sm_70"], "warn"),
        ((7, 0), 79, ["sm_75", "sm_80"], "bad"),
        ((12, 0), 79, ["sm_90", "sm_100"], "bad"),
        ((12, 0), 79, ["sm_90", "sm_120"], "ok"),
    ],
)
def test_cards(capability: tuple[int, int], free: int, built_for: list[str], state: str) -> None:
    found = judge_device("device 0", "card", capability, free * GIB, 80 * GIB, built_for)
    assert found.state == state


def test_a_slow_pair_is_named() -> None:
    hosts = ["a", "b", "c"]
    found = judge_pairs({(0, 1): 9e9, (0, 2): 2e9, (1, 2): 8e9}, hosts)
    assert found is not None
    assert found.state == "warn"
    assert "ranks 0 (a) and 2 (c)" in found.found
    assert judge_pairs({}, hosts) is None


@pytest.mark.parametrize(("bus", "gpus", "state"), [(1e9, False, "ok"), (1e9, True, "warn")])
def test_slow_links(bus: float, gpus: bool, state: str) -> None:
    rates = [Rate("all-reduce", 1024, 1.0, 1.0), Rate("all-reduce", 10**8, 0.1, bus)]
    assert judge_collectives(rates, world=2, gpus=gpus).state == state


def test_clocks_apart() -> None:
    assert judge_clocks([0.0, 0.004, -0.002]).state == "ok"
    found = judge_clocks([0.0, 0.004, -61.0])
    assert (found.state, found.found) == ("warn", "at most 61.000 s apart (rank 2 from rank 0)")


@pytest.mark.parametrize(("folder", "state"), [(".", "ok"), ("none", "bad")])
def test_a_disk_that_machines_share(tmp_path: Path, folder: str, state: str) -> None:
    def act(group: Threads) -> None:
        found = check_shared(group, tmp_path / folder, ["a", "b"])
        assert found is not None
        assert found.state == state

    assert on_each_rank(2, act) == []
    assert list(tmp_path.iterdir()) == []


def test_machines_that_differ_are_named() -> None:
    same, low = Finding("python", "ok", "3.11"), Finding("files", "bad", "1", "Raise it.")
    high = Finding("files", "ok", "9")
    assert joined([("a", [same, low]), ("b", [same, high])]) == [
        same,
        Finding("files [a]", "bad", "1", "Raise it."),
        Finding("files [b]", "ok", "9"),
    ]


def test_the_worst_is_last_in_the_table() -> None:
    shown = StringIO()
    findings = [Finding("x", "bad", "1", "Do."), Finding("y", "ok", "2")]
    Console(width=80, file=shown).print(table(findings))
    rows = [line for line in shown.getvalue().splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["ok", "bad"]
