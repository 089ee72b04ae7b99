"""What the control groups (version 2) of this process say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def own_groups(root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[Path]:
    """Folders of this process's group and all above it, the innermost first.

    Args:
        root: where the tree of groups is mounted.
        membership: the file that names this process's place in it.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    # Version 2 is the line whose controllers are not named.
    for place in (line.removeprefix("0::") for line in lines if line.startswith("0::")):
        group = root / place.lstrip("/")
        # Seen from within a container, the place may lie above what is mounted.
        if ".." not in group.parts:
            yield from (g for g in (group, *group.parents) if g.is_relative_to(root))


def group_values(file: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[str]:
    """The text of a file in each of the groups that has it."""
    for group in own_groups(root, membership):
        path = group / file
        if path.is_file():
            yield path.read_text().strip()
