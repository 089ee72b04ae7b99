"""Check the limits of a process: open files, shared memory, locked memory, processes."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from dist_train.doctor.finding import Finding, graded
from dist_train.system.cgroup import own_groups

INFINIBAND = Path("/sys/class/infiniband")


def check_limits(shared_memory: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Findings on all limits of this process.

    Args:
        shared_memory: the folder through which NCCL's processes of a machine communicate, and
            batches are passed if the system has no anonymous shared memory.
    """
    yield _open_files()
    yield _shared_memory(shared_memory)
    yield _locked_memory(rdma=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()))
    yield _processes()


def _open_files() -> Finding:
    """Shards, workers and connections are open files; without a shared buffer, batches too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = "Run 'ulimit -n 65536' before the launch, or raise LimitNOFILE of the service."
    return graded("open files", _endless(soft), _named(soft), fix, bad=512, warn=4096)


def _shared_memory(folder: Path) -> Finding:
    """The default of containers is 64 MB."""
    what = str(folder)
    fix = "Docker: --shm-size=16g or --ipc=host. Kubernetes: an emptyDir with medium: Memory there."
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(what, "bad", f"{error.strerror}", fix)
    found = f"{free / 2**30:.2f} GiB free"
    return graded(what, free, found, fix, bad=128 * 2**20, warn=2 * 2**30)


def _locked_memory(*, rdma: bool) -> Finding:
    """RDMA registers its send buffers, which count as locked memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if not rdma:
        return Finding("locked memory", "ok", f"{_named(soft, 'bytes')}, but no RDMA to need it")
    fix = "Run 'ulimit -l unlimited' before the launch, or set LimitMEMLOCK=infinity."
    return graded(
        "locked memory", _endless(soft), _named(soft, "bytes"), fix, warn=64 * 2**30, bad=2**26
    )


def _processes() -> Finding:
    """Loader workers and the threads of all libraries count as processes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    group = free_in_cgroups()
    fix = "Raise 'ulimit -u', or the container's limit: docker run --pids-limit, podPidsLimit."
    if group is not None and group < _endless(soft):
        return graded("processes", group, f"{group} more in its cgroup", fix, bad=128, warn=2048)
    return graded("processes", _endless(soft), _named(soft), fix, bad=256, warn=2048)


def free_in_cgroups() -> int | None:
    """The number of further processes that the control groups allow; None without a limit."""
    free = []
    for group in (*own_groups(), *own_groups(controller="pids")):
        limit = group / "pids.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            free.append(int(most) - int((group / "pids.current").read_text()))
    return min(free, default=None)


def _endless(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _named(limit: int, unit: str = "") -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} {unit}".strip()
