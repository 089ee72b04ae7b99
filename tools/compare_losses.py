"""Are two runs the same? Compares a figure of each step of their ``metrics.jsonl``.

Prints a table, and ends with 0 if no step differs by more than the tolerance, with 1 and the first
step that does otherwise, and with 2 if they cannot be compared.

    python tools/compare_losses.py RUN_A RUN_B --tolerance 1e-6 [--figure NAME] [--steps 5:24]

A run is its folder or its ``metrics.jsonl``. A difference is relative: ``|a - b|`` over the larger
of ``|a|`` and ``|b|``. Tolerance 0 wants every bit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

METRICS = "metrics.jsonl"
#: Rows of the table, at most, but for the first step that differs and the worst one.
ROWS = 24
#: Figures by step; None where one is not finite, or the step was left out.
Series = Mapping[int, float | None]


class NotComparableError(Exception):
    """A file is missing or damaged, or two runs do not have the same steps."""


@dataclass(frozen=True)
class Comparison:
    """Of each step, ascending: its number, both figures, and their relative difference."""

    rows: list[tuple[int, float | None, float | None, float]]
    tolerance: float

    @property
    def worst(self) -> tuple[int, float]:
        """A step, and the largest difference."""
        step, *_, difference = max(self.rows, key=lambda row: row[3])
        return step, difference

    @property
    def first(self) -> int | None:
        """The first step that differs by more than the tolerance."""
        return next((step for step, *_, far in self.rows if far > self.tolerance), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, help="folder of a run, or its metrics.jsonl")
    parser.add_argument("b", type=Path, help="the other one")
    parser.add_argument("--tolerance", type=tolerance, required=True, help="relative, as 1e-6")
    parser.add_argument("--figure", default="train/loss", help="by default train/loss")
    parser.add_argument("--steps", type=step_range, help="FIRST:LAST; by default all of both")
    arguments = parser.parse_args()
    try:
        compared = compare(
            arguments.a,
            arguments.b,
            arguments.tolerance,
            figure=arguments.figure,
            steps=arguments.steps,
        )
    except NotComparableError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    Console().print(as_table(compared, arguments.figure))
    worst_at, worst = compared.worst
    said = f"{len(compared.rows)} steps, largest difference {worst:.3g} at step {worst_at}: "
    if compared.first is None:
        print(said + f"the same within {compared.tolerance:g}")
        return
    print(said + f"more than {compared.tolerance:g}, first at step {compared.first}")
    sys.exit(1)


def compare(
    a: Path,
    b: Path,
    tolerance: float,
    *,
    figure: str = "train/loss",
    steps: tuple[int, int] | None = None,
) -> Comparison:
    """Compare two runs.

    Args:
        steps: the first and the last step to look at, both of which must be there.

    Raises:
        NotComparableError: a file is missing or damaged, lacks the figure, or steps differ.
    """
    ours, theirs = (within(read(path, figure), steps, path) for path in (a, b))
    for lacking, having, path in ((ours, theirs, a), (theirs, ours, b)):
        missing = sorted(having.keys() - lacking.keys())
        if missing:
            raise NotComparableError(
                f"{path}: has no step {missing[0]} ({len(ours)} steps in {a}, {len(theirs)} in "
                f"{b}); --steps FIRST:LAST compares a part"
            )
    rows = [(s, ours[s], theirs[s], difference(ours[s], theirs[s])) for s in sorted(ours)]
    return Comparison(rows, tolerance)


def read(path: Path, figure: str) -> Series:
    """A figure by step.

    Raises:
        NotComparableError: there is none, or the file is damaged.
    """
    file = path / METRICS if path.is_dir() else path
    found: dict[int, float | None] = {}
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                values = json.loads(line)
                step = values["step"]
                if step in found:
                    raise NotComparableError(f"{file}:{number}: step {step} is there twice")
                if figure in values:
                    value = values[figure]
                    found[step] = None if value is None else float(value)
    except OSError as error:
        raise NotComparableError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise NotComparableError(f"{file}:{number}: is no line of figures ({error!r})") from None
    if not found:
        raise NotComparableError(f"{file}: no step has the figure '{figure}'")
    return found


def within(series: Series, steps: tuple[int, int] | None, path: Path) -> Series:
    if steps is None:
        return series
    for step in steps:
        if step not in series:
            raise NotComparableError(f"{path}: has no step {step}; its last is {max(series)}")
    first, last = steps
    return {step: value for step, value in series.items() if first <= step <= last}


def difference(a: float | None, b: float | None) -> float:
    """Relative; infinite where only one of two is a finite number."""
    if a == b:
        return 0.0
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def as_table(compared: Comparison, figure: str) -> Table:
    table = Table(title=figure)
    for heading in ("step", "A", "B", "difference", ""):
        table.add_column(heading, justify="right")
    stride = math.ceil(len(compared.rows) / ROWS)
    shown = {step for step, *_ in compared.rows[::stride]} | {compared.worst[0], compared.first}
    for step, a, b, far in compared.rows:
        if step in shown:
            mark = "differs" if far > compared.tolerance else ""
            table.add_row(str(step), _text(a), _text(b), f"{far:.2e}", mark)
    return table


def _text(value: float | None) -> str:
    return "none" if value is None else repr(value)


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
