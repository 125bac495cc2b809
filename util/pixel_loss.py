"""MAE's loss on the pixels of patches."""

from __future__ import annotations

import torch


def squared_errors(target: torch.Tensor, pred: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Return the mean squared error of each patch.

    Args:
        target, pred: (..., P).
        normalize: compare with targets normalised by their own mean and (unbiased) deviation.

    Returns:
        (...), fp32.
    """
    target = target.float()
    if normalize:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (pred.float() - target).square().mean(dim=-1)


def masked_mean_squared_error(
    target: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor, normalize: bool
) -> torch.Tensor:
    """Average the errors of target and prediction (..., P) over the patches, weighted by mask (...): 0-dim."""
    return (squared_errors(target, pred, normalize) * mask).sum() / mask.sum()
