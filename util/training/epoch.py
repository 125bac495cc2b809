"""The loop that every training epoch is: data, seed, learning rate, step, and now and then a line of the log."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from util import lr_sched, seeding
from util.data.bad_images import BadImages
from util.data.step_loader import MicroBatch, StepLoader
from util.distributed import world
from util.distributed.signals import Interrupted, Signals
from util.training import loading
from util.training.averages import Averages
from util.training.log import RunLog
from util.training.step import GradientStep, StepOutcome
from util.training.timers import DataWait, Stopwatch

TrainStep = Callable[[list[MicroBatch], Averages], StepOutcome]  # (micro-batches, averages to add to)


@dataclass
class EpochLoop:
    """Runs the steps of an epoch.

    Attributes:
        loader: yields the micro-batches of each step.
        optimizer: gets its learning rate here.
        learning_rate: of the fractional epoch.
        device: where the averages live.
        before_step: (epoch, step, averages of the epoch so far, whether a signal ended the waiting for data, why no
            data came, or nothing); may save, and may leave.
        save_now: (epoch, step, averages of the epoch so far), and wait until it is on disk.
        signals: end the waiting for data.
        seed: the random state of a step is a function of (seed, step, rank).
        log: where numbers go; None is silent.
        print_freq: steps between two lines; between them the host never waits for the device.
        shown: names of the averages on the terminal, besides the loss and the learning rate.
        bad: the data set's bad pictures, counted with every line.
        max_skipped_steps: in a row; more end the run.
        data_timeout_s: longest wait for data.
        start_step, start_averages: where the first epoch begins, and what was averaged before.
        averages: of the last whole epoch.
    """

    loader: StepLoader
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[float], float]
    device: torch.device
    before_step: Callable[[int, int, Callable[[], Averages], bool, str], None]
    save_now: Callable[[int, int, Averages], None]
    signals: Signals
    seed: int = 0
    log: RunLog | None = None
    print_freq: int = 20
    shown: tuple[str, ...] = ("grad_norm",)
    bad: BadImages | None = None
    max_skipped_steps: int = 10
    data_timeout_s: float = 1800.0
    start_step: int = 0
    start_averages: dict = field(default_factory=dict)
    averages: Averages | None = field(init=False, default=None)

    def run(self, epoch: int, update: GradientStep, train_step: TrainStep) -> dict[str, float]:
        """Train for `epoch`; means of whatever `train_step` averaged, over the epoch and all processes."""
        total, window, clock = Averages(self.device), Averages(self.device), Stopwatch()
        window_images = window_steps = 0
        data_wait, suspects = DataWait(self.device), []
        total.load(self.start_averages)
        start, self.start_step, self.start_averages, reported = self.start_step, 0, {}, False
        steps, num_steps = self.loader.steps(epoch, start), len(self.loader)
        for step in range(start, num_steps):
            micro_batches, interrupted, lost = self._fetch(steps, data_wait)
            self.before_step(epoch, step, functools.partial(Averages.merged, total, window), interrupted, lost)
            seeding.seed_step(self.seed, epoch * num_steps + step, world.rank())
            lr = self.learning_rate(epoch + step / num_steps)
            lr_sched.set_learning_rate(self.optimizer, lr)
            outcome = train_step(micro_batches, window)
            suspects.append(([i for batch in micro_batches for i in batch.indices], outcome.loss))  # not the pictures
            self._count(window, lr, outcome)
            window_images, window_steps = window_images + outcome.images, window_steps + 1
            if step % self.print_freq == 0 or step == num_steps - 1:
                total.merge(window)
                values = _read(window, window_steps)
                values["images_per_s"] = clock.rate(window_images * world.world_size())
                window.clear()
                window_images = window_steps = 0
                self._report(values | self._data(data_wait, total, reported), epoch, step + 1)
                reported = True
                if update.most_skipped_in_a_row > self.max_skipped_steps:
                    self._give_up(epoch, step + 1, total, update, suspects)
                suspects.clear()
        self.averages = total
        return _read(total, num_steps) | self._bad_images()

    def _fetch(self, steps, data_wait: DataWait) -> tuple[list[MicroBatch], bool, str]:
        """Return all micro-batches of the next step; whether a signal ended the waiting for them; why they are lost."""
        try:
            with self.signals.waiting_for(self.loader.awaited, self.data_timeout_s):
                return list(data_wait.timed(next(steps)[1])), False, ""
        except Interrupted:
            return [], True, ""
        except loading.ERRORS as error:
            self.loader.close()  # memory and file descriptors for the checkpoint
            return [], False, loading.describe(error)

    def _count(self, window: Averages, lr: float, outcome: StepOutcome) -> None:
        window.add("lr", lr)
        window.add("grad_norm", outcome.norm, 1 - outcome.skipped.double())
        window.add("skipped_steps", outcome.skipped)

    def _data(self, data_wait: DataWait, total: Averages, advise: bool) -> dict[str, float]:
        """What is to be said of the data since the last line. Processes must call it together.

        No advice for an epoch's first line: its step waited for the workers to start or to fill up again.
        """
        waited, seconds = data_wait.read()
        total.add("data_wait", waited, seconds)
        share = waited / seconds
        if advise and share > 0.25 and self.log is not None:
            self.log.say_once(self.loader.advice(share))
        return {"data_wait": share} | self._bad_images()

    def _bad_images(self) -> dict[str, int]:
        return {"bad_images": self.bad.collect(self.device)} if self.bad is not None else {}

    def _report(self, values: dict[str, float], epoch: int, done: int) -> None:
        if self.log is not None:
            shown = ("loss", "lr", "images_per_s", "data_wait", *self.shown)
            shown += tuple(name for name in ("bad_images", "skipped_steps") if values.get(name))
            steps = len(self.loader)
            self.log.progress(f"epoch {epoch}", done, steps, {name: values[name] for name in shown})
            self.log.scalars({f"train/{name}": value for name, value in values.items()}, epoch * steps + done)

    def _give_up(self, epoch: int, step: int, total: Averages, update: GradientStep, suspects: list) -> NoReturn:
        """Too many steps in a row were skipped: save the weights, which they left alone, and say whose loss."""
        self.save_now(epoch, step, total)
        indices = [i for found, loss in suspects if not loss.isfinite() for i in found]
        names = ", ".join(map(self.loader.dataset.name, indices[:16])) + (", ..." if len(indices) > 16 else "")
        where = f"the loss of rank {world.rank()} was not finite on {names}" if indices else ""
        if world.is_main():
            print(
                f"error: {update.most_skipped_in_a_row} steps in a row were skipped, more than --max_skipped_steps "
                f"{self.max_skipped_steps}, because loss or gradient was not finite (epoch {epoch}, step {step}); "
                "the checkpoint holds the weights from before them: lower --blr, add --clip_grad 1, or use --amp bf16 "
                "or none, and run it again; if they have diverged already, --resume an earlier one in another folder",
                file=sys.stderr,
            )
        if where:
            print(where, file=sys.stderr, flush=True)
        raise SystemExit(1)


def _read(averages: Averages, steps: int) -> dict[str, float]:
    """The means, and how many of these `steps` were skipped."""
    values = averages.read()
    return values | {"skipped_steps": round(values.get("skipped_steps", 0.0) * steps)}
