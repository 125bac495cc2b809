"""From a PIL image to a `uint8` tensor on the host, and from there to normalised floats on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as F

from util.data.crop import PictureCrop, PixelCrop, SingleDrawResizedCrop

Size = tuple[int, int]  # height and width in pixels


def pretrain_transform(size: Size, scale: tuple[float, float], hflip: float, exact: bool = False) -> PixelCrop:
    """Build MAE's pre-training augmentation: random resized crop, bicubic, draw of the flip; exact: as Pillow's."""
    return (PictureCrop if exact else PixelCrop)(size, scale, hflip)


def probe_transform(size: Size, scale: tuple[float, float], hflip: float, crop: str = "mae") -> Callable:
    """Build the augmentation of linear probing: MAE's own crop or "torchvision"'s (bilinear), and flip."""
    crop = (SingleDrawResizedCrop if crop == "mae" else transforms.RandomResizedCrop)(size, scale)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(hflip), transforms.PILToTensor()])


def finetune_transform(
    size: Size,
    scale: tuple[float, float],
    hflip: float,
    auto_augment: str | None,
    color_jitter: float | None,
    mean: tuple[float, ...],
) -> Callable:
    """Build timm's training augmentation, as MAE uses it; random erasing comes later, on normalised images.

    Raises:
        ValueError: `auto_augment` is no policy that timm knows.
    """
    try:
        return create_transform(
            size,
            is_training=True,
            scale=scale,
            hflip=hflip,
            color_jitter=color_jitter or 0.0,
            auto_augment=auto_augment,
            interpolation="bicubic",
            mean=mean,
            normalize=False,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--aa {auto_augment}: no policy of timm's, such as rand-m9-mstd0.5-inc1") from error


def evaluation_transform(size: Size, crop_pct: float | None) -> Callable:
    """Resize to size / crop_pct, bicubic, and centre crop. Default crop_pct: 224/256 up to 224 pixels, above it 1.

    The ends of a very thin image, which the crop would cut off anyway, go first: resized, 1 x 8000 pixels take 2 GB.
    """
    crop_pct = crop_pct or (224 / 256 if max(size) <= 224 else 1.0)
    timms = create_transform(
        size if size[0] != size[1] else size[0],
        is_training=False,
        crop_pct=crop_pct,
        interpolation="bicubic",
        normalize=False,
    )
    return transforms.Compose([partial(_without_ends, longest=16 * max(size) / min(size)), *timms.transforms])


def _without_ends(image: Image.Image, longest: float) -> Image.Image:
    """Return the middle of `image`: its long side at most `longest` times its short one."""
    width, height = (min(side, math.ceil(longest * min(image.size))) for side in image.size)
    return image if image.size == (width, height) else F.center_crop(image, [height, width])


def channel_statistics(
    in_chans: int, mean: list[float] | None, std: list[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation of each channel: the given ones, else ImageNet's for RGB, else 0.5.

    Raises:
        ValueError: not one finite number per channel, or a deviation that is not positive.
    """
    defaults = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if in_chans == 3 else ((0.5,) * in_chans,) * 2
    chosen = []
    for name, given, default in zip(("mean", "std"), (mean, std), defaults, strict=True):
        if given and len(given) != in_chans:
            raise ValueError(f"--{name} {given}: give one number for each of the {in_chans} channels")
        if given and not all(map(math.isfinite, given)):
            raise ValueError(f"--{name} {given}: every number must be finite")
        chosen.append(tuple(given) if given else tuple(default))
    if min(chosen[1]) <= 0:
        raise ValueError(f"--std {std}: a deviation must be above 0")
    return chosen[0], chosen[1]


class Normalize(nn.Module):
    """Images (N, C, H, W) -> flipped and normalised fp32, (x - mean) / std per channel, on the images' device.

    `uint8` counts as 0..1, that is x / 255; floats are taken as they are, in the unit of `mean` and `std`.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        keep = {"persistent": False}  # they belong to the settings, not to the weights
        self.register_buffer("scale", 1 / torch.tensor(std).view(1, -1, 1, 1), **keep)
        self.register_buffer("byte_scale", 1 / (255 * torch.tensor(std).view(1, -1, 1, 1)), **keep)
        self.register_buffer("shift", -(torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1), **keep)

    def forward(self, images: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise images (N, C, H, W), `uint8` or floats; flip those of `flips` (N,) bool horizontally."""
        if flips is not None:
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        scale = self.scale if images.is_floating_point() else self.byte_scale
        return torch.addcmul(self.shift, images.float(), scale)
