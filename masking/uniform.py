"""Masking that does not look at the image."""

from __future__ import annotations

from fractions import Fraction

import torch

from masking.base import check_ratio, check_rounding, draw_noise, keep_count, register
from masking.cells import Cells, check_cell
from masking.mask import Mask


@register("random")
class RandomMasking:
    """Remove a uniformly random set of tokens, the same number in every image (MAE).

    Args:
        mask_ratio: share of tokens removed, in (0, 1); a number, or an exact fraction such as "32/49".
        cell: side in patches of the square cells that are removed as a whole; 4 is Pixio's grid.
        rounding: "kept" rounds the number of kept cells up, as the SBAM paper (MAE's code down); "removed" that of
            removed ones up, as SimMIM.
    """

    def __init__(self, mask_ratio: float | str | Fraction = 0.75, cell: int = 1, rounding: str = "kept"):
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.cell, self.rounding = check_cell(cell), check_rounding(rounding)
        self.needs = frozenset() if cell == 1 else frozenset({"grid"})
        self.reads_tokens = False  # so the model need not embed the patches that will be removed

    def __call__(
        self, tokens: torch.Tensor, noise: torch.Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Mask:
        """Rank by noise: tokens (N, L, D), noise (N, L) in [0, 1), grid (rows, columns) -> Mask."""
        cells = Cells.on(grid, tokens.shape[1], self.cell)
        scores = draw_noise(tokens, noise, cells.count)
        return cells.mask(scores, keep_count(cells.count, self.mask_ratio, self.rounding))
