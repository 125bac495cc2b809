"""The nearest valid name, for messages about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Share of two names that coincides: vit_mini and vit_mini_patch4 pass, local_rank and lr do not.
_ALIKE = 0.65


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known name most like `name`; empty if none is like it."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=_ALIKE)
    return f" (did you mean {found[0]!r}?)" if found else ""


def check_known(flag: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError that lists the known names, unless `name` is one of them."""
    known = list(known)
    if name not in known:
        raise ValueError(f"--{flag} {name}: unknown{nearest(name, known)}; available: {', '.join(known)}")
