"""When a run's checkpoints are written, which are kept, and what happens if that fails."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from util.files import flush_folder
from util.training import checkpoint, record


class Saver:
    """Writes checkpoints beside the training, so that at any moment a whole and finite one is on disk.

    `checkpoint-new.pth` is written to a temporary file, flushed and read back; then `checkpoint-last.pth` becomes
    `checkpoint-previous.pth` and the new one takes its name.

    Args:
        folder: where they go.
        every_minutes: between two of `checkpoint-last.pth` within an epoch.
        keep_last: how many `checkpoint-{epoch}.pth` stay; None keeps all.
    """

    def __init__(self, folder: Path, every_minutes: float, keep_last: int | None):
        self.folder, self.keep_last = folder, keep_last
        self._every_s = 60 * every_minutes
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._failure: OSError | None = None
        self._owed: tuple[dict, int] | None = None  # one to keep that could not be written, and its number
        self._given_up: int | None = None
        self._last_is_whole = False  # until this process has written it, or looked
        self._next = time.monotonic() + self._every_s

    def due(self) -> bool:
        """Return whether it is time for another; a minute after one that could not be written, it is."""
        if self._pending is not None and self._pending.done():
            self.wait()
        return time.monotonic() >= self._next

    def save(self, content: dict, keep_as: int | None = None) -> None:
        """Copy `content` and write it in the background, also as `checkpoint-{keep_as}.pth`.

        A failure is told and tried again a minute later. One to keep is held until it can be written, before the next;
        only one, because it takes as much memory as the training's state.

        Raises:
            FloatingPointError: a weight is not finite; what is on disk stays.
        """
        copied = _to_host(content)
        bad = first_not_finite(copied["model"])
        if bad:
            raise FloatingPointError(f"{bad} is not finite; the checkpoint before it stays")
        self.wait()
        self._next = time.monotonic() + self._every_s
        self._pending = self._writer.submit(self._write, copied, keep_as)

    def wait(self) -> None:
        """Wait until the last one is on disk, or has failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._failure = None
        except OSError as error:
            self._failure = error
            self._next = min(self._next, time.monotonic() + record.RETRY_S)
            first = "" if self._owed is None else f", checkpoint-{self._owed[1]}.pth first"
            lost = "" if self._given_up is None else f"; checkpoint-{self._given_up}.pth is given up"
            self._given_up = None
            record.warn(
                f"no checkpoint could be written ({error}); training goes on, and tries again in a minute{first}{lost}"
            )

    def finish(self) -> str:
        """Wait, and write no more. What is to be said if the last one could not be written, else nothing."""
        self.wait()
        self._writer.shutdown()
        if self._failure is None:
            return ""
        return (
            f"error: --output_dir {self.folder}: the last checkpoint could not be written ({self._failure}); "
            "make room or mend the disk, and run the same command again"
        )

    def _write(self, content: dict, keep_as: int | None) -> None:
        """Write what is owed, then `content`."""
        try:
            if self._owed is not None:
                self._write_one(*self._owed)
                self._owed = None
            self._write_one(content, keep_as)
        except OSError:
            if keep_as is not None:
                self._given_up = None if self._owed is None else self._owed[1]
                self._owed = content, keep_as
            raise

    def _write_one(self, content: dict, keep_as: int | None) -> None:
        new = self.folder / "checkpoint-new.pth"
        checkpoint.save(new, content)
        if keep_as is not None:  # before there is a last that would not write it again
            _link(new, self.folder / f"checkpoint-{keep_as}.pth")
        last = self.folder / checkpoint.LAST
        if last.exists() and (self._last_is_whole or not checkpoint.find_damage(last)):
            os.replace(last, self.folder / checkpoint.PREVIOUS)  # a damaged one does not replace the one before it
        os.replace(new, last)
        self._last_is_whole = True
        if keep_as is not None:
            self._prune()
        flush_folder(self.folder)

    def _prune(self) -> None:
        if self.keep_last is not None:
            for _, path in sorted(checkpoint.kept_checkpoints(self.folder))[: -self.keep_last]:
                path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Give `target` the content of `source`, whole or not at all; without copying where the file system can."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)


def _to_host(content: Any) -> Any:
    """Return a copy that later steps do not change."""
    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _to_host(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_to_host(value) for value in content)
    return content


def first_not_finite(state: dict[str, torch.Tensor]) -> str:
    """Return the name of the first tensor that holds NaN or infinity; empty if none does."""
    floating = ((name, tensor) for name, tensor in state.items() if tensor.is_floating_point())
    return next((name for name, tensor in floating if not tensor.isfinite().all()), "")
