"""The loop that every training epoch is: seed, learning rate, step, and now and then a line of the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from util import dist, lr_sched, seeding
from util.batches import StepLoader
from util.log import Averages, RunLog, Stopwatch

# (micro-batches as (is the last one, batch), averages to add to) -> (images, norm of the gradient)
TrainStep = Callable[[Iterator[tuple[bool, list]], Averages], tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class EpochLoop:
    """Runs the steps of an epoch.

    Attributes:
        loader: yields the micro-batches of each step.
        optimizer: gets its learning rate here.
        learning_rate: of the fractional epoch.
        device: where the averages live.
        seed: the random state of a step is a function of (seed, step, rank).
        log: where numbers go; None is silent.
        print_freq: steps between two lines; between them the host never waits for the device.
        shown: names of the averages on the terminal, besides the loss and the learning rate.
    """

    loader: StepLoader
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[float], float]
    device: torch.device
    seed: int = 0
    log: RunLog | None = None
    print_freq: int = 20
    shown: tuple[str, ...] = ("grad_norm",)

    def run(self, epoch: int, train_step: TrainStep) -> dict[str, float]:
        """Train for `epoch`; means of whatever `train_step` averaged, over the epoch and all processes.

        Raises:
            FloatingPointError: the loss or the gradient is not finite where a line is due.
        """
        total, window, clock, window_images = Averages(self.device), Averages(self.device), Stopwatch(), 0
        for step, micro_batches in self.loader.steps(epoch):
            global_step = epoch * len(self.loader) + step
            seeding.seed_step(self.seed, global_step, dist.rank())
            lr = self.learning_rate(epoch + step / len(self.loader))
            lr_sched.set_learning_rate(self.optimizer, lr)
            images, norm = train_step(micro_batches, window)
            window.add("lr", lr)
            window.add("grad_norm", norm)
            window_images += images
            if step % self.print_freq == 0 or step == len(self.loader) - 1:
                total.merge(window)
                values = window.read()
                values["images_per_s"] = clock.rate(window_images * dist.world_size())
                window.clear()
                window_images = 0
                self._report(values, epoch, step + 1)
        return total.read()

    def _report(self, values: dict[str, float], epoch: int, done: int) -> None:
        steps = len(self.loader)
        for name, what in (("loss", "loss"), ("grad_norm", "gradient's norm")):
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"the {what} is {values[name]} in epoch {epoch} at step {done} of {steps}; "
                    "lower --blr, add --clip_grad 1, or use --amp bf16 or none"
                )
        if self.log is not None:
            shown = ("loss", "lr", "images_per_s", *self.shown)
            self.log.progress(f"epoch {epoch}", done, steps, {name: values[name] for name in shown})
            self.log.scalars({f"train/{name}": value for name, value in values.items()}, epoch * steps + done)
