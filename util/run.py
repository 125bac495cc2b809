"""What every training run does around its epochs: start, continue, save, finish."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from util import checkpoint, dist, lr_sched, precision, provenance, seeding
from util.batches import StepLoader, StepPlan
from util.config import Settings
from util.datasets import ImageSet, SeededImages
from util.epoch import EpochLoop
from util.log import RunLog

# What a parameter group takes from the command line even when it continues a checkpoint.
_OWN_OPTIONS = {"weight_decay", "lr_scale"}


def check_output_dir(settings: Settings) -> None:
    """Create `--output_dir` and `--log_dir`; ValueError if nothing can be written there. Many workers only warn."""
    for flag in ("output_dir", "log_dir"):
        folder = getattr(settings, flag)
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"--{flag} {folder}: cannot be written ({error.strerror})") from error
    cores = os.cpu_count() or 1
    if settings.num_workers > cores:
        warnings.warn(f"--num_workers {settings.num_workers}: this machine has {cores} cores", stacklevel=2)


def check_resumed(settings: Settings, path: str | Path, content: dict, model: nn.Module) -> dict:
    """`content` of the checkpoint to continue, if it fits `model` (the meta device will do) and the settings.

    Raises:
        ValueError: of another architecture, without an optimizer, or of another effective batch size.
    """
    checkpoint.check_state(path, model, checkpoint.model_state(content, path))
    optimizer = content.get("optimizer")
    if not (isinstance(optimizer, dict) and optimizer.get("param_groups") and isinstance(content.get("epoch"), int)):
        raise ValueError(
            f"{path}: holds weights but no training state; start from it with --finetune instead of --resume"
        )
    before, now = content.get("effective_batch_size"), effective_batch_size(settings)
    if before is not None and before != now:
        raise ValueError(
            f"{path}: its run had an effective batch of {before} images, this one has {now}; "
            f"continue it with --effective_batch_size {before}, or start a new --output_dir"
        )
    return content


def effective_batch_size(settings: Settings) -> int:
    """Images of one optimizer step, over all processes and micro-batches."""
    world_size = dist.launched_world_size()
    return settings.batch_size * settings.resolved_accum_iter(world_size) * world_size


def step_plan(settings: Settings, num_images: int, multiple: int = 1) -> StepPlan:
    """How this process shares in the steps of an epoch. ValueError if there are too few images."""
    world_size = dist.launched_world_size()
    accum_iter = settings.resolved_accum_iter(world_size)
    return StepPlan(num_images, settings.batch_size, accum_iter, dist.rank(), world_size, multiple)


@dataclass
class Run:
    """A started run.

    Attributes:
        settings: what was asked for.
        device, amp: where and in which format it computes.
        content: the checkpoint it continues from, or None.
        log: where its numbers go.
        best: best accuracy on the validation images so far, where there is one.
        classes: names of the classes, where there are some.
    """

    settings: Settings
    device: torch.device
    amp: str
    content: dict | None
    log: RunLog = field(init=False)
    start_epoch: int = field(init=False, default=0)
    best: float = field(init=False, default=0.0)
    classes: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self):
        settings = self.settings
        if getattr(settings, "eval", False):  # leaves the run that it evaluates as it is
            self.log = RunLog(None)
            return
        if self.content is not None:
            self.start_epoch = self.content["epoch"] + 1
            self.best = self.content.get("best_acc1", 0.0)
        self.log = RunLog(Path(settings.output_dir), Path(settings.log_dir or settings.output_dir), self.start_epoch)
        if dist.is_main():
            resolved = self._resolved()
            description = provenance.describe(settings.as_dict(), resolved)
            provenance.write_config(Path(settings.output_dir) / "config.yaml", description)
            self.log.say(f"revision {description['revision']}  {description['versions']}")
            self.log.say("  ".join(f"{name} {value}" for name, value in resolved.items()))

    @staticmethod
    def start(settings: Settings, content: dict | None = None) -> Run:
        """Join the other processes, choose the device, seed, write config.yaml."""
        device = dist.init(settings.device, settings.dist_timeout)
        seeding.seed_all(seeding.derive(settings.seed, seeding.MODEL))
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what is neither autocast nor salience
        return Run(settings, device, precision.resolve_amp(settings.amp, device), content)

    def _resolved(self) -> dict:
        world_size = dist.world_size()
        return {
            "device": str(self.device),
            "processes": world_size,
            "amp": self.amp,
            "accum_iter": self.settings.resolved_accum_iter(world_size),
            "effective_batch_size": effective_batch_size(self.settings),
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
        peak = settings.resolved_lr(dist.world_size())
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
        """The epoch loop over `loader` with this run's schedule, seed and log."""
        settings = self.settings
        return EpochLoop(
            loader,
            optimizer,
            self.learning_rate,
            self.device,
            settings.seed,
            self.log,
            settings.print_freq,
            shown,
            loader.dataset.bad,
        )

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Load the checkpoint this run continues from, if any; its memory is freed."""
        if self.content is None:
            return
        model.load_state_dict(checkpoint.model_state(self.content))
        asked = [{name: group[name] for name in _OWN_OPTIONS & group.keys()} for group in optimizer.param_groups]
        optimizer.load_state_dict(self.content["optimizer"])
        for group, options in zip(optimizer.param_groups, asked, strict=True):
            group.update(options)  # this command's, not those of the checkpoint
        if self.content.get("scaler"):
            scaler.load_state_dict(self.content["scaler"])
        self.log.say(f"continuing after epoch {self.content['epoch']}")
        self.content = None

    def epochs(self) -> Iterator[int]:
        """The epochs that are left."""
        return iter(range(self.start_epoch, self.settings.epochs))

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        epoch: int,
        steps_per_epoch: int,
    ) -> None:
        """Write checkpoint-last.pth, and checkpoint-{epoch}.pth every `save_every_epochs` and at the end."""
        if not dist.is_main():
            return
        bare = dist.unwrap(model)
        content = {
            "model": bare.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "epoch": epoch,
            "step": (epoch + 1) * steps_per_epoch,
            "args": self.settings.as_dict(),
            "grid": list(bare.patch_embed.grid_size),
            "effective_batch_size": effective_batch_size(self.settings),
            "best_acc1": self.best,
            "classes": list(self.classes),
        }
        folder = Path(self.settings.output_dir)
        every, at_end = self.settings.save_every_epochs, epoch + 1 == self.settings.epochs
        if every is not None and epoch >= 0 and (epoch % every == 0 or at_end):
            checkpoint.save(folder / f"checkpoint-{epoch}.pth", content)
        checkpoint.save(folder / checkpoint.LAST, content)

    def finish(self) -> None:
        """Close the files and leave the process group."""
        self.log.close()
        dist.barrier()
        dist.finish()
