"""Are two runs the same? Compares a metric of each step of their ``metrics.jsonl``.

Exits with 0 if no step differs by more than the tolerance; with 1 if one does, and names the first;
with 2 if the runs cannot be compared.

    python tools/compare_losses.py RUN_A RUN_B --tolerance 1e-6 [--figure NAME] [--steps 5:24]

A run is its folder or its ``metrics.jsonl``. A difference is relative: ``|a - b|`` over the larger
of ``|a|`` and ``|b|``. Tolerance 0 asks for equal bits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from measuring import new_table
from rich.console import Console

METRICS = "metrics.jsonl"
#: Most rows of the table, besides the first step that differs and the worst one.
ROWS = 24


class NotComparableError(Exception):
    """A file is missing or damaged, or the runs do not have the same steps."""


@dataclass(frozen=True)
class Comparison:
    """For each step, ascending: its number, both values (None if not finite), their difference."""

    rows: list[tuple[int, float | None, float | None, float]]
    tolerance: float

    @property
    def worst(self) -> tuple[int, float]:
        """The step with the largest difference, and the difference."""
        step, *_, difference = max(self.rows, key=lambda row: row[3])
        return step, difference

    @property
    def first(self) -> int | None:
        """The first step that differs by more than the tolerance."""
        return next((step for step, *_, far in self.rows if far > self.tolerance), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, help="folder of a run, or its metrics.jsonl")
    parser.add_argument("b", type=Path, help="the other run")
    parser.add_argument("--tolerance", type=tolerance, required=True, help="relative, as 1e-6")
    parser.add_argument("--figure", default="train/loss", help="a metric; default train/loss")
    parser.add_argument("--steps", type=step_range, help="FIRST:LAST; default all of both")
    arguments = parser.parse_args()
    figure, limit = arguments.figure, arguments.tolerance
    try:
        compared = compare(arguments.a, arguments.b, limit, figure=figure, steps=arguments.steps)
    except NotComparableError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    rows, first, (worst_at, worst) = compared.rows, compared.first, compared.worst
    table = new_table(figure, "step", "A", "B", "difference", "")
    shown = {step for step, *_ in rows[:: math.ceil(len(rows) / ROWS)]} | {worst_at, first}
    for step, a, b, far in rows:
        if step in shown:
            table.add_row(str(step), repr(a), repr(b), f"{far:.2e}", "differs" * (far > limit))
    Console().print(table)
    summary = f"{len(rows)} steps, largest difference {worst:.3g} at step {worst_at}: "
    if first is not None:
        print(f"{summary}more than {limit:g}, first at step {first}")
        sys.exit(1)
    print(f"{summary}the same within {limit:g}")


def compare(
    a: Path,
    b: Path,
    tolerance: float,
    *,
    figure: str = "train/loss",
    steps: tuple[int, int] | None = None,
) -> Comparison:
    """Compare a metric of two runs.

    Args:
        steps: the first and the last step to compare; both must exist.

    Raises:
        NotComparableError: a file is missing or damaged, lacks the metric, or steps differ.
    """
    ours, theirs = (read(path, figure, steps) for path in (a, b))
    for lacking, having, path in ((ours, theirs, a), (theirs, ours, b)):
        missing = sorted(having.keys() - lacking.keys())
        if missing:
            raise NotComparableError(
                f"{path}: has no step {missing[0]} ({len(ours)} steps in {a}, {len(theirs)} in "
                f"{b}); --steps FIRST:LAST compares a part"
            )
    rows = [(s, ours[s], theirs[s], difference(ours[s], theirs[s])) for s in sorted(ours)]
    return Comparison(rows, tolerance)


def read(path: Path, figure: str, steps: tuple[int, int] | None) -> dict[int, float | None]:
    """A metric by step; None where it is not finite."""
    file = path / METRICS if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = {line["step"]: line[figure] for line in lines if figure in line}
    except OSError as error:
        raise NotComparableError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise NotComparableError(f"{file}: has a line without metrics ({error!r})") from None
    if not found:
        raise NotComparableError(f"{file}: no step has the metric '{figure}'")
    if len(found) < sum(figure in line for line in lines):
        raise NotComparableError(f"{file}: has a step twice")
    first, last = steps or (min(found), max(found))
    for step in (first, last):
        if step not in found:
            raise NotComparableError(f"{path}: has no step {step}; its last is {max(found)}")
    return {step: value for step, value in found.items() if first <= step <= last}


def difference(a: float | None, b: float | None) -> float:
    """Relative difference; infinite if only one value is finite."""
    if a == b:
        return 0.0
    return math.inf if a is None or b is None else abs(a - b) / max(abs(a), abs(b))


def tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no tolerance: give a number from 0")
    return value


def step_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    try:
        steps = int(first), int(last)
    except ValueError:
        steps = 1, 0
    if steps[0] > steps[1]:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form FIRST:LAST, as 1:20")
    return steps


if __name__ == "__main__":
    main()
