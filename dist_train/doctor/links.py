"""Check the network between the processes of a launch, their clocks and their shared disk.

All functions that take the group are collective calls.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from dist_train.distributed.collectives import OfSomeRankError, on_main, run_on_all_ranks
from dist_train.distributed.process_group import ProcessGroup
from dist_train.doctor.finding import Finding, graded

#: Message sizes in bytes: a flag, a layer, a DDP bucket, the gradients of a small network.
SIZES = (1_024, 2**20, 25 * 2**20, 100 * 2**20)
PAIR_BYTES = 4 * 2**20
# Measuring all pairs of more machines would take minutes.
MOST_ENDS = 16
# Float32 gradients of a 3D ResNet-101: 85.2 M parameters.
GRADIENTS = 4 * 85.2e6
# Seconds of repeating one measurement.
SPAN = 0.5


@dataclass(frozen=True)
class Rate:
    """The speed of one collective at one size.

    Attributes:
        name: "all-reduce" or "all-gather".
        size: bytes of the result on each process.
        seconds: median duration of a call on the slowest process.
        bus: bytes per second over the slowest link, independent of the number of processes, as in
            https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
    """

    name: str
    size: int
    seconds: float
    bus: float


def measure_collectives(group: ProcessGroup) -> list[Rate]:
    """Measure all-reduce and all-gather at each of ``SIZES``."""
    world, rates = group.world, []
    for size in SIZES:
        elements = max(1, size // 4 // world) * world
        full = torch.zeros(elements, device=group.device)
        shard = torch.zeros(elements // world, device=group.device)
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            "all-reduce": (partial(dist.all_reduce, full), 2 * (world - 1) / world),
            "all-gather": (
                partial(dist.all_gather, list(full.chunk(world)), shard),
                (world - 1) / world,
            ),
        }
        for name, (call, travelled) in calls.items():
            seconds = _time(call, group)
            rates.append(Rate(name, 4 * elements, seconds, travelled * 4 * elements / seconds))
    return rates


def _time(call: Callable[[], Any], group: ProcessGroup) -> float:
    """Median seconds of a collective call on the slowest process."""

    def once() -> float:
        dist.barrier()
        return _seconds(call, group)

    once()  # The first call makes the connections.
    first = max(group.gather(once()))
    durations = [once() for _ in range(min(50, max(3, int(SPAN / first))))]
    return float(max(group.gather(median(durations))))


def _seconds(call: Callable[[], Any], group: ProcessGroup) -> float:
    began = time.perf_counter()
    call()
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    return time.perf_counter() - began


def measure_pairs(group: ProcessGroup, hosts: Sequence[str]) -> dict[tuple[int, int], float]:
    """Bytes per second between each two machines; on one machine, between each two processes.

    One pair at a time. Empty if there are more than ``MOST_ENDS`` ends.

    Args:
        hosts: the machine of each rank.

    Returns:
        Rates by pair of ranks.
    """
    firsts = sorted({hosts.index(host) for host in hosts})
    ends = firsts if len(firsts) > 1 else range(len(hosts))
    if len(ends) > MOST_ENDS:
        return {}
    rates = {}
    data = torch.zeros(PAIR_BYTES // 4, device=group.device)
    for pair in combinations(ends, 2):
        seconds = 0.0
        if group.rank in pair:
            round_trip = partial(_round_trip, data, pair, is_first=group.rank == pair[0])
            seconds = min(_seconds(round_trip, group) for _ in range(4))
        rates[pair] = 2 * PAIR_BYTES / max(group.gather(seconds))
    return rates


def _round_trip(data: torch.Tensor, pair: tuple[int, int], *, is_first: bool) -> None:
    if is_first:
        dist.send(data, pair[1])
        dist.recv(data, pair[1])
    else:
        dist.recv(data, pair[0])
        dist.send(data, pair[0])


def judge_collectives(rates: Sequence[Rate], *, world: int, gpus: bool) -> Finding:
    """The finding on the time to all-reduce the gradients of a large network."""
    largest = max((r for r in rates if r.name == "all-reduce"), key=lambda rate: rate.size)
    step = 2 * (world - 1) / world * GRADIENTS / largest.bus
    found = f"{largest.bus / 1e9:.2f} GB/s; gradients of a ResNet-101 take {step:.2f} s"
    fix = (
        "NCCL_DEBUG=INFO shows the network in use; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it."
        if gpus
        else "GLOO_SOCKET_IFNAME chooses the network. Raise train.accumulate to exchange less."
    )
    return graded("all-reduce", largest.bus, found, fix, warn=4e9 if gpus else 0.2e9)


def judge_pairs(rates: dict[tuple[int, int], float], hosts: Sequence[str]) -> Finding | None:
    """The finding on the slowest pair against the median. None if no pair was measured."""
    if not rates:
        return None
    usual = median(rates.values())
    pair = min(rates, key=lambda pair: rates[pair])
    ends = " and ".join(f"{rank} ({hosts[rank]})" for rank in pair)
    found = f"{rates[pair] / 1e9:.2f} GB/s between ranks {ends}; the median is {usual / 1e9:.2f}"
    fix = "Check the cables, ports and network cards of these two: others are faster."
    return graded("slowest pair", rates[pair] / usual, found, fix, warn=0.5)


def measure_clocks(group: ProcessGroup) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, accurate to milliseconds."""
    rounds = []
    for _ in range(5):
        dist.barrier()
        times = group.gather(time.time())
        rounds.append([t - times[0] for t in times])
    return [median(column) for column in zip(*rounds, strict=True)]


def judge_clocks(ahead: Sequence[float]) -> Finding:
    """The finding on clock differences, which disorder logs, metrics and file times."""
    rank = max(range(len(ahead)), key=lambda rank: abs(ahead[rank]))
    difference = abs(ahead[rank])
    found = f"at most {difference:.3f} s apart (rank {rank} from rank 0)"
    fix = "Let chrony or systemd-timesyncd set the clocks of all machines."
    return graded("clocks", -difference, found, fix, warn=-1.0)


def check_shared(group: ProcessGroup, folder: Path, hosts: Sequence[str]) -> Finding | None:
    """Whether all machines see a file that rank 0 writes. None on one machine."""
    if len(set(hosts)) == 1:
        return None
    # The name is new, so no cache of a network file system reports it as missing.
    mark = group.gather(folder / f".dist_train-doctor-{secrets.token_hex(8)}")[0]
    try:
        on_main(group, mark.touch)
        seen = run_on_all_ranks(group, mark.exists)
    except (OSError, OfSomeRankError) as error:
        return Finding("shared disk", "bad", str(error), "Give a folder that may be written.")
    finally:
        if group.rank == 0:
            with suppress(OSError):
                mark.unlink(missing_ok=True)
    blind = sorted({host for host, sees in zip(hosts, seen, strict=True) if not sees})
    if blind:
        fix = "Give runs (out=) and this check (--folder) a disk that all machines share."
        return Finding("shared disk", "bad", f"{folder} of rank 0 is not that of {blind}", fix)
    return Finding("shared disk", "ok", f"{folder} is the same on {len(set(hosts))} machines")


def table(rates: Sequence[Rate], world: int) -> Table:
    """A table of the rates for the terminal."""
    view = Table(title=f"{dist.get_backend()}, {world} processes", title_justify="left")
    view.add_column("")
    for name in ("size", "time", "GB/s", "GB/s of a link"):
        view.add_column(name, justify="right")
    for rate in sorted(rates, key=lambda rate: (rate.name, rate.size)):
        view.add_row(
            rate.name,
            f"{rate.size / 2**10:.0f} KiB" if rate.size < 2**20 else f"{rate.size / 2**20:.0f} MiB",
            f"{1e3 * rate.seconds:.3g} ms",
            f"{rate.size / rate.seconds / 1e9:.3f}",
            f"{rate.bus / 1e9:.3f}",
        )
    return view
