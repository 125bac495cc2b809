"""What surrounds a training and is built once: the folder's lock, the processes, the device, the log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import nn

from util import cli, lr_sched, precision, seeding
from util.config import Settings
from util.data.datasets import ImageSet, SeededImages
from util.data.step_loader import StepLoader, StepPlan
from util.distributed import world
from util.distributed.agreement import Agreement
from util.distributed.signals import Signals
from util.training import loading, provenance, start
from util.training.log import RunLog
from util.training.wandb_run import WandbRun


@dataclass
class Context:
    """The surroundings of a run.

    Attributes:
        settings: what was asked for.
        device, amp: where and in which format it computes.
        content: the checkpoint it continues from, until that is restored; None for a new run.
        agreement: what the processes decide together.
        signals: what the system asks of this process.
        locked: keeps other runs out of the folder.
        log: where its numbers go.
    """

    settings: Settings
    device: torch.device
    amp: str
    content: dict | None
    agreement: Agreement
    signals: Signals
    locked: IO | None = None
    log: RunLog = field(init=False)

    @staticmethod
    def start(settings: Settings, images: dict[str, ImageSet], find_start: Callable[[], dict | None]) -> Context:
        """Lock the folder, join the other processes, find what to continue from, write config.yaml.

        Args:
            settings: what was asked for.
            images: by their title, which all processes must have found alike.
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
            for title, found in images.items():
                start.check_same_images(settings, found, title, agreement)
            content = start.together(agreement, find_start)
            start.check_same(settings, content, agreement)
            context = Context(settings, device, amp, content, agreement, Signals(), locked)
            start.together(agreement, context._open_log)
            return context
        except RuntimeError as error:
            agreement.explain(error)
            raise

    def __enter__(self) -> Context:
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
        if isinstance(error, torch.OutOfMemoryError):
            asked = ". ".join(str(error).split(". ")[:2])
            print(
                f"error: the memory of {self.device} is full ({asked}); lower --batch_size (with "
                "--effective_batch_size the batch as a whole stays), use more GPUs, or add --grad_checkpointing",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(1) from None

    @property
    def start_epoch(self) -> int:
        """Return the first epoch to train, while `content` is there."""
        return self.content["epoch"] + 1 if self.content is not None else 0

    def _open_log(self) -> None:
        settings = self.settings
        if getattr(settings, "eval", False):  # leaves the run that it evaluates as it is
            self.log = RunLog(None)
            return
        folder, done = Path(settings.output_dir), self.content.get("step", 0) if self.content is not None else 0
        log_dir, resolved = Path(settings.log_dir or folder), self._resolved()
        try:
            if not world.is_main():
                self.log = RunLog(None)
                return
            description = provenance.describe(settings.as_dict(), resolved)
            wandb_run = None
            if settings.wandb is not None:
                rest = {name: value for name, value in description.items() if name != "settings"}
                config = settings.as_dict() | rest
                wandb_run = WandbRun(settings.wandb, folder, log_dir, config, self.content is not None)
            self.log = RunLog(folder, log_dir, self.start_epoch, done, wandb_run)
            provenance.write_config(folder / "config.yaml", description)
        except OSError as error:
            name = Path(error.filename2 or error.filename or folder).name
            raise ValueError(
                f"--output_dir {folder}: {name} in it cannot be read or written ({error.strerror}); "
                "remove it, or name another folder"
            ) from error
        self.log.say(f"revision {description['revision']}  {description['versions']}")
        self.log.say("  ".join(f"{name} {value}" for name, value in resolved.items()))

    def _resolved(self) -> dict:
        size = world.world_size()
        return {
            "device": str(self.device),
            "processes": size,
            "amp": self.amp,
            "accum_iter": self.settings.resolved_accum_iter(size),
            "effective_batch_size": self.settings.resolved_effective_batch_size(size),
            "lr": self.settings.resolved_lr(size),
            "start_epoch": self.start_epoch,
        }

    def place(self, model: nn.Module) -> None:
        """Move a model or method to the device, with the memory layout and checkpointing that the settings ask for."""
        model.to(self.device, memory_format=torch.channels_last if self.settings.channels_last else None)
        model.set_grad_checkpointing(self.settings.grad_checkpointing)

    def learning_rate(self, epoch: float) -> float:
        """Return the schedule's rate at a fractional epoch."""
        settings = self.settings
        peak = settings.resolved_lr(world.world_size())
        return lr_sched.learning_rate(
            epoch, lr=peak, min_lr=settings.min_lr, warmup_epochs=settings.warmup_epochs, epochs=settings.epochs
        )

    @property
    def pin_memory(self) -> bool:
        """Return whether the loaders page-lock their batches."""
        return self.settings.pin_mem and self.device.type == "cuda"

    def step_loader(self, images: ImageSet, transform: Callable, multiple: int = 1, joins: bool = True) -> StepLoader:
        """Build the loader of training batches of `images`, step by step."""
        settings = self.settings
        return StepLoader(
            SeededImages(images, transform, settings.seed, settings.max_bad_images),
            step_plan(settings, len(images), multiple, joins),
            seed=settings.seed,
            num_workers=settings.num_workers,
            pin_memory=self.pin_memory,
        )


def step_plan(settings: Settings, num_images: int, multiple: int = 1, joins: bool = True) -> StepPlan:
    """Return how this process shares in the steps of an epoch. ValueError if there are too few images."""
    world_size = world.launched_world_size()
    accum_iter = settings.resolved_accum_iter(world_size)
    return StepPlan(num_images, settings.batch_size, accum_iter, world.rank(), world_size, multiple, joins)
