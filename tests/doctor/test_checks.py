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

from dist_train.doctor.cpus import check_cpus
from dist_train.doctor.devices import check_devices, judge_absence, judge_device
from dist_train.doctor.disk import check_disk
from dist_train.doctor.examine import joined
from dist_train.doctor.finding import Finding, table
from dist_train.doctor.limits import check_limits
from dist_train.doctor.links import Rate, judge_clocks, judge_collectives, judge_pairs
from dist_train.doctor.versions import check_versions, judge_packages, judge_pair
from dist_train.system.cgroup import group_values, usable_cpus, usable_memory


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


def test_what_control_groups_say(tmp_path: Path) -> None:
    group = tmp_path / "fs" / "a" / "b"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "fs" / "cpu.max").write_text("max 100000\n")
    member = tmp_path / "cgroup"
    member.write_text("1:name=old:/elsewhere\n0::/a/b\n")
    assert list(group_values("cpu.max", tmp_path / "fs", member)) == [
        "150000 100000",
        "max 100000",
    ]
    # Seen from another namespace.
    member.write_text("0::/../../elsewhere\n")
    assert list(group_values("cpu.max", tmp_path / "fs", member)) == []
    assert list(group_values("cpu.max", tmp_path / "fs", tmp_path / "none")) == []


@pytest.mark.parametrize("version", ["1", "2", "hybrid"])
def test_a_quota_of_a_container_is_cpus(tmp_path: Path, version: str) -> None:
    """Also if only the container's own group is mounted, as the root."""
    root, member = tmp_path / "fs", tmp_path / "member"
    own = {"1": root / "cpu,cpuacct", "2": root, "hybrid": root / "unified"}[version]
    own.mkdir(parents=True)
    if version == "1":
        member.write_text("5:cpu,cpuacct:/docker/ab12\n3:memory:/docker/ab12\n0::/docker/ab12\n")
        (own / "cpu.cfs_period_us").write_text("100000\n")
        (own / "cpu.cfs_quota_us").write_text("-1\n")
    else:
        member.write_text("0::/docker/ab12\n")
        (own / "cpu.max").write_text("max 100000\n")
    free = usable_cpus(root, member)
    assert free == len(os.sched_getaffinity(0))
    if version == "1":
        (own / "cpu.cfs_quota_us").write_text("50000\n")
    else:
        (own / "cpu.max").write_text("50000 100000\n")
    assert usable_cpus(root, member) == 0.5
    memory = {"1": "memory/memory.limit_in_bytes"}.get(version, f"{own.name}/memory.max")
    limit = (root if version == "1" else own.parent) / memory
    limit.parent.mkdir(exist_ok=True)
    limit.write_text("123456789\n")
    assert usable_memory(root, member) == 123456789
    # That of the group itself, if it is seen, holds beside it.
    (own / "docker" / "ab12").mkdir(parents=True)
    if version != "1":
        (own / "docker" / "ab12" / "cpu.max").write_text("25000 100000\n")
        assert usable_cpus(root, member) == 0.25


def test_cpus() -> None:
    assert 0 < usable_cpus() <= (os.cpu_count() or 1)
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


@pytest.mark.parametrize(("bus", "cards", "state"), [(1e9, False, "ok"), (1e9, True, "warn")])
def test_slow_links(bus: float, cards: bool, state: str) -> None:
    rates = [Rate("all-reduce", 1024, 1.0, 1.0), Rate("all-reduce", 10**8, 0.1, bus)]
    assert judge_collectives(rates, world=2, cards=cards).state == state


def test_clocks_apart() -> None:
    assert judge_clocks([0.0, 0.004, -0.002]).state == "ok"
    found = judge_clocks([0.0, 0.004, -61.0])
    assert (found.state, found.found) == ("warn", "at most 61.000 s apart (rank 2 from rank 0)")


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
