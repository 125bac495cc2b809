"""Hard patches mining (HPM, Wang et al., 2023): the patches that are predicted worst are removed first."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from masking.base import check_ratio, draw_noise, keep_count, register
from masking.mask import Mask, mask_from_scores, remove_highest
from util.ratios import exact_ratio


@register("hpm")
class HardPatches:
    """Remove the patches whose predicted loss is highest, the rest of the removed ones at random.

    The share of hard ones among the removed grows with each epoch, from almost 0 to `final_share`. The same number is
    removed in every image.

    Args:
        mask_ratio: share of patches removed, in (0, 1).
        final_share: share of the hard patches among the removed ones in the last epoch, from 0 to 1.
    """

    needs = frozenset({"patch_loss", "epoch"})
    reads_tokens = False

    def __init__(self, mask_ratio: float | str | Fraction = 0.75, final_share: float | str | Fraction = 0.5):
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        try:
            self.final_share = exact_ratio(final_share)
        except ValueError:
            self.final_share = None
        if self.final_share is None or not 0 <= self.final_share <= 1:
            raise ValueError(f"final_share is {final_share!r}; it must be a number from 0 to 1")

    def __call__(
        self,
        tokens: torch.Tensor,
        noise: torch.Tensor | None = None,
        *,
        patch_loss: torch.Tensor,
        epoch: tuple[int, int],
    ) -> Mask:
        """Mask tokens (N, L, D) by predicted losses (N, L) in the first of `epoch`, of as many as the second says."""
        num_tokens = tokens.shape[1]
        num_keep = keep_count(num_tokens, self.mask_ratio)
        hard = remove_highest(patch_loss.float(), self.hard_count(num_tokens - num_keep, *epoch))
        return mask_from_scores(draw_noise(tokens, noise).masked_fill(hard, 2.0), num_keep)

    def hard_count(self, num_removed: int, epoch: int, epochs: int) -> int:
        """Return how many of `num_removed` patches are hard ones in the 0-based `epoch` of `epochs`, exactly."""
        return math.floor(num_removed * self.final_share * min(epoch + 1, epochs) / max(epochs, 1))
