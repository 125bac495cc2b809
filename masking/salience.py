"""Salience-Based Adaptive Masking (SBAM) and its per-image Adaptive Masking Ratio (AMR), ECCV 2024."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction

import torch

from masking.base import check_number, check_ratio, check_rounding, draw_noise, keep_count, register
from masking.cells import Cells, check_cell
from masking.mask import Mask, on_device
from masking.replaced import Ratios, Replaced, highest
from util.precision import full_fp32
from util.ratios import exact_ratio

# Column sums average 1; a spread below this is rounding, not salience.
_FLAT = 1e-5


@torch.no_grad()
def token_salience(tokens: torch.Tensor, temperature: float = 1.0, weight: str = "outgoing") -> torch.Tensor:
    """Compute how much the other tokens of an image draw on each token, Eq. 3-4 of the SBAM paper.

    A = softmax over rows of X X^T / temperature; S = column sums of A, min-max-normalised per image.

    Args:
        tokens: X (N, L, D), patch embedding + position embedding; any float dtype, computed in fp32.
        temperature: divides the inner products; 1 is the paper's.
        weight: "outgoing" sums the columns, the paper's: what a token gives to all. "incoming" is what a token takes
            from the others; the rows of A sum to 1, so that is 1 - a_ii.

    Returns:
        S (N, L) fp32 in [0, 1]; 0 everywhere for an image whose tokens are all equally salient.
    """
    with full_fp32(tokens.device.type):
        x = tokens.detach().float()
        affinity = torch.softmax(x @ x.transpose(1, 2) / temperature, dim=-1)  # (N, L, L)
        if weight == "outgoing":
            return min_max(affinity.sum(dim=1))  # (N, L)
        return min_max(1 - affinity.diagonal(dim1=1, dim2=2))


def min_max(values: torch.Tensor) -> torch.Tensor:
    """Stretch the values of each image (N, L) to [0, 1]; 0 everywhere for an image whose values are all equal."""
    low, high = values.aminmax(dim=1, keepdim=True)
    spread = high - low
    return torch.where(spread > _FLAT, (values - low) / spread.clamp_min(_FLAT), torch.zeros_like(values))


def adaptive_mask_ratio(
    salience: torch.Tensor, mask_ratio: float | str | Fraction, delta_r: float | str | Fraction, delta: float
) -> torch.Tensor:
    """Mask ratio of each image, Eq. 7: r - delta_r + 2 delta_r mean(S > delta), never averaged over the batch.

    Args:
        salience: (N, L) in [0, 1].
        mask_ratio: base ratio r; a number, or an exact fraction such as "32/49".
        delta_r: half the width of the range of ratios; likewise.
        delta: salience above which a token counts as salient.

    Returns:
        (N,) ratios in [r - delta_r, r + delta_r].
    """
    ratio, half_width = float(exact_ratio(mask_ratio, "mask_ratio")), float(exact_ratio(delta_r, "delta_r"))
    return ratio - half_width + 2 * half_width * (salience > delta).float().mean(dim=1)


@register("sbam")
class SBAM:
    """Remove the salient tokens: rank by S + randomness * noise, keep the K lowest, K equal for all images.

    Args:
        mask_ratio: share of tokens removed, in (0, 1); a number, or an exact fraction such as "32/49".
        randomness: width of the uniform noise added to the salience; 0.5 is the paper's, 0 is its ablation.
        temperature: divides the inner products before the softmax; 1 is the paper's.
        delta: salience above which a token counts as salient (here for the log only).
        cell: side in patches of the square cells that are removed as a whole. The salience of a cell is the mean of
            its tokens', min-max-normalised again over the image, so that the noise keeps its relative width.
        rounding: "kept" rounds the number of kept cells up, as the paper; "removed" that of removed ones, as SimMIM.
        weight: "outgoing" is the paper's salience, "incoming" ours to compare it with: see `token_salience`.
    """

    def __init__(
        self,
        mask_ratio: float | str | Fraction = 0.75,
        randomness: float = 0.5,
        temperature: float = 1.0,
        delta: float = 0.1,
        cell: int = 1,
        rounding: str = "kept",
        weight: str = "outgoing",
    ):
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.randomness = check_number("randomness", randomness)
        self.temperature = check_number("temperature", temperature, exclusive=True)
        self.delta = check_number("delta", delta)
        self.cell, self.rounding = check_cell(cell), check_rounding(rounding)
        if weight not in ("outgoing", "incoming"):
            raise ValueError(f"weight is {weight!r}; choose outgoing or incoming")
        self.weight = weight
        if cell > 1:
            self.needs = frozenset({"grid"})

    def __call__(
        self, tokens: torch.Tensor, noise: torch.Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Mask:
        """Mask tokens (N, L, D) by noise (N, L) in [0, 1); the tokens with the lowest scores are kept."""
        return self._mask(tokens, noise, grid, self._kept_cells)

    def _mask(
        self, tokens: torch.Tensor, noise: torch.Tensor | None, grid: tuple[int, int] | None, kept_cells: Callable
    ) -> Mask:
        cells = Cells.on(grid, tokens.shape[1], self.cell)
        by_token = token_salience(tokens, self.temperature, self.weight)  # (N, L)
        salience = by_token if self.cell == 1 else min_max(cells.mean(by_token))  # (N, cells)
        scores = salience + self.randomness * draw_noise(tokens, noise, cells.count)
        num_salient = (self.counted(by_token, salience) > self.delta).sum(dim=1)  # (N,)
        stats = {"salient_share": num_salient / self.counted(by_token, salience).shape[1]}
        return cells.mask(scores, kept_cells(num_salient, tokens.shape[1], cells.count), stats)

    def counted(self, by_token: torch.Tensor, by_cell: torch.Tensor) -> torch.Tensor:
        """Return the salience, (N, L) of tokens or (N, cells), of which the share of salient ones is taken."""
        return by_cell

    def num_keep(self, num_salient: torch.Tensor, num_tokens: int) -> int | torch.Tensor:
        """Return the kept tokens, one int for all images or (N,), from the salient ones of each image (N,)."""
        return keep_count(num_tokens, self.mask_ratio, self.rounding)

    def _kept_cells(self, num_salient: torch.Tensor, num_tokens: int, num_cells: int) -> int | torch.Tensor:
        return self.num_keep(num_salient, num_cells)


@register("sbam_amr")
class SBAMAdaptive(SBAM):
    """Mask as SBAM, with a mask ratio of each image's own: Eq. 7 on its own share of salient tokens.

    Args:
        mask_ratio: base ratio r, in (0, 1).
        delta_r: the ratios lie in [r - delta_r, r + delta_r], which must stay inside (0, 1).
        delta: salience above which a token counts as salient.
        randomness, temperature, cell, rounding, weight: as for SBAM.
        share_of: "cells" or "tokens": of which the share of salient ones is taken where `cell` is above 1.
    """

    varies = True

    def __init__(
        self,
        mask_ratio: float | str | Fraction = 0.75,
        delta_r: float | str | Fraction = 0.15,
        delta: float = 0.1,
        randomness: float = 0.5,
        temperature: float = 1.0,
        cell: int = 1,
        rounding: str = "kept",
        share_of: str = "cells",
        weight: str = "outgoing",
    ):
        super().__init__(mask_ratio, randomness, temperature, delta, cell, rounding, weight)
        try:
            self.delta_r = exact_ratio(delta_r)
        except ValueError as error:
            raise ValueError(f"delta_r is {delta_r!r}; it must be a number of at least 0") from error
        check_number("delta_r", float(self.delta_r))
        if share_of not in ("cells", "tokens"):
            raise ValueError(f"share_of is {share_of!r}; choose cells or tokens")
        self.share_of = share_of
        low, high = self.mask_ratio - self.delta_r, self.mask_ratio + self.delta_r
        if low <= 0 or high >= 1:
            raise ValueError(
                f"mask_ratio {float(self.mask_ratio):g} with delta_r {float(self.delta_r):g} gives ratios from "
                f"{float(low):g} to {float(high):g}; all must lie between 0 and 1: lower delta_r or move mask_ratio "
                "towards 0.5"
            )

    def counted(self, by_token: torch.Tensor, by_cell: torch.Tensor) -> torch.Tensor:
        """Return the salience, (N, L) of tokens or (N, cells), of which the share of salient ones is taken."""
        return by_cell if self.share_of == "cells" else by_token

    def num_keep(self, num_salient: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Return the kept tokens (N,) from the counts of salient ones (N,)."""
        return self._table(num_tokens, num_tokens, num_salient.device)[num_salient]

    def at_ratios(self, tokens: torch.Tensor, ratios: Ratios, noise: torch.Tensor | None = None, **needed) -> Replaced:
        """Replace tokens (N, L, D) where a method draws the base ratio r of each image: Eq. 7 around it; 0 stays 0."""
        # Only the ranking is used: what `mask_ratio` would keep may not even be possible on this grid.
        mask, num_tokens = self._mask(tokens, noise, None, lambda *_: 1), tokens.shape[1]
        base = on_device(ratios.rows, torch.float64, tokens.device)
        share = (mask.stats["salient_share"].double() * num_tokens).round() / num_tokens  # fp32 is off by a hair
        own = (base + float(self.delta_r) * (2 * share - 1)).clamp(0, 1)
        counts = torch.where(base > 0, (num_tokens * own + 1e-9).floor(), 0).long()
        return highest(mask.ids_restore, counts, mask.stats)

    def _kept_cells(self, num_salient: torch.Tensor, num_tokens: int, num_cells: int) -> torch.Tensor:
        if self.share_of == "cells" or num_cells == num_tokens:
            return self.num_keep(num_salient, num_cells)
        return self._table(num_tokens, num_cells, num_salient.device)[num_salient]

    def _table(self, of: int, num_cells: int, device: torch.device) -> torch.Tensor:
        return _amr_keep_table(of, num_cells, self.mask_ratio, self.delta_r, self.rounding, device)


@functools.lru_cache(maxsize=64)
def _amr_keep_table(
    of: int, num_cells: int, mask_ratio: Fraction, delta_r: Fraction, rounding: str, device: torch.device
) -> torch.Tensor:
    """Return (of + 1,) kept cells for 0..of salient ones: Eq. 7 and K in exact arithmetic, alike on every device."""
    low, step = mask_ratio - delta_r, 2 * delta_r / of
    table = [keep_count(num_cells, low + step * salient, rounding) for salient in range(of + 1)]
    if min(table) < 1 or max(table) >= num_cells:
        raise ValueError(
            f"mask_ratio {float(mask_ratio):g} with delta_r {float(delta_r):g} can keep {min(table)} to {max(table)} "
            f"of {num_cells} tokens; at least one must be kept and one removed: lower delta_r, or use more patches"
        )
    return torch.tensor(table, dtype=torch.int64, device=device)
