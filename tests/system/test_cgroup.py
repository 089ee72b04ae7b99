"""Limits of control groups, in folders as the kernel shows them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_train.system import cgroup
from dist_train.system.cgroup import group_values, usable_cpus, usable_memory


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mount point; beside it ``member`` is the file that names this process's groups."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "member")
    return tmp_path / "fs"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def test_values_of_the_group_and_its_ancestors(root: Path) -> None:
    write(root / "a" / "b" / "cpu.max", "150000 100000")
    write(root / "cpu.max", "max 100000")
    assert list(group_values("cpu.max")) == [], "no member file"
    for member, values in (
        ("1:name=old:/elsewhere\n0::/a/b", ["150000 100000", "max 100000"]),
        ("0::/../../elsewhere", []),  # seen from another namespace
    ):
        write(root.with_name("member"), member)
        assert list(group_values("cpu.max")) == values


@pytest.mark.parametrize("version", ["1", "2", "hybrid"])
def test_a_quota_of_a_container_is_cpus(root: Path, version: str) -> None:
    """Also if only the container's own group is mounted, as the root."""
    own = {"1": root / "cpu,cpuacct", "2": root, "hybrid": root / "unified"}[version]
    if version == "1":
        member = "5:cpu,cpuacct:/docker/ab12\n3:memory:/docker/ab12\n0::/docker/ab12"
        free, half = ("cpu.cfs_quota_us", "-1"), ("cpu.cfs_quota_us", "50000")
        write(own / "cpu.cfs_period_us", "100000")
        memory = root / "memory" / "memory.limit_in_bytes"
    else:
        member = "0::/docker/ab12"
        free, half = ("cpu.max", "max 100000"), ("cpu.max", "50000 100000")
        memory = own / "memory.max"
    write(root.with_name("member"), member)
    write(own / free[0], free[1])
    assert usable_cpus() == len(os.sched_getaffinity(0))
    write(own / half[0], half[1])
    assert usable_cpus() == 0.5
    if version != "1":
        # Some runtimes leave out the period.
        write(own / half[0], "50000")
        assert usable_cpus() == 0.5
    write(memory, "123456789")
    assert usable_memory() == 123456789
    if version != "1":
        # The limit of the group itself, where it is seen, counts too.
        write(own / "docker" / "ab12" / "cpu.max", "25000 100000")
        assert usable_cpus() == 0.25
