"""One optimizer step over several micro-batches and processes, normalised over the whole effective batch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from util.distributed import world


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step was.

    Attributes:
        images: of this process.
        loss: this process's sum of losses, 0-dim.
        norm: of the gradient, before clipping, 0-dim; 0 where the step was skipped.
        skipped: 0-dim bool, the same on all processes: loss or gradient was not finite, so nothing was changed.
    """

    images: int
    loss: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor

    def counted(self, value: torch.Tensor | float) -> torch.Tensor:
        """`value`, or 0 where the step was skipped: a mean leaves it out."""
        return torch.where(self.skipped, 0.0, value)


class GradientStep:
    """Accumulates gradients of *sums* and divides by the global count once, at the end.

    A mean over the effective batch (all processes, all micro-batches) is sum of losses / number of terms. The number
    is not known before the last micro-batch where it varies (masked tokens under AMR, a short last batch), and a
    mean of means would weigh the terms unequally. Gradients are linear, so the division can wait.

    Args:
        model: the module whose forward was called, perhaps in DistributedDataParallel.
        optimizer: steps on its parameters.
        scaler: `GradScaler`, disabled except for fp16.
        nominal_count: expected number of terms on this process, the same on all: keeps the gradients' size normal
            before the division.
        clip_grad: largest norm of the whole gradient, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        nominal_count: float,
        clip_grad: float | None = None,
    ):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.nominal_count, self.clip_grad = nominal_count, clip_grad
        self._in_a_row = self._most_in_a_row = torch.zeros((), dtype=torch.int64)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._buffers = list(model.buffers())  # BatchNorm's running statistics, which the forward pass changes
        self._before = [buffer.clone() for buffer in self._buffers]

    def sync(self, last: bool):
        """Context for forward and backward of a micro-batch: processes exchange gradients only after the last."""
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def backward(self, loss_sum: torch.Tensor) -> None:
        """Add the gradient of a sum of losses."""
        self.scaler.scale(loss_sum / self.nominal_count).backward()

    def apply(self, count: torch.Tensor, loss: torch.Tensor, images: int) -> StepOutcome:
        """Divide by the global number of terms, clip, step, clear.

        A step whose loss or gradient is not finite on any process changes nothing on all; the host does not wait to
        know.

        Args:
            count, loss: this process's number of terms, and their sum, 0-dim.
            images: of this process, for the outcome.
        """
        total, global_loss = world.all_reduce(torch.stack([count.detach().float(), loss.detach().float()])).unbind()
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # DistributedDataParallel has averaged over the processes; undo that along with the nominal count.
        factor = self.nominal_count * world.world_size() / total
        norm = nn.utils.get_total_norm(gradients) * factor
        skipped = ~(norm.isfinite() & global_loss.isfinite())
        if self.clip_grad is not None:
            factor = factor * (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        self._step_unless(skipped, gradients, factor)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
            before.copy_(buffer)
        self.optimizer.zero_grad(set_to_none=True)
        self._in_a_row = (self._in_a_row.to(norm.device) + 1) * skipped
        self._most_in_a_row = torch.maximum(self._most_in_a_row.to(norm.device), self._in_a_row)
        return StepOutcome(images, loss.detach(), torch.where(skipped, 0.0, norm), skipped)

    @property
    def most_skipped_in_a_row(self) -> int:
        """The longest series of skipped steps so far. The host waits for the device."""
        return int(self._most_in_a_row)

    def _step_unless(self, skipped: torch.Tensor, gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
        """Step on `gradients` times `factor`."""
        reads_flags = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if reads_flags and not self.scaler.is_enabled():  # the kernel divides, and skips, by itself
            self.optimizer.grad_scale, self.optimizer.found_inf = 1 / factor, skipped.float()
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf
            return
        torch._foreach_mul_(gradients, factor)
        if self.scaler.is_enabled():  # it has seen the same gradients, and lowers its scale as well
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not skipped:
            self.optimizer.step()
