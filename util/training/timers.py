"""Clocks of the training loop: waiting for data, images per second."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch


class DataWait:
    """Time in which the device had nothing to do because the next batch was not there.

    On a GPU the host runs ahead, and its waiting costs nothing while the device is busy. Events on the device's own
    queue, before and after, see only the waiting that reached it.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._waits: list[tuple] = []
        self._start = time.perf_counter()

    def timed(self, batches: Iterator) -> Iterator:
        """Yield `batches`, each waited for under the clock."""
        while True:
            start = self._now()
            batch = next(batches, None)
            self._waits.append((start, self._now()))
            if batch is None:
                return
            yield batch

    def read(self) -> tuple[float, float]:
        """Return seconds waited, and all seconds, since the last call. The device must have been waited for."""
        now = time.perf_counter()
        waited = sum(a.elapsed_time(b) / 1000 if self._on_gpu else b - a for a, b in self._waits)
        seconds, self._start, self._waits = now - self._start, now, []
        return waited, max(seconds, 1e-9)

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stopwatch:
    """Images per second since it was last read."""

    def __init__(self):
        self._start = time.perf_counter()

    def rate(self, images: float) -> float:
        """Return `images` divided by the seconds since the last call."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return images / max(seconds, 1e-9)
