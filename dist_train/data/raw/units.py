"""Lengths, times and names in the metadata of microscopes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# µm, by the units' names in OME, ImageJ and OME-Zarr.
MICROMETRES = {"nm": 1e-3, "µm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "å": 1e-4, "pm": 1e-6}
MICROMETRES |= {"um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0}
MICROMETRES |= {"nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
MICROMETRES |= {"angstrom": 1e-4, "picometer": 1e-6, "inch": 25400.0, "in": 25400.0}
# Seconds.
_TIMES = {"s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3}
_TIMES |= {"millisecond": 1e-3, "µs": 1e-6, "us": 1e-6, "microsecond": 1e-6, "ns": 1e-9}
_TIMES |= {"nanosecond": 1e-9, "min": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}


def micrometres(value: object, unit: str | None) -> float | None:
    """Return a length in µm; None if it is no positive number, or its unit no length."""
    return _in_units(value, unit, MICROMETRES)


def seconds(value: object, unit: str | None) -> float | None:
    """Return a time in seconds; None if it is no positive number, or its unit no time."""
    return _in_units(value, unit, _TIMES)


def _in_units(value: object, unit: str | None, units: dict[str, float]) -> float | None:
    # ImageJ escapes the micro sign, and Unicode has a second one.
    name = (unit or "").strip().replace("\\u00B5", "µ").replace("μ", "µ").lower()
    try:
        number = float(value) * units[name]  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None
    return number if 0 < number < float("inf") else None


def regular_interval(times: Sequence[float]) -> float | None:
    """Return the median distance of time stamps, None unless all are within 1 % of it."""
    steps = np.diff(np.asarray(times, np.float64))
    if not steps.size or not np.isfinite(steps).all():
        return None
    median = float(np.median(steps))
    return median if median > 0 and np.abs(steps - median).max() <= 0.01 * median else None


def names_of(names: Sequence[str | None], count: int) -> tuple[str, ...]:
    """Return the names of ``count`` channels, "channel 0" and so on for those without."""
    if len(names) != count:
        names = [None] * count
    return tuple((name or "").strip() or f"channel {n}" for n, name in enumerate(names))
