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


def half_cosine(progress: float, first: float, last: float) -> float:
    """Return `first` at progress 0 and `last` at 1, half a cosine between them."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def stepwise(
    step: int, epoch: float, epochs: int, *, lr: float, min_lr: float, warmup_epochs: float, start: float = 0.0
) -> float:
    """Return the rate of a step: from `start` * `lr` linearly to `lr` at the warm-up's last step, then half a cosine.

    Args:
        step: optimizer steps before this one.
        epoch: the same in epochs, as a fraction.
        epochs: length of the schedule.
        lr, min_lr: peak and end.
        warmup_epochs: of which the warm-up has the steps.
        start: share of the peak in the first step.
    """
    if not step:
        return start * lr if warmup_epochs else lr
    steps = step / epoch  # in an epoch
    warmup = round(warmup_epochs * steps)
    if step < warmup:
        return lr * (start + (1 - start) * step / max(warmup - 1, 1))
    return half_cosine((step - warmup) / max(round(epochs * steps) - warmup, 1), lr, min_lr)
