"""Read a file of `torch.save` without importing or calling anything that it names."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch


def unpickle(path: str | Path, *, mmap: bool = False) -> Any:
    """Read `path` on the CPU with `torch.load(weights_only=True)`.

    What else stands in published files is allowed, too: `argparse.Namespace`, paths, which become text, and numpy's
    scalars, which become Python's. Each of these names leads to a harmless class or function of this module, so that
    numpy and pathlib do not see the file.

    Raises:
        ValueError: names the class that is not allowed, or says why the file cannot be read.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what a damaged file raises depends on the damaged byte
        refused = _refused_names(path)
        if refused:
            raise ValueError(
                f"{path}: holds an object of {refused[0]}, and loading it would run code that the file chooses; "
                "save it again with tensors, numbers, text, lists and dictionaries only"
            ) from error
        raise ValueError(
            f"{path}: damaged, or not a PyTorch checkpoint of only tensors, numbers, text, lists and dictionaries"
            f"{_reason(error)}"
        ) from error


def find_damage(path: str | Path) -> str:
    """Say what is wrong with a file of `torch.save`, by the checksums that it holds; empty if nothing is.

    `torch.load` does not compare them. Nothing is read of an archive that would unpack to more than its own size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                return (
                    "compressed, and could unpack to any size; save it again with torch.save, which does not compress"
                )
            if sum(member.file_size for member in members) > Path(path).stat().st_size:
                return "its parts are larger than the file"
            broken = archive.testzip()
    except Exception as error:  # what a damaged file raises depends on the damaged byte
        return str(error) or type(error).__name__
    return f"wrong checksum of {broken}" if broken else ""


class _NumpyType:
    """Stands for `numpy.dtype` in a file: the letter and size of a scalar, and its byte order."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _numpy_scalar(kind: _NumpyType, content: bytes) -> complex | str | bytes:
    if not re.fullmatch(r"[<>=|][biufcSU]\d+", kind.order + kind.code):
        raise pickle.UnpicklingError("an object of numpy that is neither a number nor text")
    return np.frombuffer(content, kind.order + kind.code).item()


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


_HARMLESS: list = [argparse.Namespace, (_NumpyType, "numpy.dtype")]
_HARMLESS += [(_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
for _module in ("pathlib", "pathlib._local"):  # the second is where Python 3.13 keeps them
    _HARMLESS += [(_posix_path, f"{_module}.{name}") for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")]
    _HARMLESS += [(_windows_path, f"{_module}.{name}") for name in ("WindowsPath", "PureWindowsPath")]


def _refused_names(path: str | Path) -> list[str]:
    """Return the names of classes and functions in a file that may not be loaded; none if they cannot be told."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a file of torch.save, or of before PyTorch 1.6
        return []


def _reason(error: Exception) -> str:
    """Return the first line of an error in brackets; torch's advice to load without `weights_only` is none."""
    lines = str(error).strip().splitlines()
    return f" ({lines[0][:160]})" if lines and not isinstance(error, pickle.UnpicklingError) else ""
