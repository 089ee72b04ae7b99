"""From the parts of a step, measured on a few ranks, to the step of many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Bytes of the all-reduces that latency and bandwidth of a link are taken from.
SMALL, LARGE = 64, 2**24
#: Bytes of DDP's buckets of gradients (torch's default).
BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Link:
    """Between two ranks: ``latency`` of a message in seconds, bytes a second.

    ``trees``: the library also sums along a tree, where that is faster (NCCL does, gloo does not).
    """

    latency: float
    bandwidth: float
    trees: bool = False

    def all_reduce(self, size: int, ranks: int) -> float:
        """Seconds for ``size`` bytes.

        A ring is 2 (ranks - 1) messages one after the other, of a share of the bytes each (Thakur,
        Rabenseifner & Gropp 2005). A tree is up and down log2(ranks) levels; as the bytes are in
        many pieces, which follow each other, they pass each link twice in all (Sanders, Speck &
        Träff 2009).
        """
        messages = 2 * (ranks - 1)
        ring = messages * (self.latency + size / ranks / self.bandwidth)
        if not self.trees:
            return ring
        levels = math.ceil(math.log2(ranks))
        return min(ring, 2 * (levels * self.latency + (ranks > 1) * size / self.bandwidth))


def fitted(small: float, large: float, ranks: int, *, trees: bool = False) -> Link:
    """The link over which rings sum ``SMALL`` and ``LARGE`` bytes in so many seconds."""
    messages = 2 * (ranks - 1)
    by_size = max(large - small, 1e-9)
    latency = small / (2 * math.ceil(math.log2(ranks)) if trees else messages)
    return Link(latency, messages * (LARGE - SMALL) / ranks / by_size, trees)


def expected_slowest(samples: Sequence[float], ranks: int) -> float:
    """Mean of the greatest of ``ranks`` independent draws from the samples.

    Exact for their empirical distribution: the greatest is at most the i-th of n with the
    probability (i / n)^ranks. Never above the greatest sample.
    """
    ordered = np.sort(np.asarray(samples, np.float64))
    below = (np.arange(len(ordered) + 1) / len(ordered)) ** ranks
    return float(ordered @ np.diff(below))


def buckets(size: int) -> list[int]:
    """The all-reduces of DDP for so many bytes of gradients."""
    whole, rest = divmod(size, BUCKET)
    return [BUCKET] * whole + [rest] * (rest > 0)


@dataclass(frozen=True)
class Projection:
    """A step of ``ranks``, in seconds. ``exchange`` is that of the gradients as a whole, of which
    ``gradients`` is what the backward pass does not hide."""

    ranks: int
    data: float
    compute: float
    wait: float
    statistics: float
    gradients: float
    rest: float
    exchange: float

    @property
    def step(self) -> float:
        return self.data + self.compute + self.wait + self.statistics + self.gradients + self.rest

    @property
    def without_overlap(self) -> float:
        return self.step - self.gradients + self.exchange


#: A step of which the parts leave more than this share unexplained was not understood.
MOST_UNEXPLAINED = 0.25


def doubts(parts: dict[str, Any]) -> list[str]:
    """Why nothing can be projected from parts, a sentence each; none if they make sense.

    Parts that are differences of two measurements can come out below zero. Within their noise that
    is zero; beyond it something other than the training took the time.
    """
    noise: dict[str, float] = parts.get("noise_s", {})
    found = []
    for name in ("data", "compute", "wait", "statistics", "gradients", "rest", "exchange"):
        seconds, may_be_off = parts[f"{name}_s"], noise.get(name, 0.0)
        if not math.isfinite(seconds) or seconds < -may_be_off:
            found.append(
                f"{name} is {1e3 * seconds:.1f} ms, below zero by more than its noise of "
                f"{1e3 * may_be_off:.1f} ms"
            )
    together = noise.get("gradients", 0.0) + noise.get("exchange", 0.0)
    if parts["gradients_s"] > parts["exchange_s"] + together:
        found.append(
            f"gradients take {1e3 * parts['gradients_s']:.1f} ms of a step, more than their whole "
            f"exchange by itself, {1e3 * parts['exchange_s']:.1f} ms, and the noise of both"
        )
    known = sum(parts[f"{name}_s"] for name in ("data", "compute", "wait", "statistics"))
    step = known + parts["gradients_s"] + parts["rest_s"]
    if parts["rest_s"] > max(noise.get("rest", 0.0), MOST_UNEXPLAINED * step):
        found.append(
            f"rest is {1e3 * parts['rest_s']:.1f} ms of a step of {1e3 * step:.1f} ms, which no "
            "part explains"
        )
    return found


def project(parts: dict[str, Any], link: Link, ranks: int) -> Projection:
    """A step of ``ranks`` that are joined by ``link``, each with as many clips as those measured.

    Args:
        parts: as tools/scaling_rank.py measures them, on 2 ranks or more.

    Raises:
        ValueError: there are ``doubts`` about them.
    """
    if why := doubts(parts):
        raise ValueError("; ".join(why))
    # What is below zero within its noise is zero.
    parts = parts | {
        name: max(0.0, value)
        for name, value in parts.items()
        if name.endswith("_s") and isinstance(value, float)
    }
    compute = parts["compute_s"]
    if ranks == 1:
        return Projection(1, parts["data_s"], compute, 0, 0, 0, max(0, parts["rest_s"]), 0)
    measured, own = parts["world"], link_of(parts)

    def moved(seconds: float, sizes: Sequence[int]) -> float:
        """What was measured, and what more the exchange would take than it does there."""
        change = sum(
            link.all_reduce(size, ranks) - own.all_reduce(size, measured) for size in sizes
        )
        return max(0.0, seconds + change)

    exchange = moved(parts["exchange_s"], buckets(parts["gradient_bytes"]))
    return Projection(
        ranks,
        data=parts["data_s"],
        compute=compute,
        wait=expected_slowest(parts["samples_s"], ranks) - float(np.mean(parts["samples_s"])),
        statistics=moved(parts["statistics_s"], parts["statistics_bytes"]),
        gradients=exchange * shown(parts),
        rest=max(0.0, parts["rest_s"]),
        exchange=exchange,
    )


def link_of(parts: dict[str, Any]) -> Link:
    """The measured one."""
    times = parts["all_reduce_s"]
    return fitted(times["small"], times["large"], parts["world"], trees=parts["trees"])


def shown(parts: dict[str, Any]) -> float:
    """The part of the exchange of gradients that the backward pass does not hide, 0 to 1."""
    if parts["exchange_s"] <= 0:
        return 1.0
    return float(np.clip(parts["gradients_s"] / parts["exchange_s"], 0.0, 1.0))


def assumptions(parts: dict[str, Any], link: Link) -> list[str]:
    """What the projection takes for granted, with the figures that it is made from."""
    calls, world = len(parts["statistics_bytes"]), parts["world"]
    return [
        f"Each rank has a machine of its own like one of the {world} that were measured, and takes "
        f"{parts['clips']} clips at a step (weak scaling).",
        f"Data and compute of a rank stay as they are: {1e3 * parts['data_s']:.0f} ms and "
        f"{1e3 * parts['compute_s']:.0f} ms.",
        f"A step waits for the slowest of N ranks, drawn independently from "
        f"{len(parts['samples_s'])} measured steps (coefficient of variation "
        f"{np.std(parts['samples_s']) / np.mean(parts['samples_s']):.3f}); a rank slower than any "
        f"of them is not foreseen, nor one that is always slow.",
        f"All-reduce is a ring of 2 (N - 1) messages"
        f"{', or a tree where that is faster,' if link.trees else ''} over links of "
        f"{1e6 * link.latency:.0f} us and {link.bandwidth / 1e9:.2f} GB/s.",
        f"Gradients are {parts['gradient_bytes'] / 1e6:.0f} MB, in buckets of 25 MiB; the backward "
        f"pass hides {1 - shown(parts):.0%} of their exchange, as on {world} ranks.",
        f"Statistics of normalisation are {calls} all-reduces of "
        f"{np.mean(parts['statistics_bytes']) if calls else 0:.0f} bytes on average, which nothing "
        f"hides; norm.shared=false has none.",
    ]
