"""What a training changes, loaded from and saved to checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from util import cli, precision
from util.data.step_loader import StepLoader
from util.distributed import world
from util.training import checkpoint, resume, strategy_state, training_state
from util.training.context import Context
from util.training.saver import Saver, first_not_finite


class TrainingState:
    """Model, side state of the method, optimizer and scaler of a run, and where it stands.

    Args:
        context: of the run.
        method: a `methods.Method`, the bare one, on its device.
        optimizer: over what is trained.
        loader: of the training images.

    Attributes:
        scaler: the loss scaler, a pass-through except for fp16.
        start_epoch, start_step, start_averages: where the run begins, and what was averaged in that epoch before.
        best: best accuracy on the validation images so far, where there is one.
    """

    def __init__(self, context: Context, method: nn.Module, optimizer: torch.optim.Optimizer, loader: StepLoader):
        self.context, self.method, self.optimizer, self.loader = context, method, optimizer, loader
        self.scaler = precision.grad_scaler(context.amp, context.device)
        self.start_epoch, self.start_step, self.start_averages, self.best = context.start_epoch, 0, {}, 0.0
        settings = context.settings
        self.saver = None
        if world.is_main():
            self.saver = Saver(Path(settings.output_dir), settings.save_every_minutes, settings.keep_last)

    def restore(self) -> None:
        """Continue from the checkpoint that the context holds, if any. Exits with status 2 if it does not fit."""
        context, content, method = self.context, self.context.content, self.method
        if content is not None:
            method.model.load_state_dict(checkpoint.model_state(content))
        with cli.exit_on_user_error():
            bad = first_not_finite(method.model.state_dict())
            if bad:
                source = content["path"] if content is not None else f"--finetune {context.settings.finetune}"
                raise ValueError(f"{source}: {bad} is not finite; start from another checkpoint")
            if content is None:
                return
            resume.load_side_state(method, content, getattr(context.settings, "method", "mae"))
            freezes = {
                id(p) for name, p in method.named_parameters() if any(part in name for part in method.may_freeze)
            }
            training_state.load_optimizer(
                self.optimizer, content["optimizer"], content["path"], lambda parameter: id(parameter) in freezes
            )
            notes = [strategy_state.restore(method.strategy, content, getattr(context.settings, "masking", None))]
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.best = content.get("best_acc1", 0.0)
        self.start_step = resume.steps_into_epoch(content, len(self.loader))
        self.start_averages = content.get("averages") or {}
        within = f" and {self.start_step} steps" if self.start_step else ""
        context.log.say(f"continuing {content['path']} after epoch {content['epoch']}{within}")
        for note in filter(None, [*content["notes"], *notes]):
            context.log.say(note)
        changed = resume.changed_settings(content, context.settings)
        if changed:
            context.log.say(f"settings that were others before: {'; '.join(changed)}")
        context.content = None  # its memory is free

    def save(self, epoch: int, step: int, averages: dict, keep_as: int | None = None) -> str:
        """Write checkpoint-last.pth beside the training, also as checkpoint-{keep_as}.pth.

        Args:
            epoch: the last whole one; -1 before the first is.
            step: optimizer steps that are done, over all epochs.
            averages: of the steps after `epoch`.
            keep_as: number under which it is kept.

        Returns:
            Why it cannot be: a weight is not finite; else nothing.
        """
        if self.saver is None:
            return ""
        try:
            self.saver.save(self._content(epoch, step, averages), keep_as)
        except FloatingPointError as error:
            return (
                f"{error}; lower --blr, add --clip_grad 1, or use --amp bf16 or none, and run it again; if the "
                "weights have diverged already, --resume an earlier checkpoint in another folder"
            )
        return ""

    def due(self) -> bool:
        """Return whether it is time for a checkpoint within the epoch."""
        return self.saver is not None and self.saver.due()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk, or has failed."""
        if self.saver is not None:
            self.saver.wait()

    def finish(self) -> str:
        """Wait, and write no more; return what must be said if the last checkpoint could not be written."""
        return self.saver.finish() if self.saver is not None else ""

    def _content(self, epoch: int, step: int, averages: dict) -> dict:
        settings, images = self.context.settings, self.loader.dataset
        state = strategy_state.read(self.method.strategy)
        return {
            "model": self.method.model.state_dict(),
            "method": self.method.side_state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": step,
            "steps_per_epoch": len(self.loader),
            "num_images": images.bad.num_images,
            "averages": averages,
            "args": settings.as_dict(),
            "grid": list(self.method.model.patch_embed.grid_size),
            "effective_batch_size": settings.resolved_effective_batch_size(world.world_size()),
            "best_acc1": self.best,
            "classes": list(images.images.classes),
            "names_digest": images.images.digest,
        } | ({} if state is None else {"masking": state})
