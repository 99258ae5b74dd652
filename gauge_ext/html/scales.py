"""From numbers to places on an axis, and the numbers to write beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """An axis from ``low`` to ``high``.

    Attributes:
        low: The number at its beginning.
        high: The number at its end, above ``low``.
        log: Whether equal steps are equal ratios; both ends are then positive.
        ticks: The numbers to write beside it.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Where a number lies, as a share of the axis in [0, 1]; beyond its ends, at them."""
        low, high = self.low, self.high
        if self.log:
            if value <= 0:
                return 0.0
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return min(1.0, max(0.0, (value - low) / (high - low)))


def scale(values: Sequence[float], *, log: bool = False, zero: bool = False) -> Scale:
    """An axis that holds all finite values, with ends at round numbers.

    Args:
        values: What it has to hold; a log axis leaves out what is not positive.
        log: Whether it is logarithmic.
        zero: Whether a linear one begins at 0 where no value is below it.
    """
    found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if log:
        low, high = (min(found), max(found)) if found else (0.1, 1.0)
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        every = max(1, math.ceil((last - first) / 6))
        ticks = tuple(10.0**power for power in range(first, last + 1, every))
        return Scale(10.0**first, 10.0**last, True, ticks)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - (0.0 if zero else abs(low) or 1.0), high + (abs(high) or 1.0)
    step = _round_step((high - low) / 5)
    begin, end = math.floor(low / step), math.ceil(high / step)
    return Scale(begin * step, end * step, False, tuple(k * step for k in range(begin, end + 1)))


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((m * power for m in (1.0, 2.0, 5.0) if m * power >= rough), 10.0 * power)


def number(value: float) -> str:
    """A number in few characters: 0.25, 1,024, 3.1e-07, nan."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "nan"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
