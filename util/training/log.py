"""What a run says: lines or a progress bar on the terminal, `log.txt`, TensorBoard, W&B."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from util.distributed import world
from util.training.record import Events, Lines
from util.training.wandb_run import WandbRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunLog:
    """Files and terminal of one run; silent in all processes but the first.

    Args:
        output_dir: where `log.txt` goes; None writes no files, for a run that only evaluates.
        log_dir: where TensorBoard's events go.
        start_epoch: lines of `log.txt` from this epoch on are dropped, because these epochs are run again.
        start_step: likewise TensorBoard's points from this step on.
        wandb_run: takes the same points.
    """

    def __init__(
        self,
        output_dir: Path | None,
        log_dir: Path | None = None,
        start_epoch: int = 0,
        start_step: int = 0,
        wandb_run: WandbRun | None = None,
    ):
        self._bar: tqdm | None = None
        self._said: set[str] = set()
        self._lines = self._events = None
        self._wandb_run = wandb_run
        if output_dir is None or not world.is_main():
            return
        self._lines = Lines(output_dir / "log.txt", lambda line: _epoch(line) < start_epoch)
        self._events = Events(log_dir, start_step)

    def say(self, text: str) -> None:
        """Write a line to the terminal."""
        if world.is_main():
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def say_once(self, text: str) -> None:
        """Write a line to the terminal, unless one that begins like it was there before."""
        if text.split(":")[0] not in self._said:
            self._said.add(text.split(":")[0])
            self.say(text)

    def progress(self, description: str, done: int, total: int, values: dict[str, float]) -> None:
        """Show the state of an epoch: a bar on a terminal, else a line."""
        if not world.is_main():
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
        """Write values to TensorBoard and W&B."""
        self._add("scalar", values, step)

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        """Write a histogram of `values` to TensorBoard and W&B."""
        self._add("histogram", {name: values}, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Write a figure to TensorBoard and W&B."""
        self._add("figure", {name: figure}, step)

    def _add(self, kind: str, values: dict[str, Any], step: int) -> None:
        if self._wandb_run is not None:  # before TensorBoard, which closes figures
            self._wandb_run.log(values, step)
        if self._events is not None:
            for name, value in values.items():
                self._events.add(kind, name, value, step)

    def epoch(self, values: dict[str, Any]) -> None:
        """Write one line of `log.txt`."""
        if self._lines is not None:
            self._lines.add(json.dumps(values))
            self._events.flush()

    def close(self, status: int = 0) -> None:
        """Flush and close; `status` is the exit status of the run."""
        if self._lines is not None:
            self._lines.write()
            self._events.close()
        if self._wandb_run is not None:
            self._wandb_run.finish(status)


def _epoch(line: str) -> float:
    """Return the epoch of a line of `log.txt`; infinity for a line that was cut off."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _short(value: float) -> str:
    return f"{value:.4g}"
