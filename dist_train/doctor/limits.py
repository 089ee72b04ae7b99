"""Check the limits of a process: CPUs, open files, shared and locked memory, processes."""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from dist_train.doctor.finding import Finding, graded
from dist_train.system.cgroup import group_values

INFINIBAND = Path("/sys/class/infiniband")


def check_cpus(cpus: float, processes: int, threads: int) -> Finding:
    """Compare the usable CPUs of this machine with its training processes and their threads.

    Args:
        processes: processes of the launch on this machine.
        threads: threads of each process (torch.get_num_threads()).
    """
    found = f"{cpus:g} for {processes} processes x {threads} threads"
    if cpus < processes:
        fix = f"Start at most {max(1, int(cpus))} processes here, or give them more CPUs."
        return Finding("CPUs", "warn", found, fix)
    if processes * threads > cpus:
        fix = f"Set OMP_NUM_THREADS={int(cpus) // processes} before the launch."
        return Finding("CPUs", "warn", found, fix)
    return Finding("CPUs", "ok", found)


def check_limits(shared_memory: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Findings on all limits of this process.

    Args:
        shared_memory: the folder through which NCCL's processes of a machine communicate, and
            batches are passed if the system has no anonymous shared memory.
    """
    # Shards, workers and connections are open files; without a shared buffer, batches too.
    files = _soft_limit(resource.RLIMIT_NOFILE)
    fix = "Run 'ulimit -n 65536' before the launch, or raise LimitNOFILE of the service."
    yield graded("open files", files, _shown(files), fix, bad=512, warn=4096)
    yield _shared_memory(shared_memory)
    yield _locked_memory(rdma=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()))
    yield _processes()


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
    limit = _soft_limit(resource.RLIMIT_MEMLOCK)
    found = _shown(limit, " bytes")
    if not rdma:
        return Finding("locked memory", "ok", f"{found}, but no RDMA to need it")
    fix = "Run 'ulimit -l unlimited' before the launch, or set LimitMEMLOCK=infinity."
    return graded("locked memory", limit, found, fix, warn=64 * 2**30, bad=2**26)


def _processes() -> Finding:
    """Loader workers and the threads of all libraries count as processes."""
    limit = _soft_limit(resource.RLIMIT_NPROC)
    free = _free_in_cgroups()
    fix = "Raise 'ulimit -u', or the container's limit: docker run --pids-limit, podPidsLimit."
    if free < limit:
        return graded("processes", free, f"{free:.0f} more in its cgroup", fix, bad=128, warn=2048)
    return graded("processes", limit, _shown(limit), fix, bad=256, warn=2048)


def _free_in_cgroups() -> float:
    """The number of further processes that the control groups allow."""
    free = [
        float(most) - int(current)
        for controller in ("", "pids")
        for most, current in zip(
            group_values("pids.max", controller),
            group_values("pids.current", controller),
            strict=False,
        )
        if most != "max"
    ]
    return min(free, default=math.inf)


def _soft_limit(kind: int) -> float:
    soft, _ = resource.getrlimit(kind)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def _shown(limit: float, unit: str = "") -> str:
    return "unlimited" if limit == math.inf else f"{limit:.0f}{unit}"
