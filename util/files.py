"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary binary file beside `path` that takes its name when the block ends without an error.

    Until then, and after an error, `path` stays as it was. The temporary file's name ends in `.tmp` and is the same
    every time, so that what a kill leaves behind is overwritten by the next attempt.

    Args:
        path: the file to replace or create; its folder exists.
        durable: flush the file and its folder to the disk, so that it survives a power cut.

    Raises:
        OSError: it could not be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    if durable:
        flush_folder(path.parent)


def write_whole(path: str | Path, content: bytes | str, *, durable: bool = False) -> None:
    """Write `content` to `path`, whole or not at all; text as UTF-8. OSError: it could not be written."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def flush_folder(folder: str | Path) -> None:
    """Flush the renames in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expand_home(path: str) -> str:
    """Return `path` with a leading `~` or `~user` expanded. ValueError: there is no such home folder."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"{path}: there is no such home folder; write ./{path} for a folder of this name")
    return expanded
