"""Check that there are enough CPUs for all processes and threads."""

from __future__ import annotations

from dist_train.doctor.finding import Finding


def check_cpus(cpus: float, processes: int, threads: int) -> Finding:
    """Compare the CPUs of this machine with its training processes and their threads.

    Args:
        cpus: usable CPUs of this machine.
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
