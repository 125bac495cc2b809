"""Mean and deviation of each channel of a data set."""

from __future__ import annotations

import torch

from util.data.datasets import ImageSet


class ChannelSums:
    """Sums for mean and deviation of each channel, over all pixels of all pictures.

    Args:
        channels: of the pictures.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.sums, self.squares = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, pixels: torch.Tensor) -> ChannelSums:
        """Count pixels (H, W, C): `uint8` as 0..1, fp32 as they are."""
        values = pixels.reshape(-1, pixels.shape[-1]).double() / (1 if pixels.is_floating_point() else 255)
        self.count += len(values)
        self.sums += values.sum(0)
        self.squares += (values**2).sum(0)
        return self

    def merge(self, other: ChannelSums) -> None:
        """Count everything that `other` has counted."""
        self.count += other.count
        self.sums += other.sums
        self.squares += other.squares

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """One number for each channel."""
        mean = self.sums / self.count
        return mean.tolist(), (self.squares / self.count - mean**2).clamp(min=0).sqrt().tolist()


def statistics_of(images: ImageSet, indices: range) -> tuple[ChannelSums, list[str]]:
    """Sums over some pictures of a set, and what was wrong with those that cannot be decoded."""
    sums, bad = ChannelSums(images.channels), []
    for index in indices:
        try:
            sums.add(images.pixels(index))
        except OSError as error:
            bad.append(str(error))
    return sums, bad
