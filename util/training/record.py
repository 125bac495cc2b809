"""What a run leaves besides its checkpoints: log.txt and TensorBoard's events. A disk that refuses does not end it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from util.files import write_whole

RETRY_S = 60.0


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Lines:
    """A text file that grows line by line. Lines that cannot be written are written with the next one.

    Args:
        path: of the file.
        keep: which of its present lines stay.

    Raises:
        OSError: what stands there is not a file, or cannot be read.
    """

    def __init__(self, path: Path, keep: Callable[[str], bool]):
        self._path, self._waiting, self._good_size = path, "", None
        if path.exists() and not path.is_file():  # a pipe that nobody reads would be waited for
            raise FileExistsError(errno.EEXIST, "it is not a file", str(path))
        if path.is_file():
            kept = [line for line in path.read_text("utf-8", "replace").splitlines() if keep(line)]
            write_whole(path, "".join(line + "\n" for line in kept))

    def add(self, line: str) -> None:
        """Append `line`."""
        self._waiting += line + "\n"
        self.write()

    def write(self) -> None:
        """Write what is waiting, if anything is."""
        if not self._waiting:
            return
        try:
            with open(self._path, "ab", buffering=0) as file:
                if self._good_size is not None:
                    file.truncate(self._good_size)  # the last attempt may have left a part of a line
                self._good_size = file.seek(0, 2)
                data = self._waiting.encode()
                if file.write(data) < len(data):
                    raise OSError(f"{self._path}: no room for a line")
        except OSError as error:
            warn(f"{self._path} could not be written ({error.strerror or error}); training goes on, and tries again")
            return
        self._waiting, self._good_size = "", None


class Events:
    """TensorBoard's points. Those that cannot be written are lost, with one warning; a minute later it tries again.

    Args:
        folder: where they go.
        start_step: points after it that are there already are not shown any more, because these steps are run again.
    """

    def __init__(self, folder: Path, start_step: int):
        self._folder, self._purge_step = folder, start_step + 1 if start_step else 0
        self._writer, self._again = None, 0.0
        self._do(lambda writer: None)

    def add(self, kind: str, name: str, value: Any, step: int) -> None:
        """Add a `scalar`, `histogram` or `figure` at a step."""
        self._do(lambda writer: getattr(writer, f"add_{kind}")(name, value, step))

    def flush(self) -> None:
        """Write what is buffered."""
        self._do(lambda writer: writer.flush())

    def close(self) -> None:
        """Write what is buffered, and write no more."""
        if self._writer is not None:
            self._do(lambda writer: writer.close())

    def _do(self, action: Callable[[Any], None]) -> None:
        if self._writer is not None:
            try:
                action(self._writer)
                return
            except OSError:  # of an earlier write: a thread does them; there may be room again
                self._drop()
        elif time.monotonic() < self._again:
            return
        try:
            self._writer = self._open()
            action(self._writer)
            self._writer.flush()
        except OSError as error:
            warn(f"--log_dir {self._folder}: no points for TensorBoard ({error.strerror or error}); training goes on")
            self._again = time.monotonic() + RETRY_S
            self._drop()

    def _drop(self) -> None:
        lost, self._writer = self._writer, None
        if lost is not None:
            with contextlib.suppress(OSError):
                lost.close()

    def _open(self):
        from torch.utils.tensorboard import SummaryWriter  # a second, which evaluations need not wait for

        _silence_writer_threads()
        if not self._folder.is_dir():  # a disk that went away: the writer would make the folder where it was
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        self._purge_step = None  # not again, where one is opened after a disk was full: these points are this run's
        return writer


@functools.cache
def _silence_writer_threads() -> None:
    """Keep TensorBoard's thread from printing a failed write, which it also reports to its writer."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    print_it = threading.excepthook

    def hook(details) -> None:
        if not (isinstance(details.thread, _AsyncWriterThread) and isinstance(details.exc_value, OSError)):
            print_it(details)

    threading.excepthook = hook
