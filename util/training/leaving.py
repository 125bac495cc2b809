"""When a run saves and when it leaves, decided by all processes together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from util.data.bad_images import BadImages, TooManyBadImages
from util.distributed import world
from util.distributed.signals import PREEMPTED, Interrupted, Preempted
from util.training import loading, strategy_state
from util.training.averages import Averages
from util.training.context import Context
from util.training.state import TrainingState


class Exits:
    """The ways out of a training, and the checkpoints before them. All processes call each method together.

    Args:
        context, state: of the run.
    """

    def __init__(self, context: Context, state: TrainingState):
        self.context, self.state = context, state
        self._bad = state.loader.dataset.bad

    def before_step(
        self, epoch: int, step: int, averages: Callable[[], Averages], interrupted: bool, lost: str
    ) -> None:
        """Agree on what is due before a step: a checkpoint, or leaving.

        Args:
            epoch, step: of the epoch.
            averages: returns those of the epoch so far.
            interrupted: a signal ended the waiting for data.
            lost: why no data came, or nothing.
        """
        asked = interrupted or self.context.signals.received is not None
        spoiled = self._bad.too_many()
        stop, due, spoiled, gone = self.context.agreement.maximum(asked, self.state.due(), spoiled, bool(lost))
        if stop:
            self.leave(epoch, step, averages())
        if gone:
            self.fail(lost, epoch, step, averages())
        if spoiled:  # no step is made of the blank images that stand for the bad ones
            self.count_bad(self._bad, epoch, step, averages())
        if due:
            self.save(epoch, step, averages())

    def save(self, epoch: int, step: int, averages: Averages | None = None, keep_as: int | None = None) -> None:
        """Write checkpoint-last.pth before `step` of `epoch`; leave if a weight is not finite."""
        state, steps = self.state, len(self.state.loader)
        done = epoch if step == steps and averages is None else epoch - 1
        counted = averages.state() if averages is not None else {}
        problem = state.save(done, epoch * steps + step, counted, keep_as)
        if self.context.agreement.maximum(bool(problem))[0]:
            self.fail(problem, epoch, step)

    def save_now(self, epoch: int, step: int, averages: Averages) -> None:
        """Write checkpoint-last.pth before `step` of `epoch`, and wait until it is on disk."""
        self.save(epoch, step, averages)
        self.state.wait()
        self.context.agreement.maximum(0)  # the first process to leave makes the launcher end the others

    def count_bad(self, bad: BadImages, epoch: int, step: int, averages: Averages) -> int:
        """Name and count the bad images of all processes; save before `step` of `epoch` if too many end the run."""
        try:
            return bad.collect(self.context.device)
        except TooManyBadImages:
            if step:
                self.save_now(epoch, step, averages)
            raise

    def save_epoch(self, epoch: int) -> None:
        """Write checkpoint-last.pth after `epoch`; checkpoint-{epoch}.pth every `save_every_epochs` and at the end."""
        settings = self.context.settings
        every, at_end = settings.save_every_epochs, epoch == settings.last_epoch
        keep = every is not None and epoch >= 0 and (epoch % every == 0 or at_end)
        self.save(epoch, len(self.state.loader), keep_as=epoch if keep else None)

    def checked(self, batches: DataLoader, rounds: int, epoch: int, averages: Averages) -> Iterator[list]:
        """Yield `batches`, of which no process has more than `rounds`; if one is asked to stop, all leave together.

        The run then continues after the last step of `epoch`, whose `averages` these are.
        """
        iterator, lost, steps = None, "", len(self.state.loader)
        for number in range(rounds + 1):
            stop, gone = self.context.agreement.maximum(self.context.signals.received is not None, bool(lost))
            if stop:
                self.leave(epoch, steps, averages)
            if gone:
                self.fail(lost, epoch, steps, averages)
            if number == rounds:
                return
            awaited, batch = f"batch {number} of {rounds} of the evaluation", None
            try:
                with self.context.signals.waiting_for(lambda text=awaited: text, self.context.settings.dist_timeout):
                    iterator = iter(batches) if iterator is None else iterator
                    batch = next(iterator, None)
            except Interrupted:
                pass  # the next agreement tells the others
            except loading.ERRORS as error:
                lost = loading.describe(error)
            if batch is not None:
                yield batch

    def look(self, epoch: int, averages: Averages, find: Callable[[], Any]) -> Any:
        """Return what `find` finds, on the first process, after the steps of `epoch`; None on the others.

        The steps, whose `averages` these are, are saved before, so that a kill loses only the evaluation. A signal ends
        it: all processes leave, and the run continues with it.
        """
        steps = len(self.state.loader)
        self.save(epoch, steps, averages)
        found, strategy = None, self.state.method.strategy
        with contextlib.suppress(Interrupted), self.context.signals.ending(), strategy_state.unchanged(strategy):
            found = find() if world.is_main() else None
        if self.context.agreement.maximum(self.context.signals.received is not None)[0]:
            self.leave(epoch, steps)
        return found

    def leave(self, epoch: int, step: int, averages: Averages | None = None) -> NoReturn:
        """Say so, and end; save before, unless there are no `averages` because that has been done."""
        if averages is not None:
            self.save_now(epoch, step, averages)
        self.context.log.say(
            f"stopped by {self.context.signals.received or 'a signal to another process'} in epoch {epoch} before step "
            f"{step}; the same command continues there"
        )
        self.finish(PREEMPTED)
        raise Preempted

    def fail(self, problem: str, epoch: int, step: int, averages: Averages | None = None) -> NoReturn:
        """End all processes with status 1; those with a `problem` print it. Save before, if there are `averages`."""
        if averages is not None:
            self.save_now(epoch, step, averages)
        if problem:
            print(f"error: rank {world.rank()} in epoch {epoch}, step {step}: {problem}", file=sys.stderr, flush=True)
        self.finish(1)
        raise SystemExit(1)

    def end(self) -> None:
        """Say so if the schedule goes on after the last epoch; then `finish`."""
        settings = self.context.settings
        if settings.last_epoch < settings.epochs - 1:
            self.context.log.say(
                f"--stop_after_epoch {settings.stop_after_epoch} of a schedule of {settings.epochs} epochs: done; the "
                "same command without it continues"
            )
        self.finish()

    def finish(self, status: int = 0) -> None:
        """Wait for the last checkpoint, close the files and leave the process group; `status` is said to W&B."""
        finish(self.context, self.state.finish(), status)


def finish(context: Context, failure: str = "", status: int = 0) -> None:
    """Close the files and leave the process group; end with status 1 if any process has a `failure` to print."""
    context.log.close(1 if failure else status)
    failed = context.agreement.maximum(bool(failure))[0]
    world.finish()
    if failure:
        print(failure, file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(1)
