"""Pre-training steps, for any model that answers `model(images) -> (loss, pred, mask)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from util import precision
from util.data.step_loader import MicroBatch
from util.distributed import world
from util.training.averages import Averages
from util.training.epoch import EpochLoop
from util.training.step import GradientStep, StepOutcome

Prepare = Callable[[MicroBatch], tuple[torch.Tensor, ...]]  # -> arguments of the model, on the device


def train_one_epoch(
    model: nn.Module,
    loop: EpochLoop,
    update: GradientStep,
    epoch: int,
    *,
    prepare: Prepare,
    amp: str = "none",
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        model: answers `model(images) -> (loss, pred, mask)`; loss is the mean over the removed tokens, mask is (N, L)
            with 1 = removed.
        loop: data, learning rates, log.
        update: collects gradients and steps.
        epoch: 0-based.
        prepare: micro-batch -> arguments of the model, on the device.
        amp: bf16, fp16 or none.

    Returns:
        Means over the epoch and all processes: loss, lr, grad_norm, mask_ratio and kept_tokens (also _min and _max),
        and what the masking strategy reports.
    """
    model.train()
    return loop.run(epoch, update, lambda batches, averages: train_step(model, batches, update, averages, prepare, amp))


def train_step(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    update: GradientStep,
    averages: Averages,
    prepare: Prepare,
    amp: str = "none",
) -> StepOutcome:
    """One optimizer step over `micro_batches`.

    Eq. 2: sum over the removed tokens of the global batch / number of removed tokens of the global batch.
    """
    num_images, num_removed, loss_sum = 0, *torch.zeros(2, device=averages.device)
    for micro_batch in micro_batches:
        images, *noise = prepare(micro_batch)
        with update.sync(micro_batch.last):
            with precision.autocast(amp, averages.device):
                loss, _, mask = model(images, *noise)
            removed = mask.sum()
            update.backward(loss * removed)
        num_images += len(images)
        num_removed = num_removed + removed
        loss_sum = loss_sum + loss.detach() * removed
        _add_mask(averages, mask, getattr(world.unwrap(model), "mask_stats", {}))
    outcome = update.apply(num_removed, loss_sum, num_images)
    averages.add("loss", outcome.counted(loss_sum), outcome.counted(num_removed))
    return outcome


def _add_mask(averages: Averages, mask: torch.Tensor, stats: dict[str, torch.Tensor]) -> None:
    removed = mask.sum(dim=1)  # (N,)
    averages.add_range("mask_ratio", removed / mask.shape[1])
    averages.add_range("kept_tokens", mask.shape[1] - removed)
    for name, values in stats.items():
        averages.add(name, values.sum(), len(values))
