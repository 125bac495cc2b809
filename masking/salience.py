"""Salience-Based Adaptive Masking (SBAM) and its per-image Adaptive Masking Ratio (AMR), ECCV 2024."""

from __future__ import annotations

import functools
from fractions import Fraction

import torch

from masking.base import Mask, check_number, check_ratio, draw_noise, keep_count, mask_from_scores, register
from util.precision import full_fp32

# Column sums average 1; a spread below this is rounding, not salience.
_FLAT = 1e-5


@torch.no_grad()
def token_salience(tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """How much the other tokens of an image draw on each token, Eq. 3-4 of the SBAM paper.

    A = softmax over rows of X X^T / temperature; S = column sums of A, min-max-normalised per image.

    Args:
        tokens: X (N, L, D), patch embedding + position embedding; any float dtype, computed in fp32.
        temperature: divides the inner products; 1 is the paper's.

    Returns:
        S (N, L) fp32 in [0, 1]; 0 everywhere for an image whose tokens are all equally salient.
    """
    with full_fp32(tokens.device.type):
        x = tokens.detach().float()
        affinity = torch.softmax(x @ x.transpose(1, 2) / temperature, dim=-1)  # (N, L, L)
        salience = affinity.sum(dim=1)  # (N, L)
        low, high = salience.aminmax(dim=1, keepdim=True)
        spread = high - low
        return torch.where(spread > _FLAT, (salience - low) / spread.clamp_min(_FLAT), torch.zeros_like(salience))


def adaptive_mask_ratio(salience: torch.Tensor, mask_ratio: float, delta_r: float, delta: float) -> torch.Tensor:
    """Mask ratio of each image, Eq. 7: r - delta_r + 2 delta_r mean(S > delta), never averaged over the batch.

    Args:
        salience: (N, L) in [0, 1].
        mask_ratio: base ratio r.
        delta_r: half the width of the range of ratios.
        delta: salience above which a token counts as salient.

    Returns:
        (N,) ratios in [r - delta_r, r + delta_r].
    """
    return mask_ratio - delta_r + 2 * delta_r * (salience > delta).float().mean(dim=1)


@register("sbam")
class SBAM:
    """Remove the salient tokens: rank by S + randomness * noise, keep the K lowest, K equal for all images.

    Args:
        mask_ratio: share of tokens removed, in (0, 1).
        randomness: width of the uniform noise added to the salience; 0.5 is the paper's, 0 is its ablation.
        temperature: divides the inner products before the softmax; 1 is the paper's.
        delta: salience above which a token counts as salient (here for the log only).
    """

    def __init__(self, mask_ratio: float = 0.75, randomness: float = 0.5, temperature: float = 1.0, delta: float = 0.1):
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.randomness = check_number("randomness", randomness)
        self.temperature = check_number("temperature", temperature, exclusive=True)
        self.delta = check_number("delta", delta)

    def __call__(self, tokens: torch.Tensor, noise: torch.Tensor | None = None) -> Mask:
        """tokens (N, L, D), noise (N, L) in [0, 1) -> Mask; the tokens with the lowest scores are kept."""
        salience = token_salience(tokens, self.temperature)
        scores = salience + self.randomness * draw_noise(tokens, noise)
        num_salient = (salience > self.delta).sum(dim=1)  # (N,)
        stats = {"salient_share": num_salient / tokens.shape[1]}
        return mask_from_scores(scores, self.num_keep(num_salient, tokens.shape[1]), stats)

    def num_keep(self, num_salient: torch.Tensor, num_tokens: int) -> int | torch.Tensor:
        """Kept tokens, one int for all images or (N,), from the number of salient tokens of each image (N,)."""
        return keep_count(num_tokens, self.mask_ratio)


@register("sbam_amr")
class SBAMAdaptive(SBAM):
    """SBAM whose mask ratio follows each image: Eq. 7 on its own share of salient tokens.

    Args:
        mask_ratio: base ratio r, in (0, 1).
        delta_r: the ratios lie in [r - delta_r, r + delta_r], which must stay inside (0, 1).
        delta: salience above which a token counts as salient.
        randomness: as for SBAM.
        temperature: as for SBAM.
    """

    def __init__(
        self,
        mask_ratio: float = 0.75,
        delta_r: float = 0.15,
        delta: float = 0.1,
        randomness: float = 0.5,
        temperature: float = 1.0,
    ):
        super().__init__(mask_ratio, randomness, temperature, delta)
        self.delta_r = check_number("delta_r", delta_r)
        low, high = (Fraction(str(self.mask_ratio)) + sign * Fraction(str(self.delta_r)) for sign in (-1, 1))
        if low <= 0 or high >= 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio:g} with delta_r {self.delta_r:g} gives ratios from {float(low):g} to "
                f"{float(high):g}; all must lie between 0 and 1: lower delta_r or move mask_ratio towards 0.5"
            )

    def num_keep(self, num_salient: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """(N,) counts of salient tokens -> (N,) kept tokens."""
        return _amr_keep_table(num_tokens, self.mask_ratio, self.delta_r, num_salient.device)[num_salient]


@functools.lru_cache(maxsize=64)
def _amr_keep_table(num_tokens: int, mask_ratio: float, delta_r: float, device: torch.device) -> torch.Tensor:
    """(L + 1,) kept tokens for 0..L salient ones: Eq. 7 and K in exact arithmetic, the same on every device."""
    low = Fraction(str(mask_ratio)) - Fraction(str(delta_r))
    step = 2 * Fraction(str(delta_r)) / num_tokens
    table = [keep_count(num_tokens, low + step * salient) for salient in range(num_tokens + 1)]
    if min(table) < 1 or max(table) >= num_tokens:
        raise ValueError(
            f"mask_ratio {mask_ratio:g} with delta_r {delta_r:g} can keep {min(table)} to {max(table)} of {num_tokens} "
            "tokens; at least one must be kept and one removed: lower delta_r, or use more patches"
        )
    return torch.tensor(table, dtype=torch.int64, device=device)
