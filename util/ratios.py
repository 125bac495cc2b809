"""Ratios as people write them, as exact fractions."""

from __future__ import annotations

import re
from fractions import Fraction

_FRACTION = re.compile(r"\s*(\d{1,18})\s*/\s*(\d{1,18})\s*", re.ASCII)


def exact_ratio(value: float | str | Fraction, name: str = "ratio") -> Fraction:
    """Return the number that the user wrote, exactly: 0.7 is 7/10, "32/49" is 32/49.

    Args:
        value: a number, or text that is a decimal or a fraction of two whole numbers.
        name: what the message calls it.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, Fraction):
        return value
    fraction = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    try:
        if fraction:
            return Fraction(int(fraction[1]), int(fraction[2]))
        if not isinstance(value, bool):
            return Fraction(repr(float(value)))  # the shortest decimal that is this float: what was written
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        pass
    raise ValueError(f"{name} {value}: must be a number, such as 0.75, or a fraction, such as 32/49")
