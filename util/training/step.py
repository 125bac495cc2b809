"""One optimizer step over several micro-batches and processes, exact over the whole effective batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from util import precision
from util.distributed import world
from util.training.averages import Averages


class At(NamedTuple):
    """Where a run stands. Every schedule of a method is a pure function of it, so that resuming is exact.

    Attributes:
        step: optimizer steps before this one, over all epochs.
        epoch: epochs before this step, as a fraction.
        epochs: length of the schedule.
    """

    step: int
    epoch: float
    epochs: int

    @property
    def progress(self) -> float:
        """Return the share of the training that is over, from 0 to 1."""
        return self.epoch / self.epochs if self.epochs else 0.0


class Loss(NamedTuple):
    """One term of the loss on a micro-batch: its mean over the global batch is summed `sum` / summed `count`.

    Attributes:
        sum: 0-dim, differentiable, its weight included.
        count: 0-dim; of removed tokens, images, or pairs. The plan of the micro-batch holds the same number.
    """

    sum: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step was.

    Attributes:
        images: of this process.
        loss: this process's part of the objective, 0-dim; the parts of all processes sum to it.
        norm: of the gradient, before clipping, 0-dim; 0 where the step was skipped.
        skipped: 0-dim bool, the same on all processes: loss or gradient was not finite, so nothing was changed.
    """

    images: int
    loss: torch.Tensor
    norm: torch.Tensor
    skipped: torch.Tensor

    def counted(self, value: torch.Tensor | float) -> torch.Tensor:
        """Return `value`, or 0 where the step was skipped, so that a mean leaves it out."""
        return torch.where(self.skipped, 0.0, value)


def train_step(
    method: nn.Module, batches: Sequence[NamedTuple], at: At, update: GradientStep, averages: Averages, amp: str
) -> StepOutcome:
    """Take one optimizer step of `method` over the micro-batches of all processes.

    The masks of all micro-batches come first. Then the number of terms of each loss in the global batch is known, and
    each gradient is that of summed losses / summed counts. A mean of means would weigh the terms unequally wherever
    counts differ: removed tokens under AMR, a short last batch.

    Args:
        method: a `methods.Method`, the bare one; `update.forward` is its forward, perhaps in DistributedDataParallel.
        batches: a `methods.Inputs` for each micro-batch, on the device.
        at: where the run stands.
        update: accumulates gradients and steps.
        averages: gets the losses and what the plans say for the log.
        amp: bf16, fp16 or none.
    """
    update.begin()
    plans = [method.choose(inputs, at) for inputs in batches]
    totals = global_counts([plan.counts for plan in plans])
    objective, sums = torch.zeros((), device=averages.device), dict.fromkeys(totals, 0.0)
    for number, (inputs, plan) in enumerate(zip(batches, plans, strict=True)):
        with update.sync(last=number == len(batches) - 1):
            with precision.autocast(amp, averages.device):
                losses = update.forward(inputs, plan, at)
            part = sum(loss.sum.float() / totals[name] for name, loss in losses.items())
            update.backward(part)
        objective = objective + part.detach()
        sums = {name: sums[name] + loss.sum.detach() for name, loss in losses.items()}
        plan.log(averages)
    method.on_gradients(at)
    outcome = update.apply(objective, images=sum(len(inputs.views[0]) for inputs in batches))
    method.after_step(at, ~outcome.skipped)
    _log_losses(averages, outcome, sums, [plan.counts for plan in plans])
    return outcome


def global_counts(counts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sum the counts of each loss term over micro-batches and processes; 1 where there is no term at all."""
    names = list(counts[0])
    totals = torch.stack([sum(part[name].detach().float() for part in counts) for name in names])
    return dict(zip(names, world.all_reduce(totals).clamp(min=1).unbind(), strict=True))


def _log_losses(averages: Averages, outcome: StepOutcome, sums: dict, counts: list[dict]) -> None:
    """Average each term over its own counts; of several terms, `loss` is the mean of the objective over the steps."""
    for name, total in sums.items():
        count = sum(part[name] for part in counts)
        averages.add("loss" if len(sums) == 1 else f"loss_{name}", outcome.counted(total), outcome.counted(count))
    if len(sums) > 1:
        averages.add("loss", outcome.counted(outcome.loss), outcome.counted(1.0) / world.world_size())


class GradientStep:
    """Accumulates gradients, clips them and steps; changes nothing where loss or gradient is not finite.

    Args:
        forward: the module that is called, perhaps in DistributedDataParallel.
        optimizer: steps on its parameters.
        scaler: `GradScaler`, disabled except for fp16.
        clip_grad: largest norm of the gradient, or None.
        clip_each: the norm is each parameter's own, not that of the whole gradient.
    """

    def __init__(
        self,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip_grad: float | None = None,
        clip_each: bool = False,
    ):
        self.forward, self.optimizer, self.scaler = forward, optimizer, scaler
        self.clip_grad, self.clip_each = clip_grad, clip_each
        self._in_a_row = self._most_in_a_row = torch.zeros((), dtype=torch.int64)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._buffers = list(forward.buffers())  # BatchNorm's running statistics, which the forward pass changes
        self._before = [buffer.clone() for buffer in self._buffers]

    def begin(self) -> None:
        """Remember the buffers, which a step that is skipped gets back."""
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    def sync(self, last: bool):
        """Return the context for forward and backward of a micro-batch: gradients are all-reduced after the last."""
        if last or not isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()

    def backward(self, part: torch.Tensor) -> None:
        """Add the gradient of this process's part of the objective."""
        # DistributedDataParallel averages over the processes; the parts are to be summed.
        self.scaler.scale(part * world.world_size()).backward()

    def apply(self, objective: torch.Tensor, images: int) -> StepOutcome:
        """Clip, step, clear.

        A step whose loss or gradient is not finite on any process changes nothing on all. The host does not wait to
        know.

        Args:
            objective: this process's part of the objective, 0-dim.
            images: of this process, for the outcome.
        """
        whole = world.all_reduce(objective.detach().clone())
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        skipped = ~(norm.isfinite() & whole.isfinite())
        factor = torch.ones_like(norm)
        if self.clip_grad is not None and self.clip_each:
            norms = torch._foreach_norm(gradients)
            torch._foreach_mul_(gradients, [(self.clip_grad / (own + 1e-6)).clamp(max=1.0) for own in norms])
        elif self.clip_grad is not None:
            factor = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        self._step_unless(skipped, gradients, factor)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
        self.optimizer.zero_grad(set_to_none=True)
        self._in_a_row = (self._in_a_row.to(norm.device) + 1) * skipped
        self._most_in_a_row = torch.maximum(self._most_in_a_row.to(norm.device), self._in_a_row)
        return StepOutcome(images, objective.detach(), torch.where(skipped, 0.0, norm), skipped)

    @property
    def most_skipped_in_a_row(self) -> int:
        """Return the longest series of skipped steps so far. The host waits for the device."""
        return int(self._most_in_a_row)

    def _step_unless(self, skipped: torch.Tensor, gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
        """Step on `gradients` times `factor`, unless `skipped`, without the host waiting to know.

        Fused kernels (and our LARS) take two tensors of GradScaler's: gradients are divided by `grad_scale`, and nothing
        changes, moments included, where `found_inf` is 1. So clipping and skipping cost no pass over the gradients.
        """
        reads_flags = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if reads_flags and not self.scaler.is_enabled():
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
