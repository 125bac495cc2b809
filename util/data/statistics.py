"""Sums from which mean and standard deviation of a data set's channels follow."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from util.data.datasets import ImageSet


def channel_sums(images: ImageSet, indices: Iterable[int]) -> tuple[torch.Tensor, list[str]]:
    """Sum over all pixels of some images; such sums may be added.

    Returns:
        (3, C), fp64: number of the pixels, sum of their values, sum of the squares; `uint8` counts as 0..1. And one
        message for each image that cannot be decoded.
    """
    total, bad = torch.zeros(3, images.channels, dtype=torch.float64), []
    for index in indices:
        try:
            pixels = images.pixels(index)  # (H, W, C)
        except OSError as error:
            bad.append(str(error))
            continue
        values = pixels.flatten(0, 1).double() / (1 if pixels.is_floating_point() else 255)  # (H * W, C)
        total += torch.stack([torch.ones_like(values), values, values**2]).sum(1)
    return total, bad
