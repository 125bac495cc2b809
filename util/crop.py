"""The crop of MAE's linear probing, which is not torchvision's."""

from __future__ import annotations

import math
import random

import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode


class SingleDrawResizedCrop:
    """Random resized crop from a single draw, clamped to the image.

    Area uniform in `scale`, aspect log-uniform in `ratio`, width and height rounded and clamped, place uniform.
    torchvision draws up to ten times until the crop fits, which makes smaller crops: mean area 0.435 against 0.52 on
    500 x 375 pixels.

    Args:
        size: (height, width) of the output in pixels.
        scale: range of the crop's area over the image's.
        ratio: range of width over height.
        interpolation: of the resizing.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    ):
        self.size, self.scale, self.ratio, self.interpolation = size, scale, ratio, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        """A random crop of `image`, resized."""
        width, height = image.size
        area = width * height * random.uniform(*self.scale)
        aspect = math.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
        crop_width = min(max(1, round(math.sqrt(area * aspect))), width)
        crop_height = min(max(1, round(math.sqrt(area / aspect))), height)
        top, left = random.randint(0, height - crop_height), random.randint(0, width - crop_width)
        return F.resized_crop(image, top, left, crop_height, crop_width, list(self.size), self.interpolation)
