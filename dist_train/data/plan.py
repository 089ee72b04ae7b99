"""The order of training: (seed, step) -> the global batch -> each rank's slots, in closed form.

Pure numpy; no I/O. Each class is an endless stream of clips: pass after pass over all clips of the
class, every pass in an order of its own. Step t takes the next ``batch * p / (p + q)`` positives
and ``batch * q / (p + q)`` negatives of the two streams, so any step is known without the steps
before it, remainders are carried into the next pass, and nothing is dropped or repeated.

The order of a pass sorts the clips by a keyed 64-bit hash. It is written out here, rather than
taken from a random generator, so that it is the same on every machine and in every version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np

from dist_train.errors import PlanError

Clips = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Stream:
    """One class's clips (int64 [count]), pass after pass, ``take`` of them a step.

    Clips of one step differ from each other, also where a step reaches over the end of a pass: the
    new pass then begins with clips that the old one did not end with.

    Raises:
        PlanError: there are too few clips for that.
    """

    clips: Clips
    take: int
    seed: int
    name: str

    def __post_init__(self) -> None:
        # A pass must be able to begin with clips that are neither in the tail of the pass before
        # nor in its own (see order). The tail is shorter than a step.
        count, take = len(self.clips), self.take
        longest_tail = take - gcd(count, take)
        if count < take + longest_tail:
            raise PlanError(
                f"the selection holds {count} {self.name} for train, and the batch needs {take} "
                f"different ones a step, for which at least {take + longest_tail} are needed",
                fix="Lower plan.batch, or select more clips.",
            )

    def tail(self, number: int) -> int:
        """How many clips of pass ``number`` fall into a step that the next pass completes."""
        return (number + 1) * len(self.clips) % self.take

    def at_step(self, step: int) -> Clips:
        """The clips of step ``step``: int64 [take]."""
        count, first = len(self.clips), step * self.take
        number, start = divmod(first, count)
        here = self.order(number)[start : start + self.take]
        if len(here) == self.take:
            return here.copy()
        return np.concatenate([here, self.order(number + 1)[: self.take - len(here)]])

    def order(self, number: int) -> Clips:
        """Pass ``number``: every clip once, int64 [count]."""
        return _pass_order(self, number)

    def sorted_by_hash(self, number: int) -> Clips:
        """The order of a pass before its head is mended: int64 [count]."""
        keyed = _mix(self.clips.astype(np.uint64) ^ _key(self.seed, self.name, number))
        return self.clips[np.argsort(keyed)]


# A step reaches over two passes at most, of two streams.
@lru_cache(maxsize=4)
def _pass_order(stream: Stream, number: int) -> Clips:
    order = stream.sorted_by_hash(number)
    carried = stream.tail(number - 1) if number else 0
    if carried == 0:
        return order
    # There are enough clips (see __post_init__) for the head to be found in front of the pass's own
    # tail. So the tail stays where the hash puts it, and the next pass knows it without this one.
    before = stream.sorted_by_hash(number - 1)[-carried:]
    head = np.flatnonzero(~np.isin(order, before))[: stream.take - carried]
    rest = np.setdiff1d(np.arange(len(order)), head)
    mended: Clips = order[np.concatenate([head, rest])]
    return mended


@dataclass(frozen=True)
class Plan:
    """The global batches of a run, of exactly ``ratio`` = (p, q) positives to negatives.

    An epoch is one pass over the positives: epoch e begins at the first step that begins with a
    clip of pass e. Where a pass does not fill its last step, the next pass does, so epochs can
    differ in length by one step.

    A global batch is a row of groups of p positives and q negatives. Ranks and micro-batches are
    cut along groups, so each of them has the exact ratio, and the concatenation over ranks is the
    global batch at every world size.
    """

    positives: Stream
    negatives: Stream
    ratio: tuple[int, int]
    batch: int

    def global_batch(self, step: int) -> Clips:
        """Clip numbers of step ``step`` (0 is the first of the run): int64 [batch]."""
        p, q = self.ratio
        groups = self.batch // (p + q)
        return np.concatenate(
            [
                self.positives.at_step(step).reshape(groups, p),
                self.negatives.at_step(step).reshape(groups, q),
            ],
            axis=1,
        ).reshape(-1)

    def rank_batches(self, step: int, *, rank: int, world: int, accumulate: int) -> Clips:
        """What ``rank`` sees at a step: int64 [accumulate, batch / world / accumulate].

        Raises:
            PlanError: the global batch cannot be cut that way in whole groups.
        """
        self.check_cut(world, accumulate)
        mine: Clips = self.global_batch(step).reshape(world, accumulate, -1)[rank]
        return mine

    def check_cut(self, world: int, accumulate: int) -> None:
        """Raise ``PlanError`` unless every rank's every micro-batch can hold whole groups."""
        group = sum(self.ratio)
        if self.batch % (world * accumulate * group):
            raise PlanError(
                f"plan.batch {self.batch} cannot be cut into {world} processes x {accumulate} "
                f"accumulation steps with {self.ratio[0]} positive to {self.ratio[1]} negatives "
                f"in each",
                fix=f"Use a multiple of {world * accumulate * group}.",
            )

    def first_step(self, epoch: int) -> int:
        """The first step of epoch ``epoch``."""
        return -(-epoch * len(self.positives.clips) // self.positives.take)

    def epoch_of(self, step: int) -> int:
        """The epoch that step ``step`` belongs to: the last e with first_step(e) <= step."""
        return step * self.positives.take // len(self.positives.clips)

    @property
    def fingerprint(self) -> str:
        """Identity of the whole order, as 16 hex digits."""
        digest = hashlib.sha256(repr((self.ratio, self.batch)).encode())
        for stream in (self.positives, self.negatives):
            digest.update(repr((stream.seed, stream.name, stream.take)).encode())
            digest.update(stream.clips.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def make_plan(
    positives: Clips, negatives: Clips, *, batch: int, ratio: tuple[int, int], seed: int
) -> Plan:
    """A plan over clip numbers of the two classes.

    Raises:
        PlanError: the batch is no multiple of p + q, or a class holds too few clips for a batch of
            different ones.
    """
    p, q = ratio
    groups, rest = divmod(batch, p + q)
    if rest or not groups:
        raise PlanError(
            f"plan.batch {batch} cannot hold {p} positive to {q} negatives",
            fix=f"Use a multiple of {p + q}.",
        )
    return Plan(
        Stream(positives, groups * p, seed, "positives"),
        Stream(negatives, groups * q, seed, "negatives"),
        ratio,
        batch,
    )


def _key(seed: int, name: str, number: int) -> np.uint64:
    digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _mix(values: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), a bijection of 64-bit words."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
