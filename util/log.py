"""What a run says: lines or a progress bar on the terminal, `log.txt`, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from util import dist
from util.record import Events, Lines


class Averages:
    """Running means and extremes that stay on the device until they are read.

    `add` never makes the host wait; `read` sums over all processes and waits once.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._sums: dict[str, torch.Tensor] = {}
        self._extremes: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1.0) -> None:
        """Count `total`, a sum of `count` values, into the mean `name`."""
        pair = torch.stack([self._scalar(total), self._scalar(count)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_range(self, name: str, values: torch.Tensor) -> None:
        """Count `values` (any shape) into the mean `name` and the extremes `name`_min and `name`_max."""
        values = values.detach().float()
        self.add(name, values.sum(), float(values.numel()))
        low, high = torch.aminmax(values)
        extremes = torch.stack([-low, high]).double()
        known = self._extremes.get(name)
        self._extremes[name] = extremes if known is None else torch.maximum(known, extremes)

    def merge(self, other: Averages) -> None:
        """Count everything that `other` has counted."""
        for name, pair in other._sums.items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        for name, pair in other._extremes.items():
            self._extremes[name] = torch.maximum(self._extremes[name], pair) if name in self._extremes else pair

    @staticmethod
    def merged(*parts: Averages) -> Averages:
        """One that has counted everything that `parts` have."""
        whole = Averages(parts[0].device)
        for part in parts:
            whole.merge(part)
        return whole

    def read(self) -> dict[str, float]:
        """All means and extremes over all processes."""
        if not self._sums:
            return {}
        sums = dist.all_reduce(torch.stack(list(self._sums.values()))).tolist()
        nothing = float("nan")
        result = {
            name: total / count if count else nothing for name, (total, count) in zip(self._sums, sums, strict=True)
        }
        if self._extremes:
            extremes = dist.all_reduce(torch.stack(list(self._extremes.values())), "max").tolist()
            for name, (low, high) in zip(self._extremes, extremes, strict=True):
                result |= {f"{name}_min": -low, f"{name}_max": high}
        return result

    def state(self) -> dict[str, dict[str, list[float]]]:
        """What was counted in all processes, as plain numbers. All processes call it together."""
        parts = {"sums": (self._sums, "sum"), "extremes": (self._extremes, "max")}
        found: dict[str, dict[str, list[float]]] = {}
        for part, (values, op) in parts.items():
            stacked = torch.stack(list(values.values())) if values else torch.zeros(0, 2, device=self.device)
            found[part] = dict(zip(values, dist.all_reduce(stacked.double(), op).tolist(), strict=True))
        return found

    def load(self, state: dict[str, dict[str, list[float]]]) -> None:
        """Count what `state` holds, once among all processes."""
        for name, pair in state.get("sums", {}).items():
            values = torch.tensor(pair if dist.is_main() else [0.0, 0.0], dtype=torch.float64, device=self.device)
            self._sums[name] = self._sums[name] + values if name in self._sums else values
        for name, pair in state.get("extremes", {}).items():
            self._extremes[name] = torch.tensor(pair, dtype=torch.float64, device=self.device)

    def _scalar(self, value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().to(self.device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.device)


class RunLog:
    """Files and terminal of one run; silent in all processes but the first.

    Args:
        output_dir: where `log.txt` goes; None writes no files, for a run that only evaluates.
        log_dir: where TensorBoard's events go.
        start_epoch: lines of `log.txt` from this epoch on are dropped, because these epochs are run again.
        start_step: likewise TensorBoard's points from this step on.
    """

    def __init__(self, output_dir: Path | None, log_dir: Path | None = None, start_epoch: int = 0, start_step: int = 0):
        self._bar: tqdm | None = None
        self._said: set[str] = set()
        self._lines = self._events = None
        if output_dir is None or not dist.is_main():
            return
        self._lines = Lines(output_dir / "log.txt", lambda line: _epoch(line) < start_epoch)
        self._events = Events(log_dir, start_step)

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if dist.is_main():
            with contextlib.suppress(OSError):  # a full disk, where it goes to a file
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def say_once(self, text: str) -> None:
        """A line on the terminal, unless one that begins like it was there before."""
        if text.split(":")[0] not in self._said:
            self._said.add(text.split(":")[0])
            self.say(text)

    def progress(self, description: str, done: int, total: int, values: dict[str, float]) -> None:
        """State of an epoch: a bar on a terminal, else a line."""
        if not dist.is_main():
            return
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if not sys.stderr.isatty():
            self.say(f"{description} [{done:>{len(str(total))}}/{total}]  {text}")
            return
        if self._bar is None:
            self._bar = tqdm(total=total, dynamic_ncols=True)
        self._bar.set_description(description)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Values for TensorBoard."""
        if self._events is not None:
            for name, value in values.items():
                self._events.add("scalar", name, value, step)

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """A histogram of `values` for TensorBoard."""
        if self._events is not None:
            self._events.add("histogram", name, values, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """A picture for TensorBoard."""
        if self._events is not None:
            self._events.add("figure", name, figure, step)

    def epoch(self, values: dict[str, Any]) -> None:
        """One line of `log.txt`."""
        if self._lines is not None:
            self._lines.add(json.dumps(values))
            self._events.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._lines is not None:
            self._lines.write()
            self._events.close()


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
        """`batches`, each waited for under the clock."""
        while True:
            start = self._now()
            batch = next(batches, None)
            self._waits.append((start, self._now()))
            if batch is None:
                return
            yield batch

    def read(self) -> tuple[float, float]:
        """Seconds waited, and all seconds, since the last call. The device must have been waited for."""
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
        """`images` divided by the seconds since the last call."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return images / max(seconds, 1e-9)


def _epoch(line: str) -> float:
    """The epoch of a line of `log.txt`; infinity for a line that was cut off."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _short(value: float) -> str:
    return f"{value:.4g}"
