"""Resize one image ahead of training, so that every epoch decodes less."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from util.data import decode
from util.data.decode import Content


def resize_image(
    content: Content,
    *,
    short_side: int | None = None,
    long_side: int | None = None,
    quality: int = 90,
    channels: int = 3,
    pixels: bool = False,
) -> Content:
    """Return an image whose short or long side has at most the given length in pixels.

    The result is a JPEG; with an alpha channel a PNG; with `pixels` an array (H, W, C). A JPEG that is not larger, and
    needs no turning or conversion, is returned as it is. What is encoded is decoded again before it is returned.

    Raises:
        Exception: of any type, if the image cannot be decoded.
    """
    mode = decode.MODES[channels]
    image = decode.to_picture(content, mode)
    side = short_side or long_side
    scale = 1.0 if side is None else side / (min(image.size) if short_side else max(image.size))
    if scale >= 1 and not pixels and _is_upright_jpeg(content, mode):
        return content
    if scale < 1:
        size = tuple(max(1, round(scale * length)) for length in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    if pixels:
        return np.asarray(image).reshape(image.height, image.width, channels)
    buffer = io.BytesIO()
    if mode == "RGBA":
        Image.frombytes("RGBA", image.size, image.tobytes()).save(buffer, "PNG")  # see decode.to_picture
    else:
        image.save(buffer, "JPEG", quality=quality)
    assert decode.to_picture(buffer.getvalue(), mode).size == image.size
    return buffer.getvalue()


def _is_upright_jpeg(content: Content, mode: str) -> bool:
    if isinstance(content, np.ndarray):
        return False
    with Image.open(io.BytesIO(content)) as image:
        return image.format == "JPEG" and image.mode == mode and decode.orientation(image) == 1
