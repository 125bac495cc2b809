"""Filtered noise in place of white noise (ColorMAE): the spectrum of the noise is that of the mask."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch

from masking.base import check_number, check_ratio, check_rounding, draw_noise, keep_count, register
from masking.mask import Mask, mask_from_scores

COLORS = ("red", "green", "blue", "purple")


@register("color")
class ColorMasking:
    """Remove the patches whose filtered noise is highest, the same number in every image (ColorMAE).

    With g a Gaussian blur of `sigma` patches and G one of twice that, white noise w becomes red noise g w (low-pass:
    large areas), blue w - g w (high-pass: evenly spread), green g w - G w (band-pass: areas of 2 to 3 patches) or
    purple w - (g w - G w) (band-stop). The blur wraps around the edges: every patch is removed equally often.

    Args:
        mask_ratio: share of patches removed, in (0, 1).
        color: red, green, blue or purple.
        sigma: standard deviation of the blur in patches.
        rounding: "kept" rounds the number of kept patches up, "removed" that of removed ones.
    """

    needs = frozenset({"grid"})
    reads_tokens = False

    def __init__(
        self,
        mask_ratio: float | str | Fraction = 0.75,
        color: str = "green",
        sigma: float = 0.8,
        rounding: str = "kept",
    ):
        self.mask_ratio, self.rounding = check_ratio("mask_ratio", mask_ratio), check_rounding(rounding)
        self.sigma = check_number("sigma", sigma, exclusive=True)
        if color not in COLORS:
            raise ValueError(f"color is {color!r}; choose {', '.join(COLORS[:-1])} or {COLORS[-1]}")
        self.color = color

    def __call__(self, tokens: torch.Tensor, noise: torch.Tensor | None = None, *, grid: tuple[int, int]) -> Mask:
        """Mask tokens (N, L, D) on a grid of (rows, columns) by filtered noise (N, L) in [0, 1)."""
        scores = self.filtered(draw_noise(tokens, noise).view(-1, *grid)).flatten(1)
        return mask_from_scores(scores, keep_count(tokens.shape[1], self.mask_ratio, self.rounding))

    def filtered(self, noise: torch.Tensor) -> torch.Tensor:
        """Filter noise (N, rows, columns) -> the same shape in double precision, where the batch size cannot matter."""
        white = noise.double() - 0.5
        low = _blur(white, self.sigma)
        if self.color == "red":
            return low
        if self.color == "blue":
            return white - low
        band = low - _blur(white, 2 * self.sigma)
        return band if self.color == "green" else white - band


def _blur(values: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur values (N, rows, columns) with a Gaussian that wraps around the edges."""
    rows, columns = (_circulant(side, sigma, values.device) for side in values.shape[1:])
    return rows @ values @ columns


@functools.lru_cache(maxsize=32)
def _circulant(side: int, sigma: float, device: torch.device) -> torch.Tensor:
    """Return the (side, side) matrix that blurs a ring of `side` values."""
    turns = math.ceil(6 * sigma / side)  # how often the Gaussian winds around the ring
    distance = torch.arange(side, dtype=torch.float64) + side * torch.arange(-turns, turns + 1)[:, None]
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2).sum(dim=0)
    offset = torch.arange(side)[:, None] - torch.arange(side)
    return (kernel / kernel.sum())[offset % side].to(device)
