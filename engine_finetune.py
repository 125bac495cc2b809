"""Supervised training steps, and evaluation. Fine-tuning and linear probing share both."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from util import dist, precision
from util.batches import MicroBatch
from util.epoch import EpochLoop
from util.log import Averages
from util.step import GradientStep, StepOutcome

Prepare = Callable[[list], tuple[torch.Tensor, torch.Tensor]]  # batch -> images, targets, on the device


def train_one_epoch(
    model: nn.Module,
    loop: EpochLoop,
    update: GradientStep,
    epoch: int,
    *,
    prepare: Prepare,
    smoothing: float = 0.0,
    amp: str = "none",
) -> dict[str, float]:
    """Train a classifier for one epoch.

    Args:
        model: images (N, C, H, W) -> logits (N, classes).
        loop: data, learning rates, log.
        update: collects gradients and steps.
        epoch: 0-based.
        prepare: batch -> images and targets; targets are classes (N,) or probabilities (N, classes).
        smoothing: label smoothing; with mixup it is in the targets and must be 0 here.
        amp: bf16, fp16 or none.

    Returns:
        Means over the epoch and all processes: loss, lr, grad_norm.
    """
    model.train()
    return loop.run(
        epoch, update, lambda batches, averages: train_step(model, batches, update, averages, prepare, smoothing, amp)
    )


def train_step(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    update: GradientStep,
    averages: Averages,
    prepare: Prepare,
    smoothing: float = 0.0,
    amp: str = "none",
) -> StepOutcome:
    """One optimizer step: cross entropy, mean over the whole effective batch."""
    num_images, loss_sum = 0, torch.zeros((), device=averages.device)
    for micro_batch in micro_batches:
        images, targets = prepare(micro_batch.batch)
        with update.sync(micro_batch.last):
            with precision.autocast(amp, averages.device):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing, reduction="sum")
            update.backward(loss)
        num_images += len(images)
        loss_sum = loss_sum + loss.detach()
    count = torch.full((), float(num_images), device=averages.device)
    outcome = update.apply(count, loss_sum, num_images)
    averages.add("loss", outcome.counted(loss_sum), outcome.counted(count))
    return outcome


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable, prepare: Prepare, device: torch.device, amp: str = "none"
) -> dict[str, float]:
    """Accuracy over all processes, each image counted once.

    Args:
        model: the bare module, not in DistributedDataParallel: processes may have different numbers of batches.
        batches: this process's share of the images, without padding.
        prepare: batch -> images and classes (N,) on the device.
        device, amp: where and in which format.

    Returns:
        loss (mean cross entropy), acc1 and acc5 (percent), images (counted, over all processes).
    """
    model.eval()
    averages, counted = Averages(device), torch.zeros((), device=device)
    # Every process needs every name, also one without images.
    for name in ("loss", "acc1", "acc5"):
        averages.add(name, 0.0, 0.0)
    for batch in batches:
        images, targets = prepare(batch)
        with precision.autocast(amp, device):
            logits = model(images)
        top5 = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
        hits = top5 == targets[:, None]  # (N, 5)
        averages.add("loss", F.cross_entropy(logits.float(), targets, reduction="sum"), len(images))
        averages.add("acc1", 100.0 * hits[:, :1].sum(), len(images))
        averages.add("acc5", 100.0 * hits.sum(), len(images))
        counted += len(images)
    return averages.read() | {"images": int(dist.all_reduce(counted))}
