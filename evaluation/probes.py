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


def attentive_probe(train: Labelled, val: Labelled, **options) -> float:
    """Do the same on patch tokens (n, L, D), which a learned query pools by attention before the linear classifier."""
    width, classes = train[0].shape[-1], int(train[1].max()) + 1

    def build() -> nn.Module:
        pool = AttentionPoolLatent(width, num_heads=1, mlp_ratio=4.0, norm_layer=nn.LayerNorm)
        return nn.Sequential(pool, nn.LayerNorm(width), nn.Linear(width, classes))

    return fit_probe(build, train, val, **options)


class Standardize(nn.Module):
    """Shift and scale each channel of features (n, ..., D) to mean 0 and deviation 1 over all of them."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        axes = tuple(range(features.ndim - 1))
        self.register_buffer("mean", features.float().mean(axes))
        self.register_buffer("std", features.float().std(axes).clamp_min(1e-6))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Standardise features (n, ..., D) by the numbers of the others."""
        return (features.float() - self.mean) / self.std


def fit_probe(build: Callable[[], nn.Module], train: Labelled, val: Labelled, **options) -> float:
    """Train a head on cached features, and return the percentage of `val` that it gets right; see `fit_head`."""
    head = fit_head(build, *train, **options)
    return _accuracy(head, val, options.get("batch_size", 256))


def fit_head(
    build: Callable[[], nn.Module],
    features: torch.Tensor,
    targets: torch.Tensor,
    *,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
    epochs: int = 50,
    lr: float = 2e-3,
    weight_decay: float = 1e-4,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train a head on cached, standardised features: AdamW, half a cosine.

    There is no augmentation: this is quick and a little different from `main_linprobe.py`.

    Args:
        build: makes the head; called with the random state of `seed`, which the caller's is given back after.
        features, targets: (n, ..., D) and (n, ...).
        loss: of the head's outputs and the targets.
        epochs, lr, weight_decay, batch_size: of the training.
        seed: of the head's weights and of the order.
        device: where to train; the features stay where they are and go there batch by batch.

    Returns:
        The head behind the standardisation, in evaluation mode, on the device.
    """
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(Standardize(features), build()).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    for epoch in range(epochs):
        rate = lr_sched.learning_rate(epoch, lr=lr, min_lr=0.0, warmup_epochs=0, epochs=epochs)
        lr_sched.set_learning_rate(optimizer, rate)
        for index in torch.randperm(len(features), generator=order).split(batch_size):
            outputs = head(features[index].to(device))
            optimizer.zero_grad()
            loss(outputs, targets[index].to(device)).backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def _accuracy(head: nn.Module, val: Labelled, batch_size: int) -> float:
    right, device = 0, next(head.parameters()).device
    for features, targets in zip(val[0].split(batch_size), val[1].split(batch_size), strict=True):
        right += int((head(features.to(device)).argmax(-1).cpu() == targets).sum())
    return 100 * right / len(val[0])
