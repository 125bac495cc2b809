"""What every training run does around its epochs: start, continue, save, finish."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
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
from util.training import checkpoint, lock, provenance, resume
from util.training.averages import Averages
from util.training.epoch import EpochLoop
from util.training.log import RunLog
from util.training.saver import Saver


def check_output_dir(settings: Settings) -> None:
    """Create `--output_dir` and `--log_dir`; ValueError if nothing can be written there. Many workers only warn."""
    for flag in ("output_dir", "log_dir"):
        folder = getattr(settings, flag)
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))  # a full disk lets files begin
        except OSError as error:
            raise ValueError(f"--{flag} {folder}: cannot be written ({error.strerror})") from error
    cores = os.cpu_count() or 1
    if settings.num_workers > cores:
        warnings.warn(f"--num_workers {settings.num_workers}: this machine has {cores} cores", stacklevel=2)


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

    def __post_init__(self):
        settings = self.settings
        if getattr(settings, "eval", False):  # leaves the run that it evaluates as it is
            self.log = RunLog(None)
            return
        if self.content is not None:
            self.start_epoch = self.content["epoch"] + 1
            self.best = self.content.get("best_acc1", 0.0)
        folder, done = Path(settings.output_dir), self.content.get("step", 0) if self.content is not None else 0
        self.log = RunLog(folder, Path(settings.log_dir or folder), self.start_epoch, done)
        if world.is_main():
            self.saver = Saver(folder, settings.save_every_minutes, settings.keep_last)
            resolved = self._resolved()
            description = provenance.describe(settings.as_dict(), resolved)
            provenance.write_config(Path(settings.output_dir) / "config.yaml", description)
            self.log.say(f"revision {description['revision']}  {description['versions']}")
            self.log.say("  ".join(f"{name} {value}" for name, value in resolved.items()))

    @staticmethod
    def start(settings: Settings, content: dict | None = None) -> Run:
        """Lock the folder, join the other processes, choose the device, seed, write config.yaml."""
        locked = None
        if not getattr(settings, "eval", False) and os.environ.get("RANK", "0") == "0":
            with cli.exit_on_user_error():
                locked = lock.hold(Path(settings.output_dir))
        device = world.init(settings.device, settings.dist_timeout)
        seeding.seed_all(seeding.derive(settings.seed, seeding.MODEL))
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what is neither autocast nor salience
        amp, agreement = precision.resolve_amp(settings.amp, device), Agreement(settings.dist_timeout)
        resume.check_same_start(settings, content, agreement)
        return Run(settings, device, amp, content, agreement, Signals(), locked)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Give the signals back; say which process is missing if that is why this one ends."""
        self.signals.restore()
        if self.locked is not None:
            self.locked.close()
        if isinstance(error, RuntimeError):
            self.agreement.explain(error)

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
        settings, self.bad = self.settings, loader.dataset.bad
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
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, steps_per_epoch: int
    ) -> None:
        """Train `model`, the bare one, with these; from the checkpoint this run continues from, if any."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.steps_per_epoch = steps_per_epoch
        if self.content is None:
            return
        model.load_state_dict(checkpoint.model_state(self.content))
        with cli.exit_on_user_error():
            resume.load_optimizer(optimizer, self.content["optimizer"], self.content["path"])
        if self.content.get("scaler"):
            scaler.load_state_dict(self.content["scaler"])
        self.start_step = resume.steps_into_epoch(self.content, steps_per_epoch)
        self.start_averages = self.content.get("averages") or {}
        within = f" and {self.start_step} steps" if self.start_step else ""
        self.log.say(f"continuing {self.content['path']} after epoch {self.content['epoch']}{within}")
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
        iterator = iter(batches)
        for number in range(rounds + 1):
            if self.agreement.maximum(self.signals.received is not None)[0]:
                self._leave(epoch, self.steps_per_epoch, averages)
            if number == rounds:
                return
            awaited = f"batch {number} of {rounds} of the evaluation"
            with contextlib.suppress(Interrupted):  # the next exchange tells the others
                with self.signals.waiting_for(lambda awaited=awaited: awaited, self.settings.dist_timeout):
                    batch = next(iterator, None)
                if batch is not None:
                    yield batch

    def look(self, epoch: int, averages: Averages, find: Callable[[], Any]) -> Any:
        """What `find` finds on the first process after the steps of `epoch`, whose `averages` these are; else None.

        The steps are saved before, so that a kill loses only the look. A signal ends it: all processes leave, and the
        run continues with it. All processes call it together.
        """
        self._save(epoch - 1, (epoch + 1) * self.steps_per_epoch, averages.state())
        found = None
        with contextlib.suppress(Interrupted), self.signals.ending():
            found = find() if world.is_main() else None
        if self.agreement.maximum(self.signals.received is not None)[0]:
            self._leave(epoch, self.steps_per_epoch)
        return found

    def _before_step(self, epoch: int, step: int, averages: Callable[[], Averages], interrupted: bool) -> None:
        asked = interrupted or self.signals.received is not None
        due = self.saver is not None and self.saver.due()
        stop, due, spoiled = self.agreement.maximum(asked, due, self.bad.too_many())
        if stop:
            self._leave(epoch, step, averages())
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

    def _save(self, epoch: int, step: int, averages: dict, keep_as: int | None = None) -> None:
        if self.saver is None:
            return
        content = {
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
        }
        self.saver.save(content, keep_as)

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
