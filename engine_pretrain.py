"""Pre-training steps, for any model that answers `model(images) -> (loss, pred, mask)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from util import dist, precision
from util.epoch import EpochLoop
from util.log import Averages
from util.step import GradientStep


def train_one_epoch(
    model: nn.Module,
    loop: EpochLoop,
    update: GradientStep,
    epoch: int,
    *,
    prepare: Callable[[object], tuple[torch.Tensor, ...]],
    amp: str = "none",
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        model: answers `model(images) -> (loss, pred, mask)`; loss is the mean over the removed tokens, mask is (N, L)
            with 1 = removed.
        loop: data, learning rates, log.
        update: collects gradients and steps.
        epoch: 0-based.
        prepare: batch -> arguments of the model, on the device.
        amp: bf16, fp16 or none.

    Returns:
        Means over the epoch and all processes: loss, lr, grad_norm, mask_ratio and kept_tokens (also _min and _max),
        and what the masking strategy reports.
    """
    model.train()
    return loop.run(epoch, lambda batches, averages: train_step(model, batches, update, averages, prepare, amp))


def train_step(
    model: nn.Module,
    micro_batches: Iterator[tuple[bool, object]],
    update: GradientStep,
    averages: Averages,
    prepare: Callable[[object], tuple[torch.Tensor, ...]],
    amp: str = "none",
) -> tuple[int, torch.Tensor]:
    """One optimizer step over `micro_batches` of (is the last one, batch).

    Eq. 2: sum over the removed tokens of the global batch / number of removed tokens of the global batch.

    Returns:
        Images of this process, and the gradient's norm, 0-dim, on the device.
    """
    num_images, num_removed = 0, torch.zeros((), device=averages.device)
    for last, batch in micro_batches:
        images, *noise = prepare(batch)
        with update.sync(last):
            with precision.autocast(amp, averages.device):
                loss, _, mask = model(images, *noise)
            removed = mask.sum()
            update.backward(loss * removed)
        num_images += len(images)
        num_removed += removed
        averages.add("loss", loss.detach() * removed, removed)
        _add_mask(averages, mask, getattr(dist.unwrap(model), "mask_stats", {}))
    return num_images, update.apply(num_removed)


def _add_mask(averages: Averages, mask: torch.Tensor, stats: dict[str, torch.Tensor]) -> None:
    removed = mask.sum(dim=1)  # (N,)
    averages.add_range("mask_ratio", removed / mask.shape[1])
    averages.add_range("kept_tokens", mask.shape[1] - removed)
    for name, values in stats.items():
        averages.add(name, values.sum(), len(values))
