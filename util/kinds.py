"""Check values that come from a file: each must be of the kind that its name says."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Any

_LARGEST = 2**53  # no count of a training is larger, and floats hold it exactly


def check_kinds(where: Any, content: Mapping, kinds: Mapping[str, Any]) -> None:
    """Raise a ValueError, one sentence with file, name and value, for the first value that is not of its kind.

    Args:
        where: names the file.
        content: values by name. Absent ones and None are taken as not told.
        kinds: type hints by name: `int`, `float` (both finite, `int` below 2^53), `str`, `bool`, `dict`, `list[...]`,
            `dict[..., ...]`, `Literal`, and unions of them.
    """
    for name, kind in kinds.items():
        value = content.get(name)
        if value is not None and not fits(value, kind):
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise ValueError(f"{where}: its {name} is {shown}, and must be {_describe(kind)}")


def fits(value: Any, kind: Any) -> bool:
    """Return whether `value` is of a kind, as `check_kinds` has them."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(fits(name, parts[0]) and fits(item, parts[1]) for name, item in pairs)
    if origin is typing.Literal:
        return isinstance(value, str) and value in parts
    if parts:
        return any(fits(value, part) for part in parts)
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and abs(value) < _LARGEST if isinstance(value, int) else number and math.isfinite(value)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return f"a list, each item {_describe(parts[0])}"
    if origin is dict:
        return f"a dictionary, each value {_describe(parts[1])}"
    if origin is typing.Literal:
        return " or ".join(map(str, parts))
    if parts:
        return " or ".join(_describe(part) for part in parts if part is not type(None))
    names = {int: "a whole number below 2^53", float: "a finite number", str: "text", bool: "true or false"}
    return names.get(kind, "a dictionary" if kind is dict else kind.__name__)
