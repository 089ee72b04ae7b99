"""Check the network between the processes of a launch, their clocks and their shared disk."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

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


def everyone(value: Any) -> list[Any]:
    """The values of all processes, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def measure_collectives(device: torch.device, sizes: Sequence[int] = SIZES) -> list[Rate]:
    """Measure all-reduce and all-gather at each size. All functions here are collective calls."""
    world, rates = dist.get_world_size(), []
    for size in sizes:
        elements = max(1, size // 4 // world) * world
        whole = torch.zeros(elements, device=device)
        part = torch.zeros(elements // world, device=device)
        shares = list(whole.chunk(world))
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            "all-reduce": (partial(dist.all_reduce, whole), 2 * (world - 1) / world),
            "all-gather": (partial(dist.all_gather, shares, part), (world - 1) / world),
        }
        for name, (call, travelled) in calls.items():
            seconds = _time(call, device)
            rates.append(Rate(name, 4 * elements, seconds, travelled * 4 * elements / seconds))
    return rates


def _time(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a collective call on the slowest process."""

    def once() -> float:
        dist.barrier()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()  # The first call makes the connections.
    first = _slowest(once())
    durations = [once() for _ in range(min(50, max(3, int(SPAN / first))))]
    return _slowest(statistics.median(durations))


def _slowest(seconds: float) -> float:
    """The greatest value of all processes."""
    return float(max(everyone(seconds)))


def measure_pairs(device: torch.device, hosts: Sequence[str]) -> dict[tuple[int, int], float]:
    """Bytes per second between each two machines; on one machine, between each two processes.

    One pair at a time. Empty if there are more than ``MOST_ENDS`` ends.

    Args:
        hosts: the machine of each rank.

    Returns:
        Rates by pair of ranks.
    """
    firsts = list({host: rank for rank, host in reversed(list(enumerate(hosts)))}.values())
    ends = sorted(firsts) if len(firsts) > 1 else list(range(len(hosts)))
    if len(ends) > MOST_ENDS:
        return {}
    rank, rates = dist.get_rank(), {}
    data = torch.zeros(PAIR_BYTES // 4, device=device)
    for pair in combinations(ends, 2):
        seconds = _round_trip(data, pair, device) if rank in pair else 0.0
        rates[pair] = 2 * PAIR_BYTES / _slowest(seconds)
    return rates


def _round_trip(data: torch.Tensor, pair: tuple[int, int], device: torch.device) -> float:
    """The least seconds of a few round trips between a pair of ranks."""
    first, second = pair
    durations = []
    for _ in range(4):
        began = time.perf_counter()
        if dist.get_rank() == first:
            dist.send(data, second)
            dist.recv(data, second)
        else:
            dist.recv(data, first)
            dist.send(data, first)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - began)
    return min(durations)


def judge_collectives(rates: Sequence[Rate], *, world: int, cards: bool) -> Finding:
    """The finding on the time to all-reduce the gradients of a large network."""
    largest = max((r for r in rates if r.name == "all-reduce"), key=lambda rate: rate.size)
    step = 2 * (world - 1) / world * GRADIENTS / largest.bus
    found = f"{largest.bus / 1e9:.2f} GB/s; gradients of a ResNet-101 take {step:.2f} s"
    fix = (
        "NCCL_DEBUG=INFO shows the network in use; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it."
        if cards
        else "GLOO_SOCKET_IFNAME chooses the network. Raise train.accumulate to exchange less."
    )
    return graded("all-reduce", largest.bus, found, fix, warn=4e9 if cards else 0.2e9)


def judge_pairs(rates: dict[tuple[int, int], float], hosts: Sequence[str]) -> Finding | None:
    """The finding on the slowest pair against the median. None if no pair was measured."""
    if not rates:
        return None
    usual = statistics.median(rates.values())
    pair = min(rates, key=lambda pair: rates[pair])
    ends = " and ".join(f"{rank} ({hosts[rank]})" for rank in pair)
    found = f"{rates[pair] / 1e9:.2f} GB/s between ranks {ends}; the median is {usual / 1e9:.2f}"
    fix = "Check the cables, ports and network cards of these two: others are faster."
    return graded("slowest pair", rates[pair] / usual, found, fix, warn=0.5)


def measure_clocks() -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, accurate to milliseconds."""
    rounds = []
    for _ in range(5):
        dist.barrier()
        times = everyone(time.time())
        rounds.append([t - times[0] for t in times])
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def judge_clocks(ahead: Sequence[float]) -> Finding:
    """The finding on clock differences, which disorder logs, metrics and file times."""
    rank = max(range(len(ahead)), key=lambda rank: abs(ahead[rank]))
    difference = abs(ahead[rank])
    found = f"at most {difference:.3f} s apart (rank {rank} from rank 0)"
    fix = "Let chrony or systemd-timesyncd set the clocks of all machines."
    return graded("clocks", -difference, found, fix, warn=-1.0)


def check_shared(folder: Path, hosts: Sequence[str]) -> Finding | None:
    """Whether all machines see a file that rank 0 writes. None on one machine."""
    if len(set(hosts)) == 1:
        return None
    mark = everyone(folder / f".dist_train-doctor-{secrets.token_hex(8)}")[0]
    is_main = dist.get_rank() == 0
    # Errors are exchanged as values, so that every rank takes part in each exchange.
    written = everyone(_tried(mark.touch) if is_main else None)[0]
    # The name is new, so no cache of a network file system reports it as missing.
    answers = everyone(_tried(mark.exists))
    if is_main:
        _tried(lambda: mark.unlink(missing_ok=True))
    errors = [answer for answer in (written, *answers) if isinstance(answer, OSError)]
    if errors:
        return Finding("shared disk", "bad", str(errors[0]), "Give a folder that may be written.")
    seen = [answer is True for answer in answers]
    blind = sorted({host for host, sees in zip(hosts, seen, strict=True) if not sees})
    if blind:
        fix = "Give runs (out=) and this check (--folder) a disk that all machines share."
        return Finding("shared disk", "bad", f"{folder} of rank 0 is not that of {blind}", fix)
    return Finding("shared disk", "ok", f"{folder} is the same on {len(set(hosts))} machines")


def _tried(action: Callable[[], object]) -> object:
    """The result of ``action``, or its OSError."""
    try:
        return action()
    except OSError as error:
        return error


def table(rates: Sequence[Rate], backend: str, world: int) -> Table:
    """A table of the rates for the terminal."""
    view = Table(title=f"{backend}, {world} processes", title_justify="left")
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
