"""One optimizer step over several micro-batches and processes, normalised over the whole effective batch."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from util import dist


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
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def sync(self, last: bool):
        """Context for forward and backward of a micro-batch: processes exchange gradients only after the last."""
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def backward(self, loss_sum: torch.Tensor) -> None:
        """Add the gradient of a sum of losses."""
        self.scaler.scale(loss_sum / self.nominal_count).backward()

    def apply(self, count: torch.Tensor) -> torch.Tensor:
        """Divide by the global number of terms, clip, step, clear. `count`: this process's number of terms, 0-dim.

        Returns:
            The gradient's norm before clipping, 0-dim, on the device.
        """
        total = dist.all_reduce(count.detach().clone().float())
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # DistributedDataParallel has averaged over the processes; undo that along with the nominal count.
        torch._foreach_mul_(gradients, self.nominal_count * dist.world_size() / total)
        norm = nn.utils.get_total_norm(gradients)
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, norm)
        if self.scaler.is_enabled():  # fp16 overflows now and then; the scaler skips such a step, the log counts 0
            norm = torch.where(norm.isfinite(), norm, 0.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
