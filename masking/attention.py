"""Masks out of attention maps of whole images: AM and AMT (Gui et al.), which throw tokens as well."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from masking.base import check_number, check_ratio, draw_noise, keep_count, register
from masking.mask import Mask, mask_from_scores
from util.precision import full_fp32
from util.ratios import exact_ratio


def attention_map(attention: torch.Tensor) -> torch.Tensor:
    """Average the attention of the class token to the patches over its heads, each stretched to [0, 1].

    Args:
        attention: (N, heads, L), after the softmax.

    Returns:
        (N, L) in [0, 1]; a head that attends to all patches alike counts 1 everywhere.
    """
    above = attention - attention.amin(dim=2, keepdim=True)
    highest = above.amax(dim=2, keepdim=True)
    return torch.where(highest > 0, above / highest.clamp_min(1e-30), 1.0).mean(dim=1)


def crop_map(
    maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], patch: tuple[int, int] = (1, 1), released=False
) -> torch.Tensor:
    """Cut, enlarge and flip the maps of whole images as their crops are, and sum them over each patch of the crop.

    Args:
        maps: (N, rows, columns), stretched over the whole image each.
        boxes: (N, 7), see `masking.NEEDS`.
        size: height and width of the crop in pixels.
        patch: height and width of a patch in pixels.
        released: cut as the authors' release does, always near the upper left corner whatever the crop.

    Returns:
        (N, height / patch height, width / patch width), sums of bilinear samples, one sample for each pixel.
    """
    top, left, tall, wide, height, width, flipped = boxes.to(maps.device, maps.dtype)[:, :, None].unbind(1)
    with full_fp32(maps.device.type):
        down = _sampling(maps.shape[1], top, tall, height, size[0], patch[0], released)
        right = _sampling(maps.shape[2], left, wide, width, size[1], patch[1], released)
        right = torch.where(flipped[..., None] > 0, right.flip(1), right)
        return down @ maps @ right.transpose(1, 2)


def _sampling(
    cells: int, start: torch.Tensor, length: torch.Tensor, whole: torch.Tensor, size: int, patch: int, released: bool
) -> torch.Tensor:
    """Return (N, size / patch, cells): what each of a map's cells gives to each patch, along one side.

    Args:
        cells: of the map along this side.
        start, length, whole: (N, 1) of the crop and of the image, in pixels.
        size, patch: of the crop's output and of a patch, in pixels.
        released: see `crop_map`.
    """
    pixel = (torch.arange(size, device=start.device, dtype=start.dtype) + 0.5) / size  # (size,) in the crop
    if released:
        first, last = (start / whole).floor(), ((start + length) / whole).floor() + 1
        used = last - first + 1
        place = first + ((used * pixel) - 0.5).clamp_min(0).minimum(used - 1)
    else:
        place = (cells * (start + pixel * length) / whole - 0.5).clamp(0, cells - 1)  # (N, size)
    distance = place[..., None] - torch.arange(cells, device=start.device, dtype=start.dtype)
    return (1 - distance.abs()).clamp_min(0).view(len(start), size // patch, patch, cells).sum(dim=2)


@register("am")
class AttentionMasking:
    """Remove the patches that the class token attends to, by a weighted draw without replacement (AM).

    The maps are of the model itself: it looks at all training images every `refresh_epochs` epochs.

    Args:
        mask_ratio: share of tokens removed, the thrown ones included, in (0, 1).
        throw_ratio: share of tokens that are thrown: neither seen nor predicted.
        released_crop: cut the maps as the authors' release does, see `crop_map`.
        refresh_epochs: epochs between two looks at all training images.
        warmup_ratio: mask ratio of the random masking before the strategy begins.
    """

    needs = frozenset({"grid", "patch_size", "maps", "boxes"})
    reads_tokens = False

    def __init__(
        self,
        mask_ratio: float | str | Fraction = 0.75,
        throw_ratio: float | str | Fraction = 0.0,
        released_crop: bool = False,
        refresh_epochs: int = 40,
        warmup_ratio: float | str | Fraction = 0.75,
    ):
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.warmup_ratio = check_ratio("warmup_ratio", warmup_ratio)
        try:
            self.throw_ratio = exact_ratio(throw_ratio, "throw_ratio")
        except ValueError as error:
            raise ValueError(f"throw_ratio is {throw_ratio!r}; it must be a number from 0 to mask_ratio") from error
        if not 0 <= self.throw_ratio < self.mask_ratio:
            raise ValueError(
                f"throw_ratio is {float(self.throw_ratio):g}, but mask_ratio {float(self.mask_ratio):g} counts all "
                "removed tokens, the thrown ones too; throw_ratio must be at least 0 and below it"
            )
        if isinstance(refresh_epochs, bool) or check_number("refresh_epochs", refresh_epochs, minimum=1) % 1:
            raise ValueError(f"refresh_epochs is {refresh_epochs!r}; it must be a whole number of at least 1")
        if not isinstance(released_crop, bool):
            raise ValueError(f"released_crop is {released_crop!r}; it must be true or false")
        self.refresh_epochs, self.released_crop = int(refresh_epochs), released_crop

    def __call__(
        self,
        tokens: torch.Tensor,
        noise: torch.Tensor | None = None,
        *,
        grid: tuple[int, int],
        patch_size: tuple[int, int],
        maps: torch.Tensor,
        boxes: torch.Tensor,
    ) -> Mask:
        """Mask tokens (N, L, D): of the highest weights the first are predicted, the next thrown, the rest kept."""
        size = grid[0] * patch_size[0], grid[1] * patch_size[1]
        weights = crop_map(maps.float(), boxes, size, patch_size, self.released_crop).flatten(1)  # (N, L)
        # Descending w / e with e ~ Exp(1) is a draw without replacement, with probabilities in proportion to w.
        exponential = (-torch.log1p(-draw_noise(tokens, noise).double())).clamp_min(1e-300)
        num_tokens = tokens.shape[1]
        num_keep = keep_count(num_tokens, self.mask_ratio)
        num_predicted = max(1, math.floor(num_tokens * (self.mask_ratio - self.throw_ratio)))
        num_thrown = num_tokens - num_keep - num_predicted if self.throw_ratio else 0
        return mask_from_scores(weights / exponential, num_keep, num_thrown=num_thrown)


@register("amt")
class AttentionThrowing(AttentionMasking):
    """Mask as `am`, and throw a part (AMT): by default 45% are predicted, 40% thrown and 15% kept.

    Args:
        mask_ratio: share of tokens removed, the thrown ones included.
        throw_ratio, released_crop, refresh_epochs, warmup_ratio: as for `am`.
    """

    def __init__(
        self,
        mask_ratio: float | str | Fraction = 0.85,
        throw_ratio: float | str | Fraction = 0.4,
        released_crop: bool = False,
        refresh_epochs: int = 40,
        warmup_ratio: float | str | Fraction = 0.75,
    ):
        super().__init__(mask_ratio, throw_ratio, released_crop, refresh_epochs, warmup_ratio)
