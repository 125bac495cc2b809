"""Fixed 2-D sine-cosine position tables, and resizing of a table to another grid."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed


def sincos_2d(embed_dim: int, grid_size: tuple[int, int], cls_token: bool = True) -> torch.Tensor:
    """Compute MAE's position table, in float64.

    The first half of the channels encodes the column, the second half the row; each half is [sin, cos] of the index
    times the frequencies 10000^(-k / (embed_dim / 4)).

    Args:
        embed_dim: a multiple of 4.
        grid_size: rows and columns of patches.
        cls_token: put a row of zeros first.

    Returns:
        (1, [1 +] rows * columns, embed_dim) fp32.

    Raises:
        ValueError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim is {embed_dim}; a 2-D sine-cosine position table needs a multiple of 4")
    row, column = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in grid_size), indexing="ij")
    table = np.concatenate([_sincos_1d(embed_dim // 2, column), _sincos_1d(embed_dim // 2, row)], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, embed_dim)), table])
    return torch.from_numpy(table).float()[None]


def _sincos_1d(dim: int, position: np.ndarray) -> np.ndarray:
    frequency = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angle = position.reshape(-1, 1) * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def resize_pos_embed(
    pos_embed: torch.Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """Resize a table (1, 1 + old_rows * old_columns, D) with a class token to `new_grid`, bicubic as in MAE.

    `old_grid` defaults to a square one.
    """
    return resample_abs_pos_embed(
        pos_embed, new_size=list(new_grid), old_size=list(old_grid) if old_grid else None, antialias=False
    )


def resize_for_views(pos_embed: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resize a learned table (1, 1 + rows * columns, D) for a view of another size, as DINO and iBOT do.

    Patch i of n lies at (i + 0.5) * g / (n + 0.1) - 0.5 of the table's g: not quite `resize_pos_embed`. The gradient
    reaches the table.
    """
    if tuple(grid) == tuple(new_grid):
        return pos_embed
    image = pos_embed[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2).float()  # (1, D, rows, columns)
    factors = [(new + 0.1) / old for new, old in zip(new_grid, grid, strict=True)]
    image = F.interpolate(image, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([pos_embed[:, :1], image.flatten(2).transpose(1, 2)], dim=1)
