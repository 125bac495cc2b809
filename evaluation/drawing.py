"""A picture of what masking and reconstruction do: one row an image, one column a view of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Column:
    """One view of every image.

    Attributes:
        title: above the column.
        pictures: (N, C, H, W) in 0..1, or maps (N, H, W) in 0..1, drawn in colours.
        captions: one under each picture, or nothing.
        hatched: (N, rows, columns) bool, the patches that are hatched, or None.
        quantity: what maps show, for the colour bar.
    """

    title: str
    pictures: torch.Tensor
    captions: tuple[str, ...] = ()
    hatched: torch.Tensor | None = None
    quantity: str = ""


def hide(images: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int], grey: float = 0.5) -> torch.Tensor:
    """Paint the removed patches of mask (N, L) grey in images (N, C, H, W); `draw` hatches them."""
    return torch.where(_pixel_mask(images, mask, grid), torch.full_like(images, grey), images)


def paste(
    images: torch.Tensor, reconstruction: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Put the reconstruction (N, C, H, W) where mask (N, L) removed patches, and the images elsewhere."""
    return torch.where(_pixel_mask(images, mask, grid), reconstruction, images)


def denormalize_patches(pred: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Undo `norm_pix_loss`: predicted patches (N, L, P) with mean and deviation of the true patches (N, L, P)."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return pred * (variance + 1e-6).sqrt() + mean


def draw(columns: list[Column], *, cell: float = 1.5) -> Figure:
    """Draw the columns side by side. Maps share the scale 0..1 and a colour bar; `cell`: an image's width in inches."""
    from matplotlib.figure import Figure  # half a second, which only what draws should wait for

    rows = len(columns[0].pictures)
    height, width = columns[0].pictures.shape[-2:]
    lines = max(column.title.count("\n") for column in columns) + 1
    captions = 0.2 if any(column.captions for column in columns) else 0.05
    size = (cell * len(columns) + 0.9, (0.94 * cell * height / width + captions) * rows + 0.17 * lines + 0.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    shown = None
    for place, column in enumerate(columns):
        axes[0, place].set_title(column.title, fontsize=8)
        for row in range(rows):
            axis = axes[row, place]
            axis.set_xticks([])
            axis.set_yticks([])
            if column.pictures.ndim == 3:
                shown = axis.imshow(column.pictures[row].numpy(), cmap="viridis", vmin=0, vmax=1)
            else:
                axis.imshow(_pixels(column.pictures[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if column.hatched is not None:
                _hatch(axis, column.hatched[row], (height, width))
            if column.captions:
                axis.set_xlabel(column.captions[row], fontsize=7, labelpad=2)
    if shown is not None:
        quantities = dict.fromkeys(column.quantity for column in columns if column.quantity)
        figure.colorbar(shown, ax=axes, label=", ".join(quantities), fraction=0.02, pad=0.01)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure to `path`; the suffix chooses the format (PNG, PDF)."""
    figure.savefig(path, dpi=150)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file, for notebooks."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _pixel_mask(images: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return (N, 1, H, W) bool from a mask (N, L)."""
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    return mask.bool().view(-1, 1, *grid).repeat_interleave(height, 2).repeat_interleave(width, 3)


def _hatch(axis, patches: torch.Tensor, size: tuple[int, int]) -> None:
    """Draw lines over the True ones of patches (rows, columns): grey alone could be a grey patch of the picture."""
    height, width = size[0] / patches.shape[0], size[1] / patches.shape[1]
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5  # a pixel's centre is at its number
    places = patches.nonzero().numpy()[:, ::-1] * (width, height)  # (patches, 2), x before y
    squares = corners + places[:, None]  # (patches, 4, 2)
    from matplotlib.collections import PolyCollection

    lines = {"hatch": "/////", "edgecolor": "0.25", "linewidth": 0}
    axis.add_collection(PolyCollection(squares, facecolor="none", **lines), autolim=False)


def _pixels(picture: torch.Tensor) -> np.ndarray:
    picture = picture.clamp(0, 1)
    return picture[0].numpy() if len(picture) == 1 else picture[:3].permute(1, 2, 0).numpy()
