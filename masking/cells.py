"""Square cells of c x c patches: what some strategies remove as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from masking.mask import Mask, mask_from_scores, ranks


def check_cell(cell: int) -> int:
    """Return `cell` if it is a positive whole number; ValueError otherwise."""
    if isinstance(cell, bool) or not isinstance(cell, int) or cell < 1:
        raise ValueError(f"cell is {cell!r}; it must be a whole number of at least 1, the side of a cell in patches")
    return cell


@dataclass(frozen=True)
class Cells:
    """Cells of `side` x `side` patches on a grid of `rows` x `columns` patches, both row-major.

    Raises:
        ValueError: the grid is not a whole number of cells.
    """

    rows: int
    columns: int
    side: int

    def __post_init__(self):
        if self.rows % self.side or self.columns % self.side:
            raise ValueError(
                f"cell is {self.side}, but the images have {self.rows} x {self.columns} patches; "
                "choose a cell that divides both, or another --input_size"
            )

    @staticmethod
    def on(grid: tuple[int, int] | None, num_tokens: int, side: int) -> Cells:
        """Lay cells over the `grid` of an image of `num_tokens` patches; without cells (side 1) no grid is needed."""
        rows, columns = (1, num_tokens) if side == 1 else grid
        return Cells(rows, columns, side)

    @property
    def count(self) -> int:
        """Return the number of cells."""
        return (self.rows // self.side) * (self.columns // self.side)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average values of tokens (N, L) over each cell -> (N, count)."""
        tall, wide = self.rows // self.side, self.columns // self.side
        return values.view(len(values), tall, self.side, wide, self.side).mean(dim=(2, 4)).flatten(1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Give each token the value of its cell: (N, count) -> (N, L)."""
        image = values.view(len(values), self.rows // self.side, self.columns // self.side)
        return image.repeat_interleave(self.side, 1).repeat_interleave(self.side, 2).flatten(1)

    def mask(self, scores: torch.Tensor, num_keep: int | torch.Tensor, stats: dict | None = None) -> Mask:
        """Keep the `num_keep` lowest-scored cells of each image, as `mask_from_scores` does tokens.

        Args:
            scores: (N, count).
            num_keep: one int for all images, or (N,) integers: cells, between 1 and count - 1.
            stats: handed through to `Mask.stats`.

        Raises:
            ValueError: all cells would be kept.
        """
        if not isinstance(num_keep, torch.Tensor) and not 0 < num_keep < self.count:
            least = f"; the ratio must be at least 1/{self.count}" if self.count > 1 else ""
            raise ValueError(
                f"the mask ratio would keep {num_keep} of {self.count} cells of {self.side} x {self.side} patches; at "
                f"least one must be kept and one removed{least}: change the ratio, the cell or the image size"
            )
        if self.side == 1:
            return mask_from_scores(scores, num_keep, stats)
        rank = ranks(scores)  # equal scores of two cells must not mix their tokens
        return mask_from_scores(self.spread(rank), num_keep * self.side**2, stats)
