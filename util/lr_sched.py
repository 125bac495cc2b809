"""The learning rate as a pure function of the epoch."""

from __future__ import annotations

import math

import torch


def learning_rate(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Return the rate: linear warm-up from 0 to `lr`, then half a cosine down to `min_lr`.

    Args:
        epoch: fractional epoch, 0 at the first step.
        lr: peak rate.
        min_lr: rate at `epochs`.
        warmup_epochs: length of the warm-up.
        epochs: length of the whole schedule.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return lr
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group `value` times its own `lr_scale` (1 without layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)
