"""Limits of this process's control groups: version 2, version 1, or both side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def own_groups(
    root: Path = ROOT, membership: Path = MEMBERSHIP, controller: str = ""
) -> Iterator[Path]:
    """Folders of this process's group and of all its ancestors, the innermost first.

    Args:
        root: mount point of the cgroup trees.
        membership: the file that names this process's group in each tree.
        controller: of version 1; "" means version 2, whose controllers share a tree.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, place = line.split(":", 2)
        if controller not in names.split(","):
            continue
        for mount in (root / "unified", root) if not names else (root / names, root / controller):
            group = mount / place.lstrip("/")
            # In another namespace the group may lie above the mount point.
            if mount.is_dir() and ".." not in group.parts:
                yield from (g for g in (group, *group.parents) if g.is_relative_to(mount))
                break


def group_values(
    file: str, root: Path = ROOT, membership: Path = MEMBERSHIP, controller: str = ""
) -> Iterator[str]:
    """The text of ``file`` in each group that has it."""
    for group in own_groups(root, membership, controller):
        try:
            yield (group / file).read_text().strip()
        except OSError:
            continue


def usable_cpus(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """CPUs of this process: its affinity, limited by the CPU quotas of its groups."""
    quotas = []
    for text in group_values("cpu.max", root, membership):
        quota, _, period = text.partition(" ")
        if quota != "max":
            quotas.append(int(quota) / int(period or 100_000))
    for group in own_groups(root, membership, "cpu"):
        try:
            given, every = (
                int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
            )
        except OSError:
            continue
        if given > 0:
            quotas.append(given / every)
    return min([float(len(os.sched_getaffinity(0))), *quotas])


def usable_memory(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Bytes of this machine's memory, limited by the groups of this process."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    values = (
        *group_values("memory.max", root, membership),
        *group_values("memory.limit_in_bytes", root, membership, "memory"),
    )
    return min([*limits, *(int(value) for value in values if value != "max")])


def processes_at_once() -> int:
    """The number of usable CPUs, rounded down, at least 1."""
    return max(1, int(usable_cpus()))


def heed_quota() -> None:
    """Limit the threads of libraries that are loaded later to the CPU quota.

    Libraries respect the affinity by themselves, but not a quota, beyond which the kernel pauses
    all threads.
    """
    cpus = processes_at_once()
    if cpus < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))
