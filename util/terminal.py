"""Make the standard streams safe to print to: no line that cannot be written ends a training."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def protect() -> None:
    """Make printing never fail: what a full disk, a closed pipe or a closed stream refuses is dropped.

    Letters that the stream's encoding lacks are escaped. Covers everything that prints through `sys.stdout` and
    `sys.stderr`: warnings, tqdm, tracebacks, and loader workers. A stream that a caller has replaced stays as it is.
    """
    for descriptor in range(3):  # else the next file that is opened, perhaps a checkpoint, becomes standard error
        with contextlib.suppress(OSError):
            _keep_open(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115 (until the process ends)
        elif stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            setattr(sys, name, _protected(descriptor, stream))


def _keep_open(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _protected(descriptor: int, stream: io.TextIOWrapper) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_Raw(descriptor, "w", closefd=False))
    how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", **how)


class _Raw(io.FileIO):
    """A descriptor that seems to take what it refuses, so that no buffer above it keeps it and tries again at exit."""

    def write(self, data) -> int:
        """Write `data`; return its length, whatever became of it."""
        with contextlib.suppress(OSError):
            written = super().write(data)
            return len(data) if written is None else written
        return len(data)
