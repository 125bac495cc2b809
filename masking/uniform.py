"""Masking that does not look at the image."""

from __future__ import annotations

import torch

from masking.base import Mask, check_ratio, draw_noise, keep_count, mask_from_scores, register


@register("random")
class RandomMasking:
    """MAE: remove a uniformly random set of tokens, the same number in every image.

    Args:
        mask_ratio: share of tokens removed, in (0, 1).
    """

    reads_tokens = False  # so the model need not embed the patches that will be removed

    def __init__(self, mask_ratio: float = 0.75):
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)

    def __call__(self, tokens: torch.Tensor, noise: torch.Tensor | None = None) -> Mask:
        """tokens (N, L, D), noise (N, L) in [0, 1) -> Mask; tokens with the lowest noise are kept."""
        return mask_from_scores(draw_noise(tokens, noise), keep_count(tokens.shape[1], self.mask_ratio))
