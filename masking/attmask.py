"""AttMask (Kakogeorgiou et al., ECCV 2022): what the teacher's class token attends to in the last block."""

from __future__ import annotations

from fractions import Fraction

import torch

from masking.base import check_ratio, check_share, draw_noise, keep_count, register
from masking.mask import Mask, mask_from_scores, ranks
from masking.replaced import Ratios, Replaced, highest


@register("attmask_high")
class AttMaskHigh:
    """Mask the tokens of the highest attention, averaged over the heads.

    Under a method that replaces tokens, one ratio is drawn for all images of a step, and a share of the images is left
    whole.

    Args:
        mask_ratio: share of tokens removed, in (0, 1), where the method draws none.
    """

    needs = frozenset({"attention"})
    reads_tokens = False
    ratio_per = "step"
    sign = 1

    def __init__(self, mask_ratio: float | str | Fraction = 0.75):
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)

    def __call__(self, tokens: torch.Tensor, noise: torch.Tensor | None = None, *, attention: torch.Tensor) -> Mask:
        """Mask tokens (N, L, D) by attention (N, heads, L)."""
        return mask_from_scores(self.sign * attention.mean(dim=1), keep_count(tokens.shape[1], self.mask_ratio))

    def at_ratios(
        self, tokens: torch.Tensor, ratios: Ratios, noise: torch.Tensor | None = None, *, attention: torch.Tensor
    ) -> Replaced:
        """Replace tokens (N, L, D) at the ratio of each image."""
        counts = [int(tokens.shape[1] * ratio) for ratio in ratios.rows]
        return highest(ranks(self.sign * attention.mean(dim=1)), counts)


@register("attmask_low")
class AttMaskLow(AttMaskHigh):
    """Mask the tokens of the lowest attention.

    Args:
        mask_ratio: as for `attmask_high`.
    """

    sign = -1


@register("attmask_hint")
class AttMaskHint(AttMaskHigh):
    """Mask as `attmask_high`, and reveal some of the tokens of the very highest attention.

    Args:
        mask_ratio: as for `attmask_high`; the revealed ones count as removed in it.
        show_max: share of all tokens among which the revealed ones are drawn, in [0, 1].
    """

    def __init__(self, mask_ratio: float | str | Fraction = 0.75, show_max: float = 0.1):
        super().__init__(mask_ratio)
        self.show_max = check_share("show_max", show_max)

    def __call__(self, tokens: torch.Tensor, noise: torch.Tensor | None = None, *, attention: torch.Tensor) -> Mask:
        """Mask tokens (N, L, D) by attention (N, heads, L); noise (N, L) in [0, 1) draws the revealed ones."""
        num_tokens, ratio = tokens.shape[1], float(self.mask_ratio)
        rank = ranks(attention.mean(dim=1))
        scores = torch.where(self._revealed(rank, draw_noise(tokens, noise), ratio), -1, rank)
        return mask_from_scores(scores, keep_count(num_tokens, self.mask_ratio) + self._numbers(num_tokens, ratio)[0])

    def at_ratios(
        self, tokens: torch.Tensor, ratios: Ratios, noise: torch.Tensor | None = None, *, attention: torch.Tensor
    ) -> Replaced:
        """Replace tokens (N, L, D) at the ratio of each image; noise (N, L) in [0, 1) draws the revealed ones."""
        rank, counts = ranks(attention.mean(dim=1)), [int(tokens.shape[1] * ratio) for ratio in ratios.rows]
        masked = highest(rank, counts)
        shown, top = self._numbers(tokens.shape[1], ratios.second)
        # Of a mask that is smaller than the top, the device alone knows how many of the revealed ones it held.
        total = masked.total - shown * sum(count > 0 for count in counts)
        known = all(count == 0 or count >= top for count in counts)
        mask = masked.mask & ~self._revealed(rank, draw_noise(tokens, noise), ratios.second)
        return Replaced(mask, total if known else None)

    def _numbers(self, num_tokens: int, ratio: float) -> tuple[int, int]:
        """Return how many tokens are revealed, and among how many."""
        return int(self.show_max * ratio * num_tokens), int(num_tokens * self.show_max)

    def _revealed(self, rank: torch.Tensor, noise: torch.Tensor, ratio: float) -> torch.Tensor:
        """Return (N, L) bool: among the tokens of the highest rank (N, L), those of the lowest noise (N, L)."""
        shown, top = self._numbers(rank.shape[1], ratio)
        among_top = rank >= rank.shape[1] - top
        return among_top & (ranks(torch.where(among_top, noise, torch.inf)) < shown)
