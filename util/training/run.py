"""What every training run does around its epochs: start, continue, save, finish."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader

from util import cli, lr_sched, precision, seeding
from util.config import Settings
from util.data.bad_images import BadImages
from util.data.datasets import ImageSet, SeededImages
from util.data.step_loader import StepLoader, StepPlan
from util.distributed import world
from util.distributed.agreement import Agreement
from util.distributed.signals import Interrupted, Preempted, Signals
from util.training import checkpoint, loading, provenance, resume, start, strategy_state, training_state
from util.training.averages import Averages
from util.training.epoch import EpochLoop
from util.training.log import RunLog
from util.training.saver import Saver, first_not_finite


def step_plan(settings: Settings, num_images: int, multiple: int = 1) -> StepPlan:
    """How this process shares in the steps of an epoch. ValueError if there are too few images."""
    world_size = world.launched_world_size()
    accum_iter = settings.resolved_accum_iter(world_size)
    return StepPlan(num_images, settings.batch_size, accum_iter, world.rank(), world_size, multiple)


@dataclass
class Run:
    """A started run.

    Attributes:
        settings: what was asked for.
        device, amp: where and in which format it computes.
        content: the checkpoint it continues from, or None.
        agreement: what the processes decide together.
        signals: what the system asks of this process.
        locked: keeps other runs out of the folder.
        log: where its numbers go.
        start_epoch, start_step: where it begins.
        steps_per_epoch: optimizer steps in an epoch, once known.
        best: best accuracy on the validation images so far, where there is one.
        classes: names of the classes, where there are some.
        bad: the training pictures that cannot be decoded, once there is a loop.
        names_digest: a hash of the names of the training images, once there is a loop.
        strategy: the masking, where there is one.
    """

    settings: Settings
    device: torch.device
    amp: str
    content: dict | None
    agreement: Agreement
    signals: Signals
    locked: IO | None = None
    log: RunLog = field(init=False)
    saver: Saver | None = field(init=False, default=None)
    start_epoch: int = field(init=False, default=0)
    start_step: int = field(init=False, default=0)
    start_averages: dict = field(init=False, default_factory=dict)
    steps_per_epoch: int = field(init=False, default=0)
    best: float = field(init=False, default=0.0)
    classes: tuple[str, ...] = field(init=False, default=())
    bad: BadImages = field(init=False)
    names_digest: str | None = field(init=False, default=None)
    strategy: Callable | None = field(init=False, default=None)

    def __post_init__(self):
        settings = self.settings
        if getattr(settings, "eval", False):  # leaves the run that it evaluates as it is
            self.log = RunLog(None)
            return
        if self.content is not None:
            self.start_epoch = self.content["epoch"] + 1
            self.best = self.content.get("best_acc1", 0.0)
        folder, done = Path(settings.output_dir), self.content.get("step", 0) if self.content is not None else 0
        try:
            self.log = RunLog(folder, Path(settings.log_dir or folder), self.start_epoch, done)
            if not world.is_main():
                return
            resolved = self._resolved()
            description = provenance.describe(settings.as_dict(), resolved)
            provenance.write_config(folder / "config.yaml", description)
        except OSError as error:
            raise ValueError(
                f"--output_dir {folder}: {Path(error.filename or folder).name} in it cannot be read or written "
                f"({error.strerror}); remove it, or name another folder"
            ) from error
        self.saver = Saver(folder, settings.save_every_minutes, settings.keep_last)
        self.log.say(f"revision {description['revision']}  {description['versions']}")
        self.log.say("  ".join(f"{name} {value}" for name, value in resolved.items()))

    @staticmethod
    def start(settings: Settings, find_start: Callable[[], dict | None]) -> Run:
        """Lock the folder, join the other processes, find what to continue from, write config.yaml.

        Args:
            settings: what was asked for.
            find_start: returns the checkpoint to continue, or None; called once nobody else writes to the folder.
                ValueError: the run cannot start from what there is.
        """
        locked = None
        if not getattr(settings, "eval", False):
            with cli.exit_on_user_error():
                locked = start.take_folder(settings)
        device = world.init(settings.device, settings.dist_timeout)
        seeding.seed_all(seeding.derive(settings.seed, seeding.MODEL))
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what is neither autocast nor salience
        amp, agreement = precision.resolve_amp(settings.amp, device), Agreement(settings.dist_timeout)
        try:
            content = start.together(agreement, find_start)
            start.check_same(settings, content, agreement)
            new = lambda: Run(settings, device, amp, content, agreement, Signals(), locked)  # noqa: E731
            return start.together(agreement, new)
        except RuntimeError as error:
            agreement.explain(error)
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Give the signals back; say which process or which batch is missing if that is why this one ends."""
        self.signals.restore()
        if self.locked is not None:
            self.locked.close()
        if isinstance(error, RuntimeError):
            self.agreement.explain(error)
        if loading.is_lost_batch(error):
            print(f"error: {loading.describe(error)}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None

    def _resolved(self) -> dict:
        world_size = world.world_size()
        return {
            "device": str(self.device),
            "processes": world_size,
            "amp": self.amp,
            "accum_iter": self.settings.resolved_accum_iter(world_size),
            "effective_batch_size": self.settings.resolved_effective_batch_size(world_size),
            "lr": self.settings.resolved_lr(world_size),
            "start_epoch": self.start_epoch,
        }

    def place(self, model: nn.Module) -> None:
        """Move `model` to the device, with the memory layout and the checkpointing that the settings ask for."""
        model.to(self.device, memory_format=torch.channels_last if self.settings.channels_last else None)
        model.set_grad_checkpointing(self.settings.grad_checkpointing)

    def learning_rate(self, epoch: float) -> float:
        """The schedule's rate at a fractional epoch."""
        settings = self.settings
        peak = settings.resolved_lr(world.world_size())
        return lr_sched.learning_rate(
            epoch, lr=peak, min_lr=settings.min_lr, warmup_epochs=settings.warmup_epochs, epochs=settings.epochs
        )

    @property
    def pin_memory(self) -> bool:
        """Whether the loaders page-lock their batches."""
        return self.settings.pin_mem and self.device.type == "cuda"

    def step_loader(self, images: ImageSet, transform: Callable, multiple: int = 1) -> StepLoader:
        """Training batches of `images`, step by step."""
        settings = self.settings
        return StepLoader(
            SeededImages(images, transform, settings.seed, settings.max_bad_images),
            step_plan(settings, len(images), multiple),
            seed=settings.seed,
            num_workers=settings.num_workers,
            pin_memory=self.pin_memory,
        )

    def loop(
        self, loader: StepLoader, optimizer: torch.optim.Optimizer, shown: tuple[str, ...] = ("grad_norm",)
    ) -> EpochLoop:
        """The epoch loop over `loader` with this run's schedule, seed, log and checkpoints."""
        settings, self.bad, self.names_digest = self.settings, loader.dataset.bad, loader.dataset.images.digest
        return EpochLoop(
            loader,
            optimizer,
            self.learning_rate,
            self.device,
            self._before_step,
            self.save_now,
            self.signals,
            seed=settings.seed,
            log=self.log,
            print_freq=settings.print_freq,
            shown=shown,
            bad=self.bad,
            max_skipped_steps=settings.max_skipped_steps,
            data_timeout_s=settings.dist_timeout,
            start_step=self.start_step,
            start_averages=self.start_averages,
        )

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        steps_per_epoch: int,
        strategy: Callable | None = None,
    ) -> None:
        """Train `model`, the bare one, with these; from the checkpoint this run continues from, if any.

        `strategy` is the masking, whose state is saved and restored if it has one.
        """
        self.model, self.optimizer, self.scaler, self.strategy = model, optimizer, scaler, strategy
        self.steps_per_epoch = steps_per_epoch
        if self.content is not None:
            model.load_state_dict(checkpoint.model_state(self.content))
        with cli.exit_on_user_error():
            bad = first_not_finite(model.state_dict())
            if bad:
                source = self.content["path"] if self.content is not None else f"--finetune {self.settings.finetune}"
                raise ValueError(f"{source}: {bad} is not finite; start from another checkpoint")
            if self.content is None:
                return
            training_state.load_optimizer(optimizer, self.content["optimizer"], self.content["path"])
            notes = [strategy_state.restore(strategy, self.content, getattr(self.settings, "masking", None))]
        if self.content.get("scaler"):
            scaler.load_state_dict(self.content["scaler"])
        self.start_step = resume.steps_into_epoch(self.content, steps_per_epoch)
        self.start_averages = self.content.get("averages") or {}
        within = f" and {self.start_step} steps" if self.start_step else ""
        self.log.say(f"continuing {self.content['path']} after epoch {self.content['epoch']}{within}")
        for note in filter(None, [*self.content["notes"], *notes]):
            self.log.say(note)
        changed = resume.changed_settings(self.content, self.settings)
        if changed:
            self.log.say(f"settings that were others before: {'; '.join(changed)}")
        self.content = None  # its memory is free

    def epochs(self) -> Iterator[int]:
        """The epochs that are left."""
        return iter(range(self.start_epoch, self.settings.epochs))

    def save_epoch(self, epoch: int) -> None:
        """Write checkpoint-last.pth after `epoch`; checkpoint-{epoch}.pth every `save_every_epochs` and at the end."""
        every, at_end = self.settings.save_every_epochs, epoch + 1 == self.settings.epochs
        keep = every is not None and epoch >= 0 and (epoch % every == 0 or at_end)
        self._save(epoch, (epoch + 1) * self.steps_per_epoch, {}, epoch if keep else None)

    def save_now(self, epoch: int, step: int, averages: Averages) -> None:
        """Write checkpoint-last.pth before `step` of `epoch`, and wait until it is on disk. All processes together."""
        self._save(epoch - 1, epoch * self.steps_per_epoch + step, averages.state())
        if self.saver is not None:
            self.saver.wait()
        self.agreement.maximum(0)  # the first process to leave makes the launcher end the others

    def checked(self, batches: DataLoader, rounds: int, epoch: int, averages: Averages) -> Iterator[list]:
        """`batches`, of which no process has more than `rounds`; if one is asked to stop, all leave together.

        The run then continues after the last step of `epoch`, whose `averages` these are.
        """
        iterator, lost = None, ""
        for number in range(rounds + 1):
            stop, gone = self.agreement.maximum(self.signals.received is not None, bool(lost))
            if stop:
                self._leave(epoch, self.steps_per_epoch, averages)
            if gone:
                self._fail(lost, epoch, self.steps_per_epoch, averages)
            if number == rounds:
                return
            awaited, batch = f"batch {number} of {rounds} of the evaluation", None
            try:
                with self.signals.waiting_for(lambda awaited=awaited: awaited, self.settings.dist_timeout):
                    iterator = iter(batches) if iterator is None else iterator
                    batch = next(iterator, None)
            except Interrupted:
                pass  # the next exchange tells the others
            except loading.ERRORS as error:
                lost = loading.describe(error)
            if batch is not None:
                yield batch

    def look(self, epoch: int, averages: Averages, find: Callable[[], Any]) -> Any:
        """What `find` finds on the first process after the steps of `epoch`, whose `averages` these are; else None.

        The steps are saved before, so that a kill loses only the look. A signal ends it: all processes leave, and the
        run continues with it. All processes call it together.
        """
        self._save(epoch - 1, (epoch + 1) * self.steps_per_epoch, averages.state())
        found = None
        with contextlib.suppress(Interrupted), self.signals.ending(), strategy_state.unchanged(self.strategy):
            found = find() if world.is_main() else None
        if self.agreement.maximum(self.signals.received is not None)[0]:
            self._leave(epoch, self.steps_per_epoch)
        return found

    def _before_step(
        self, epoch: int, step: int, averages: Callable[[], Averages], interrupted: bool, lost: str
    ) -> None:
        asked = interrupted or self.signals.received is not None
        due = self.saver is not None and self.saver.due()
        stop, due, spoiled, gone = self.agreement.maximum(asked, due, self.bad.too_many(), bool(lost))
        if stop:
            self._leave(epoch, step, averages())
        if gone:
            self._fail(lost, epoch, step, averages())
        if spoiled:  # no step is made of the blank pictures that stand for the bad ones
            if step:
                self.save_now(epoch, step, averages())
            self.bad.collect(self.device)
        if due:
            self._save(epoch - 1, epoch * self.steps_per_epoch + step, averages().state())

    def _leave(self, epoch: int, step: int, averages: Averages | None = None) -> NoReturn:
        """Say so, and end; save before, unless there are no `averages` because that has been done."""
        if averages is not None:
            self.save_now(epoch, step, averages)
        self.log.say(
            f"stopped by {self.signals.received or 'a signal to another process'} in epoch {epoch} before step "
            f"{step}; the same command continues there"
        )
        self.finish()
        raise Preempted

    def _fail(self, problem: str, epoch: int, step: int, averages: Averages | None = None) -> NoReturn:
        """End all processes with status 1; those with a `problem` print it. Save before, if there are `averages`."""
        if averages is not None:
            self.save_now(epoch, step, averages)
        if problem:
            print(f"error: rank {world.rank()} in epoch {epoch}, step {step}: {problem}", file=sys.stderr, flush=True)
        self.finish()
        raise SystemExit(1)

    def _save(self, epoch: int, step: int, averages: dict, keep_as: int | None = None) -> None:
        problem = ""
        if self.saver is not None:
            try:
                self.saver.save(self._content(epoch, step, averages), keep_as)
            except FloatingPointError as error:
                problem = (
                    f"{error}; lower --blr, add --clip_grad 1, or use --amp bf16 or none, and run it again; if the "
                    "weights have diverged already, --resume an earlier checkpoint in another folder"
                )
        if self.agreement.maximum(bool(problem))[0]:
            self._fail(problem, epoch + 1, step)

    def _content(self, epoch: int, step: int, averages: dict) -> dict:
        state = strategy_state.read(self.strategy)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": step,
            "steps_per_epoch": self.steps_per_epoch,
            "num_images": self.bad.num_images,
            "averages": averages,
            "args": self.settings.as_dict(),
            "grid": list(self.model.patch_embed.grid_size),
            "effective_batch_size": self.settings.resolved_effective_batch_size(world.world_size()),
            "best_acc1": self.best,
            "classes": list(self.classes),
            "names_digest": self.names_digest,
        } | ({} if state is None else {"masking": state})

    def finish(self) -> None:
        """Wait for the last checkpoint, close the files and leave the process group."""
        failure = self.saver.finish() if self.saver is not None else ""
        self.log.close()
        failed = self.agreement.maximum(bool(failure))[0]
        world.finish()
        if failure:
            print(failure, file=sys.stderr, flush=True)
        if failed:
            raise SystemExit(1)
