"""Limits of this process's control groups: version 2, version 1, or both side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

#: Mount point of the cgroup trees, and the file that names this process's group in each tree.
ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def group_values(file: str, controller: str = "") -> Iterator[str]:
    """The text of ``file`` in this process's group and in each ancestor that has it, inner first.

    Args:
        controller: of version 1; "" means version 2, whose controllers share a tree.
    """
    for group in _own_groups(controller):
        try:
            yield (group / file).read_text().strip()
        except OSError:
            continue


def _own_groups(controller: str) -> Iterator[Path]:
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, place = line.split(":", 2)
        if controller not in names.split(","):
            continue
        for mount in (ROOT / names, ROOT / controller) if names else (ROOT / "unified", ROOT):
            group = mount / place.lstrip("/")
            # In another namespace the group may lie above the mount point.
            if mount.is_dir() and ".." not in group.parts:
                yield from (g for g in (group, *group.parents) if g.is_relative_to(mount))
                break


def usable_cpus() -> float:
    """CPUs of this process: its affinity, limited by the CPU quotas of its groups."""
    version_1 = (group_values(f"cpu.cfs_{name}_us", "cpu") for name in ("quota", "period"))
    # Some container runtimes leave out the period.
    version_2 = ((*text.split(), "100000")[:2] for text in group_values("cpu.max"))
    quotas = chain(version_2, zip(*version_1, strict=False))
    limits = [int(quota) / int(period) for quota, period in quotas if quota not in ("max", "-1")]
    return min([float(len(os.sched_getaffinity(0))), *limits])


def usable_memory() -> int:
    """Bytes of this machine's memory, limited by the groups of this process."""
    limits = chain(group_values("memory.max"), group_values("memory.limit_in_bytes", "memory"))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(int(limit) for limit in limits if limit != "max")])


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
