"""A picture of what masking and reconstruction do: one row an image, one column a view of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Column:
    """One view of every image.

    Attributes:
        title: above the column.
        pictures: (N, C, H, W) in 0..1, or maps (N, H, W) drawn in colours.
        captions: one under each picture, or nothing.
    """

    title: str
    pictures: torch.Tensor
    captions: tuple[str, ...] = ()


def hide(images: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int], grey: float = 0.5) -> torch.Tensor:
    """Images (N, C, H, W) with the removed patches of mask (N, L) painted grey."""
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    pixels = mask.view(-1, 1, *grid).repeat_interleave(height, 2).repeat_interleave(width, 3)
    return torch.where(pixels, torch.full_like(images, grey), images)


def paste(
    images: torch.Tensor, reconstruction: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """The reconstruction (N, C, H, W) where mask (N, L) removed patches, the images elsewhere."""
    hidden = hide(torch.zeros_like(images), mask, grid, grey=1.0) > 0
    return torch.where(hidden, reconstruction, images)


def denormalize_patches(pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Undo `norm_pix_loss`: predicted patches (N, L, P) with mean and deviation of the true patches (N, L, P)."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return pred * (variance + 1e-6).sqrt() + mean


def draw(columns: list[Column], path: Path, *, map_label: str = "salience", cell: float = 1.35) -> None:
    """Write the columns side by side to `path` (PNG or PDF). Maps share the scale 0..1 and a colour bar."""
    rows = len(columns[0].pictures)
    figure, axes = plt.subplots(
        rows,
        len(columns),
        figsize=(cell * len(columns) + 0.9, (cell + 0.22) * rows + 0.5),
        squeeze=False,
        layout="constrained",
    )
    shown = None
    for place, column in enumerate(columns):
        axes[0, place].set_title(column.title, fontsize=9)
        for row in range(rows):
            axis = axes[row, place]
            axis.set_xticks([])
            axis.set_yticks([])
            if column.pictures.ndim == 3:
                shown = axis.imshow(column.pictures[row].numpy(), cmap="viridis", vmin=0, vmax=1)
            else:
                axis.imshow(_pixels(column.pictures[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if column.captions:
                axis.set_xlabel(column.captions[row], fontsize=7, labelpad=2)
    if shown is not None:
        figure.colorbar(shown, ax=axes, label=map_label, fraction=0.02, pad=0.01)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pixels(picture: torch.Tensor) -> np.ndarray:
    picture = picture.clamp(0, 1)
    return picture[0].numpy() if len(picture) == 1 else picture[:3].permute(1, 2, 0).numpy()
