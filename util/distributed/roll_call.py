"""Which processes wait for the others, and which do not answer: told to the store where they met, asked at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as td

from util.distributed import world


class RollCall:
    """Counts the exchanges of all processes. All make theirs together, then meet, then `learn`.

    Args:
        store: where the processes met.
    """

    def __init__(self, store: td.Store):
        self._store, self._exchange = store, 0
        self._pids: list[int] = []
        store.set(f"pid_{world.rank()}", str(os.getpid()))

    def learn(self) -> None:
        """Read the others' process numbers, as long as the store answers."""
        self._pids = [int(self._store.get(f"pid_{number}")) for number in range(world.world_size())]

    def begin(self) -> None:
        """Begin another collective."""
        self._exchange += 1

    def announce(self) -> None:
        """Tell the store that this process waits in the present exchange."""
        _within(1.0, lambda: self._store.set(self._key(world.rank()), ""))

    def missing(self, seconds: float) -> list[int] | None:
        """Return who has not announced itself within `seconds`; None if the store, not of rank 0, does not answer."""
        found = _within(2 * seconds, lambda: self._ask(seconds))
        if found:
            return found[0]
        return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0]  # whose the store is

    def kill(self, number: int) -> None:
        """Send SIGKILL to process `number`, if it has the same parent as this one."""
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{self._pids[number]}/stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getppid():
                os.kill(self._pids[number], signal.SIGKILL)

    def _ask(self, seconds: float) -> list[int] | None:
        absent, end = [], time.monotonic() + seconds
        self._store.set(self._key(world.rank()), "")
        for number in range(world.world_size()):
            if number == world.rank():
                continue
            try:
                self._store.wait([self._key(number)], timedelta(seconds=max(end - time.monotonic(), 0.2)))
            except td.DistStoreError:
                absent.append(number)
            except td.DistNetworkError:  # the process of the store has asked already, and left
                return absent or None
        return absent

    def _key(self, number: int) -> str:
        return f"waiting_{number}_{self._pids[number]}_{self._exchange}"


def _within(seconds: float, action: Callable) -> list:
    """Return [what `action` returns], or [] if it fails or takes longer: the store's process may stand still."""
    found: list = []

    def run() -> None:
        with contextlib.suppress(td.DistError):
            found.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found
