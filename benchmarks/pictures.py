"""ImageNet-like JPEGs, made from the photographs that scikit-image brings along."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

# In the package; others would be downloaded.
_PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "rocket",
    "stereo_motorcycle",
)


def write_jpegs(folder: Path, count: int, size: tuple[int, int] = (500, 375), quality: int = 90) -> list[Path]:
    """`count` JPEGs of `size` = (width, height): random parts of the photographs, some of them mirrored."""
    import skimage.data

    arrays = [getattr(skimage.data, name)() for name in _PHOTOGRAPHS]
    photographs = [Image.fromarray(array[0] if isinstance(array, tuple) else array) for array in arrays]
    draw = random.Random(0)
    paths = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        share = draw.uniform(0.7, 1.0)
        scale = share * min(photograph.width / size[0], photograph.height / size[1])
        width, height = scale * size[0], scale * size[1]
        left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - height)
        part = photograph.resize(size, Image.LANCZOS, box=(left, top, left + width, top + height))
        if draw.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        paths.append(folder / f"{number:04}.jpg")
        part.save(paths[-1], quality=quality)
    return paths
