"""Ratios in exact arithmetic, as the user wrote them."""

from __future__ import annotations

import math
from fractions import Fraction


def exact_ratio(value: float | int | str | Fraction) -> Fraction:
    """Return the number that the user wrote: 0.7 is 7/10, not the nearest binary number; "32/49" is exact.

    Raises:
        ValueError: not a finite number, or a fraction that divides by zero.
    """
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    try:
        return Fraction(str(value).replace(" ", ""))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{value!r} is not a number; write 0.65 or a fraction such as 32/49") from error
