"""Probes on cached features: a linear one, and an attentive one that pools the patch tokens itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import nn

from util import lr_sched

Labelled = tuple[torch.Tensor, torch.Tensor]  # features (n, ...) and classes (n,)


def linear_probe(train: Labelled, val: Labelled, **options) -> float:
    """Return the percentage of `val` that a linear classifier on features (n, D) gets right; see `fit_probe`."""
    width, classes = train[0].shape[-1], int(train[1].max()) + 1
    return fit_probe(lambda: nn.Linear(width, classes), train, val, **options)


def attentive_probe(train: Labelled, val: Labelled, heads: int = 1, **options) -> float:
    """Do the same on patch tokens (n, L, D), which a learned query pools by attention before the linear classifier."""
    width, classes = train[0].shape[-1], int(train[1].max()) + 1

    def build() -> nn.Module:
        pool = AttentionPoolLatent(width, num_heads=heads, mlp_ratio=4.0, norm_layer=nn.LayerNorm)
        return nn.Sequential(pool, nn.LayerNorm(width), nn.Linear(width, classes))

    return fit_probe(build, train, val, **options)


def fit_probe(
    build: Callable[[], nn.Module],
    train: Labelled,
    val: Labelled,
    *,
    epochs: int = 50,
    lr: float = 2e-3,
    weight_decay: float = 1e-4,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Train a head on cached features and count what it gets right: AdamW, half a cosine, cross entropy.

    Features are standardised with the mean and deviation of each channel of `train`. There is no augmentation: this is
    quick and a little different from `main_linprobe.py`.

    Args:
        build: makes the head; called with the random state of `seed`, which the caller's is given back after.
        train, val: features (n, ..., D) and classes (n,).
        epochs, lr, weight_decay, batch_size: of the training.
        seed: of the head's weights and of the order.
        device: where to train; the features stay where they are and go there batch by batch.

    Returns:
        Accuracy on `val` after the last epoch, in percent.
    """
    axes = tuple(range(train[0].ndim - 1))
    mean, std = train[0].float().mean(axes), train[0].float().std(axes).clamp_min(1e-6)
    mean, std = mean.to(device), std.to(device)
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build().to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    for epoch in range(epochs):
        rate = lr_sched.learning_rate(epoch, lr=lr, min_lr=0.0, warmup_epochs=0, epochs=epochs)
        lr_sched.set_learning_rate(optimizer, rate)
        for index in torch.randperm(len(train[0]), generator=order).split(batch_size):
            logits = head((train[0][index].to(device).float() - mean) / std)
            optimizer.zero_grad()
            F.cross_entropy(logits, train[1][index].to(device)).backward()
            optimizer.step()
    return _accuracy(head.eval(), val, mean, std, batch_size)


@torch.no_grad()
def _accuracy(head: nn.Module, val: Labelled, mean: torch.Tensor, std: torch.Tensor, batch_size: int) -> float:
    right = 0
    for features, targets in zip(val[0].split(batch_size), val[1].split(batch_size), strict=True):
        logits = head((features.to(mean.device).float() - mean) / std)
        right += int((logits.argmax(-1).cpu() == targets).sum())
    return 100 * right / len(val[0])
