"""Time several contenders in one process, turn by turn, so that their ratios hold on a noisy machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def add_clock_flag(parser: argparse.ArgumentParser) -> None:
    """Add --clock, a name among `CLOCKS`."""
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: for a machine that others use too"
    )


def interleave(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Measure the seconds per call of each contender, one entry per round.

    Every round calls each contender `repeats` times in a row; the order rotates from round to round. The device is
    waited for before and after. `time.process_time` as the clock counts the processor's time only, which other
    programs on the machine disturb less; threads add up.
    """
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            wait_for_device()
            start = clock()
            for _ in range(repeats):
                contenders[name]()
            wait_for_device()
            seconds[name].append((clock() - start) / repeats)
    return seconds


def wait_for_device() -> None:
    """Return when the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Take median, smallest and largest of at least one value."""
        return Spread(median(values), min(values), max(values))

    def format(self, digits: int = 3) -> str:
        """Return `median (low..high)` with that many significant digits."""
        return f"{short(self.median, digits)} ({short(self.low, digits)}..{short(self.high, digits)})"


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> Spread:
    """Return how many times longer `name` takes than `reference`, paired round by round."""
    return Spread.of([a / b for a, b in zip(seconds[name], seconds[reference], strict=True)])


def short(value: float, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, never in scientific notation where it can be avoided."""
    if value and abs(value) >= 10**digits:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"
