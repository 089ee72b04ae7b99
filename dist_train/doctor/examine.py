"""Run all checks: of each machine, and between the machines of a launch."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from dist_train.distributed.hardware import cudnn_version
from dist_train.doctor.cpus import check_cpus
from dist_train.doctor.devices import check_devices
from dist_train.doctor.disk import check_disk
from dist_train.doctor.finding import Finding, table
from dist_train.doctor.limits import check_limits
from dist_train.doctor.links import (
    check_shared,
    everyone,
    judge_clocks,
    judge_collectives,
    judge_pairs,
    measure_clocks,
    measure_collectives,
    measure_pairs,
)
from dist_train.doctor.links import table as table_of_rates
from dist_train.doctor.versions import check_versions, judge_pair
from dist_train.system.cgroup import usable_cpus

Show = Callable[[object], None]


def examine(folder: Path, *, timeout: float = 60.0, show: Show | None = None) -> list[Finding]:
    """Run all checks. Call it in every process of a launch, or in a single process.

    Args:
        folder: a folder on the disk for runs.
        timeout: seconds that processes wait for each other.
        show: called with tables for the terminal: on rank 0, or on each machine if the processes
            cannot connect. None prints them.

    Returns:
        The findings of all machines, equal on every rank.
    """
    show = Console(highlight=False, markup=False).print if show is None else show
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # Each machine is checked once, before the processes connect. So its findings are shown also if
    # they cannot connect, and may explain why.
    findings = list(_of_machine(folder, here)) if local_rank == 0 else []
    if world > 1:
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        try:
            with _process_group(device, timeout):
                findings = _of_launch(folder, findings, device, show if rank == 0 else None)
        except RuntimeError as error:
            findings.append(_not_connected(error))
            rank = local_rank
    if rank == 0:
        show(table(findings))
    return findings


def _of_machine(folder: Path, processes: int) -> Iterator[Finding]:
    yield from check_versions()
    yield from judge_pair(torch.__version__, cudnn_version())
    yield from check_devices(processes)
    yield check_cpus(usable_cpus(), processes, torch.get_num_threads())
    yield from check_limits()
    yield from check_disk(folder)


@contextmanager
def _process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """Open the same process group as training."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _of_launch(
    folder: Path, mine: list[Finding], device: torch.device, show: Show | None
) -> list[Finding]:
    """Findings of all machines (``mine`` are this process's), and of checks between them."""
    hosts = everyone(socket.gethostname())
    findings = joined(zip(hosts, everyone(mine), strict=True))
    rates = measure_collectives(device)
    if show is not None:
        show(table_of_rates(rates, str(dist.get_backend()), dist.get_world_size()))
    between = [
        judge_collectives(rates, world=dist.get_world_size(), cards=device.type == "cuda"),
        judge_pairs(measure_pairs(device, hosts), hosts),
        judge_clocks(measure_clocks()),
        check_shared(folder, hosts),
    ]
    return [*findings, *(finding for finding in between if finding is not None)]


def joined(by_host: Iterable[tuple[str, list[Finding]]]) -> list[Finding]:
    """Merge the findings of several machines: equal findings once, others with machine names."""
    machines: dict[Finding, set[str]] = defaultdict(set)
    for host, findings in by_host:
        for finding in findings:
            machines[finding].add(host)
    everywhere = set().union(*machines.values())
    return [
        finding
        if hosts == everywhere
        else replace(finding, what=f"{finding.what} [{', '.join(sorted(hosts))}]")
        for finding, hosts in machines.items()
    ]


def _not_connected(error: RuntimeError) -> Finding:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return Finding(
        "processes find each other",
        "bad",
        f"not at {where} ({str(error).partition(chr(10))[0]})",
        "Check that all machines resolve the name to the first machine, and that its port is open. "
        "Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network that they share.",
    )
