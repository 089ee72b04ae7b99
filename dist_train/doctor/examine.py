"""Run all checks: of each machine, and between the machines of a launch."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dist_train.distributed.hardware import cudnn_version
from dist_train.distributed.process_group import ProcessGroup, process_group
from dist_train.doctor import links
from dist_train.doctor.devices import check_devices
from dist_train.doctor.disk import check_disk
from dist_train.doctor.finding import Finding, table
from dist_train.doctor.limits import check_cpus, check_limits
from dist_train.doctor.versions import check_versions, judge_pair
from dist_train.system.advice import first_line
from dist_train.system.cgroup import usable_cpus


def examine(folder: Path, *, timeout: float = 60.0) -> list[Finding]:
    """Run all checks and print the results. Call it in every process of a launch, or in one alone.

    Args:
        folder: a folder on the disk for runs.
        timeout: seconds that processes wait for each other.

    Returns:
        The findings of all machines, equal on every rank. If the processes cannot connect, those of
        this machine, on its first rank.
    """
    console = Console(highlight=False, markup=False)
    on_first = os.environ.get("LOCAL_RANK", "0") == "0"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    # Each machine is checked once, before the processes connect. So its findings are shown also if
    # they cannot connect, and may explain why.
    findings = list(_check_machine(folder, processes)) if on_first else []
    try:
        # With too few GPUs, which is a finding already, the network is examined from the CPUs.
        cuda = torch.cuda.is_available() and processes <= torch.cuda.device_count()
        with process_group(timeout, cuda=cuda) as group:
            shows = group.is_main
            if group.world > 1:
                findings = _check_launch(folder, findings, group, console)
    except RuntimeError as error:
        findings.append(_not_connected(error))
        shows = on_first
    if shows:
        console.print(table(findings))
    return findings


def _check_machine(folder: Path, processes: int) -> Iterator[Finding]:
    yield from check_versions()
    yield from judge_pair(torch.__version__, cudnn_version())
    yield from check_devices(processes)
    yield check_cpus(usable_cpus(), processes, torch.get_num_threads())
    yield from check_limits()
    yield from check_disk(folder)


def _check_launch(
    folder: Path, own: list[Finding], group: ProcessGroup, console: Console
) -> list[Finding]:
    """Findings of all machines (``own`` are this process's), and of checks between them."""
    hosts = group.gather(socket.gethostname())
    findings = joined(zip(hosts, group.gather(own), strict=True))
    rates = links.measure_collectives(group)
    if group.is_main:
        console.print(links.table(rates, group.world))
    between = [
        links.judge_collectives(rates, world=group.world, gpus=group.device.type == "cuda"),
        links.judge_pairs(links.measure_pairs(group, hosts), hosts),
        links.judge_clocks(links.measure_clocks(group)),
        links.check_shared(group, folder, hosts),
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
        f"not at {where} ({first_line(error)})",
        "Check that all machines resolve the name to the first machine, and that its port is open. "
        "Set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network that they share.",
    )
