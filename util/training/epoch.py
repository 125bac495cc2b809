"""The epochs and steps that are left of a training, as iterators: data, seed and schedules before each step."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from util import lr_sched, seeding
from util.data.step_loader import MicroBatch, StepLoader
from util.distributed import world
from util.distributed.signals import Interrupted
from util.training import loading
from util.training.averages import Averages
from util.training.context import Context
from util.training.leaving import Exits
from util.training.state import TrainingState
from util.training.step import At, StepOutcome
from util.training.timers import DataWait, Stopwatch
from util.training.whole_set import WholeSet


@dataclass
class Step:
    """One optimizer step to take.

    Attributes:
        at: where the run stands.
        micro_batches: its data in this process, on the host.
        averages: what the log says of the steps since its last line.
    """

    at: At
    micro_batches: list[MicroBatch]
    averages: Averages
    _job: Job

    def done(self, outcome: StepOutcome) -> None:
        """Count the step, log now and then, and give up after too many skipped steps."""
        self._job.count(self, outcome)


@dataclass
class _Counts:
    """What is counted within an epoch.

    Attributes:
        total, window: averages up to the last line of the log, and since.
        images, steps: since that line.
        suspects: (numbers of the images, loss) of each step since that line.
    """

    epoch: int
    total: Averages
    window: Averages
    wait: DataWait
    clock: Stopwatch = field(default_factory=Stopwatch)
    images: int = 0
    steps: int = 0
    suspects: list = field(default_factory=list)
    reported: bool = False


class Job:
    """A started training.

    Args:
        context, state: of the run.
        shown: names of the averages on the terminal, besides the loss and the learning rate.

    Attributes:
        exits: how it saves and leaves.
        averages: of the last whole epoch.
    """

    def __init__(self, context: Context, state: TrainingState, shown: tuple[str, ...] = ("grad_norm",)):
        self.context, self.state, self.shown = context, state, shown
        self.loader: StepLoader = state.loader
        self.exits = Exits(context, state)
        self.averages: Averages | None = None
        self._decayed = [group for group in state.optimizer.param_groups if group.get("weight_decay")]

    def epochs(self) -> Iterator[int]:
        """Return the epochs that are left."""
        return iter(range(self.state.start_epoch, self.context.settings.last_epoch + 1))

    def steps(self, epoch: int) -> Iterator[Step]:
        """Yield the steps that are left of `epoch`; each must be `done` before the next is asked for."""
        device, num_steps, state = self.context.device, len(self.loader), self.state
        self._now = now = _Counts(epoch, Averages(device), Averages(device), DataWait(device))
        now.total.load(state.start_averages)
        start, state.start_step, state.start_averages = state.start_step, 0, {}
        batches = self.loader.steps(epoch, start)
        so_far = functools.partial(Averages.merged, now.total, now.window)
        for step in range(start, num_steps):
            micro_batches, interrupted, lost = self._fetch(batches, now.wait)
            self.exits.before_step(epoch, step, so_far, interrupted, lost)
            at = At(epoch * num_steps + step, epoch + step / num_steps, self.context.settings.epochs)
            seeding.seed_step(self.context.settings.seed, at.step, world.rank())
            self._schedule(at, now.window)
            yield Step(at, micro_batches, now.window, self)
        self.averages = now.total

    def after(self, epoch: int) -> At:
        """Return where the run stands after the steps of `epoch`."""
        return At((epoch + 1) * len(self.loader), epoch + 1.0, self.context.settings.epochs)

    def whole_set(self, epoch: int) -> WholeSet:
        """Return all training images, to look at after the steps of `epoch`."""
        return WholeSet(self.context, self.exits, self.loader.dataset, len(self.loader), epoch, self.averages)

    def means(self) -> dict[str, float]:
        """Return the means of the last whole epoch over all processes."""
        return _read(self.averages, len(self.loader)) | {"bad_images": self._count_bad(self._now, len(self.loader))}

    def _fetch(self, batches: Iterator, wait: DataWait) -> tuple[list[MicroBatch], bool, str]:
        """Return all micro-batches of the next step; whether a signal ended the waiting for them; why they are lost."""
        try:
            with self.context.signals.waiting_for(self.loader.awaited, self.context.settings.dist_timeout):
                return list(wait.timed(next(batches)[1])), False, ""
        except Interrupted:
            return [], True, ""
        except loading.ERRORS as error:
            self.loader.close()  # memory and file descriptors for the checkpoint
            return [], False, loading.describe(error)

    def _schedule(self, at: At, window: Averages) -> None:
        """Set the learning rate and the weight decay of the step."""
        scheduled = self.context.learning_rate(at.epoch)
        lr, weight_decay = self.state.method.schedule(at, scheduled, self.context.settings.weight_decay)
        lr_sched.set_learning_rate(self.state.optimizer, lr)
        for group in self._decayed:
            group["weight_decay"] = weight_decay
        window.add("lr", lr)

    def count(self, step: Step, outcome: StepOutcome) -> None:
        """Count a step; write a line of the log every `print_freq` steps and after the last one of the epoch."""
        now, number = self._now, step.at.step % len(self.loader)
        now.window.add("grad_norm", outcome.norm, 1 - outcome.skipped.double())
        now.window.add("skipped_steps", outcome.skipped)
        now.suspects.append(([i for batch in step.micro_batches for i in batch.indices], outcome.loss))
        now.images, now.steps = now.images + outcome.images, now.steps + 1
        if number % self.context.settings.print_freq and number != len(self.loader) - 1:
            return
        now.total.merge(now.window)
        values = _read(now.window, now.steps)
        values["images_per_s"] = now.clock.rate(now.images * world.world_size())
        now.window.clear()
        self._report(values | self._data(now, number + 1), now.epoch, number + 1)
        if int(outcome.skipped_in_a_row) > self.context.settings.max_skipped_steps:
            self._give_up(now, number + 1, outcome)
        now.images, now.steps, now.reported = 0, 0, True
        now.suspects.clear()

    def _data(self, now: _Counts, done: int) -> dict[str, float]:
        """Return what the log says of the data since the last line. Processes must call it together.

        No advice for an epoch's first line: its step waited for the workers to start or to fill up again.
        """
        waited, seconds = now.wait.read()
        now.total.add("data_wait", waited, seconds)
        share = waited / seconds
        if now.reported and share > 0.25:
            self.context.log.say_once(self.loader.advice(share))
        return {"data_wait": share, "bad_images": self._count_bad(now, done)}

    def _count_bad(self, now: _Counts, done: int) -> int:
        return self.exits.count_bad(self.loader.dataset.bad, now.epoch, done, now.total)

    def _report(self, values: dict[str, float], epoch: int, done: int) -> None:
        shown = ("loss", "lr", "images_per_s", "data_wait", *self.shown)
        shown += tuple(name for name in ("bad_images", "skipped_steps") if values.get(name))
        steps, log = len(self.loader), self.context.log
        log.progress(f"epoch {epoch}", done, steps, {name: values[name] for name in shown if name in values})
        log.scalars({f"train/{name}": value for name, value in values.items()}, epoch * steps + done)

    def _give_up(self, now: _Counts, step: int, outcome: StepOutcome) -> NoReturn:
        """Save the weights, which the skipped steps left alone, and end: say whose loss was not finite."""
        self.exits.save_now(now.epoch, step, now.total)
        indices = [i for found, loss in now.suspects if not loss.isfinite() for i in found]
        names = ", ".join(map(self.loader.dataset.name, indices[:16])) + (", ..." if len(indices) > 16 else "")
        if world.is_main():
            print(
                f"error: {int(outcome.skipped_in_a_row)} steps in a row were skipped, more than --max_skipped_steps "
                f"{self.context.settings.max_skipped_steps}, because loss or gradient was not finite (epoch "
                f"{now.epoch}, step {step}); the checkpoint holds the weights from before them: lower --blr, add "
                "--clip_grad 1, or use --amp bf16 or none, and run it again; if they have diverged already, --resume "
                "an earlier one in another folder",
                file=sys.stderr,
            )
        if indices:
            print(f"the loss of rank {world.rank()} was not finite on {names}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def _read(averages: Averages, steps: int) -> dict[str, float]:
    """Return the means, and how many of these `steps` were skipped."""
    values = averages.read()
    return values | {"skipped_steps": round(values.get("skipped_steps", 0.0) * steps)}
