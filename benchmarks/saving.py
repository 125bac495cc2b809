"""`scripts/benchmark.py save`: what a checkpoint costs the training that goes on while it is written."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import masking
from benchmarks import report
from benchmarks.contenders import Ours
from benchmarks.timing import Spread, wait_for_device
from benchmarks.training import MODELS
from util import cli, precision
from util.config import PretrainSettings
from util.training import checkpoint
from util.training.saver import Saver


def main(argv: list[str]) -> None:
    """Time the same number of steps without and with a checkpoint, in turns."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark.py save", description=main.__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["base"])
    parser.add_argument("--batch_size", type=int, default=256 if gpu else 8)
    parser.add_argument("--steps", type=int, default=40 if gpu else 8, help="should last longer than a write")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=cli.path_text, help="on the disk to measure; default: the one for temporary files"
    )
    parser.add_argument("--json", type=cli.path_text, help="file for the numbers")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if gpu else "cpu")
    environment = report.environment()
    print("  ".join(f"{name} {value}" for name, value in environment.items()))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [measure(name, arguments, device, Path(folder)) for name in arguments.models]
    print(report.table(rows))
    if arguments.json:
        report.write_json(arguments.json, {"environment": environment, "rows": rows})


def measure(name: str, arguments: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, object]:
    """Return a row: what the training waits for, how long writing takes, and how much longer all steps take."""
    ours = Ours(MODELS[name], device, precision.resolve_amp(None, device))
    step = ours.contender(torch.randn(arguments.batch_size, 3, 224, 224, device=device), masking.create("sbam")).step
    saver = Saver(folder, every_minutes=10, keep_last=None)

    def steps() -> None:
        for _ in range(arguments.steps):
            step()
        wait_for_device()

    def steps_and_checkpoint() -> None:
        start = time.perf_counter()
        saver.save({"model": ours.model.state_dict(), "optimizer": ours.optimizer.state_dict(), "step": 1})
        waited.append(time.perf_counter() - start)
        steps()
        saver.wait()

    waited: list[float] = []
    seconds(steps), seconds(steps_and_checkpoint)  # the first time is another
    waited.clear()
    without, extra = [], []
    for _ in range(arguments.rounds):
        without.append(seconds(steps))
        extra.append(seconds(steps_and_checkpoint) - without[-1])
    alone = []
    for _ in range(3):
        saver.save({"model": ours.model.state_dict(), "optimizer": ours.optimizer.state_dict(), "step": 1})
        alone.append(seconds(saver.wait))
    saver.finish()
    every_s = 60 * PretrainSettings().save_every_minutes
    return {
        "model": name,
        "checkpoint, GB": f"{(folder / checkpoint.LAST).stat().st_size / 1e9:.2f}",
        "the steps wait, s": Spread.of(waited).format(),
        "writing alone, s": Spread.of(alone).format(),
        "steps without, s": Spread.of(without).format(),
        "longer with one, s": Spread.of(extra).format(),
        f"of the time, one every {every_s / 60:.0f} min": f"{Spread.of(extra).median / every_s:.2%}",
    }


def seconds(call: Callable[[], object]) -> float:
    """Return how long `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
