"""The loop that every training epoch is: seed, learning rate, step, and now and then a line of the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from util import dist, lr_sched, seeding
from util.bad_pictures import BadPictures
from util.batches import StepLoader
from util.log import Averages, DataWait, RunLog, Stopwatch

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
        bad: the data set's bad pictures, counted with every line.
    """

    loader: StepLoader
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[float], float]
    device: torch.device
    seed: int = 0
    log: RunLog | None = None
    print_freq: int = 20
    shown: tuple[str, ...] = ("grad_norm",)
    bad: BadPictures | None = None

    def run(self, epoch: int, train_step: TrainStep) -> dict[str, float]:
        """Train for `epoch`; means of whatever `train_step` averaged, over the epoch and all processes.

        Raises:
            FloatingPointError: the loss or the gradient is not finite where a line is due.
        """
        total, window, clock, window_images = Averages(self.device), Averages(self.device), Stopwatch(), 0
        data_wait, data = DataWait(self.device), {}
        for step, micro_batches in self.loader.steps(epoch):
            global_step = epoch * len(self.loader) + step
            seeding.seed_step(self.seed, global_step, dist.rank())
            lr = self.learning_rate(epoch + step / len(self.loader))
            lr_sched.set_learning_rate(self.optimizer, lr)
            images, norm = train_step(data_wait.timed(micro_batches), window)
            window.add("lr", lr)
            window.add("grad_norm", norm)
            window_images += images
            if step % self.print_freq == 0 or step == len(self.loader) - 1:
                total.merge(window)
                values = window.read()
                values["images_per_s"] = clock.rate(window_images * dist.world_size())
                window.clear()
                window_images = 0
                data = self._data(data_wait, total)
                self._report(values | data, epoch, step + 1)
        return total.read() | {name: data[name] for name in data if name == "bad_images"}

    def _data(self, data_wait: DataWait, total: Averages) -> dict[str, float]:
        """What is to be said of the data since the last line. Processes must call it together."""
        waited, seconds = data_wait.read()
        total.add("data_wait", waited, seconds)
        share = waited / seconds
        if share > 0.25 and self.log is not None:
            self.log.say_once(self.loader.advice(share))
        return {"data_wait": share} | ({"bad_images": self.bad.collect(self.device)} if self.bad is not None else {})

    def _report(self, values: dict[str, float], epoch: int, done: int) -> None:
        steps = len(self.loader)
        for name, what in (("loss", "loss"), ("grad_norm", "gradient's norm")):
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"the {what} is {values[name]} in epoch {epoch} at step {done} of {steps}; "
                    "lower --blr, add --clip_grad 1, or use --amp bf16 or none"
                )
        if self.log is not None:
            shown = ("loss", "lr", "images_per_s", "data_wait", *self.shown)
            shown += ("bad_images",) if values.get("bad_images") else ()
            self.log.progress(f"epoch {epoch}", done, steps, {name: values[name] for name in shown})
            self.log.scalars({f"train/{name}": value for name, value in values.items()}, epoch * steps + done)
