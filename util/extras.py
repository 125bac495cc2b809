"""Packages that only one option needs, and that users install for it."""

from __future__ import annotations

import importlib.util


def require(flag: str, *packages: str) -> None:
    """Raise ValueError, with the command that installs them, unless the `packages` that a flag needs are there."""
    missing = [name for name in packages if not _is_there(name)]
    if missing:
        what = "another package" if len(missing) == 1 else "other packages"
        raise ValueError(f"{flag}: needs {what}: pip install {' '.join(missing)}")


def _is_there(name: str) -> bool:
    """Return whether a package is installed; a folder of the same name, such as W&B's files, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
