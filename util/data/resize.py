"""Pictures made smaller once, so that every epoch decodes less; what that costs; and what a data set's channels are."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from util import seeding
from util.data import decode
from util.data.crop import draw_box
from util.data.decode import Content


def resized(
    content: Content,
    *,
    short_side: int | None = None,
    long_side: int | None = None,
    quality: int = 90,
    channels: int = 3,
    pixels: bool = False,
) -> Content:
    """A picture whose short or longest side is as asked: JPEG or, with an alpha channel, PNG; or its pixels (H, W, C).

    A JPEG that is not larger, and needs no turning or conversion, stays as it is, byte for byte. What is encoded is
    decoded again before it is given back.

    Raises:
        Exception: of any type, if the picture cannot be decoded.
    """
    mode = decode.MODES[channels]
    picture = decode.to_picture(content, mode)
    side = short_side or long_side
    scale = 1.0 if side is None else side / (min(picture.size) if short_side else max(picture.size))
    if scale >= 1 and not pixels and _is_done(content, mode):
        return content
    if scale < 1:
        size = tuple(max(1, round(scale * length)) for length in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if pixels:
        return np.asarray(picture).reshape(picture.height, picture.width, channels)
    buffer = io.BytesIO()
    if mode == "RGBA":
        Image.frombytes("RGBA", picture.size, picture.tobytes()).save(buffer, "PNG")  # see decode.to_picture
    else:
        picture.save(buffer, "JPEG", quality=quality)
    assert decode.to_picture(buffer.getvalue(), mode).size == picture.size
    return buffer.getvalue()


def _is_done(content: Content, mode: str) -> bool:
    if isinstance(content, np.ndarray):
        return False
    with Image.open(io.BytesIO(content)) as image:
        return image.format == "JPEG" and image.mode == mode and image.getexif().get(0x0112, 1) == 1


def crop_pair(original: Content, smaller: Content, number: int, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of the original and the same crop of `smaller`, both (size, size, 3), 0..255.

    The crop is that of pre-training (0.2 to 1 of the area), a function of `number`.
    """
    pictures = [decode.to_picture(content, "RGB") for content in (original, smaller)]
    with seeding.sample_state(0, 0, number):
        top, left, height, width = draw_box(*pictures[0].size, (0.2, 1.0))
    crops = []
    for picture in pictures:
        x, y = picture.width / pictures[0].width, picture.height / pictures[0].height
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        crops.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box), dtype=np.float64))
    return crops[0], crops[1]


def crop_psnr(original: Content, smaller: Content, number: int, size: int = 224) -> float:
    """PSNR in dB of the second of `crop_pair` against the first; infinity if they are equal."""
    first, second = crop_pair(original, smaller, number, size)
    error = np.mean((first - second) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
