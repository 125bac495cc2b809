"""The content of one picture -> pixels, upright, with the wanted channels. Whatever is wrong with it is an error."""

from __future__ import annotations

import contextlib
import io
import warnings
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

Content = bytes | np.ndarray  # an encoded file, or pixels (H, W) or (H, W, C)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name
_LARGEST = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow calls a picture a decompression bomb

# Between half of that and all of it Pillow would warn, in every worker, for every picture.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def to_picture(content: Content, mode: str) -> Image.Image:
    """A PIL image in `mode`: the first frame, turned as EXIF says, 16-bit grey scaled to 8 bits, no alpha blended.

    RGBA comes under the name CMYK, with the bands R, G, B, A: Pillow's resizing multiplies the colours of a picture
    that is called RGBA by its alpha, and so loses them where that is 0.

    Raises:
        Exception: of any type, if it cannot be decoded; libraries raise many.
    """
    pixels = _plain_jpeg(content) if mode == "RGB" else None
    return with_pillow(content, mode) if pixels is None else Image.fromarray(pixels.numpy())


def with_pillow(content: Content, mode: str) -> Image.Image:
    """The same by Pillow alone, which is slower for JPEGs, and the judge of what can be decoded."""
    if isinstance(content, np.ndarray):
        return _independent(_eight_bits(Image.fromarray(_grey_as_2d(content))).convert(mode))
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        shown = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else _eight_bits(image)
        ImageOps.exif_transpose(shown, in_place=True)
        return _independent(shown.convert(mode) if shown.mode != mode else shown)


def to_pixels(content: Content, channels: int) -> torch.Tensor:
    """The same pixels as a tensor (H, W, C), `uint8`; fp32 for arrays of other types.

    Arrays keep their channels, which must be as many as `channels`. `uint16` becomes 0..1, floats stay what they are.
    """
    if isinstance(content, np.ndarray) and (
        channels not in MODES or content.dtype != np.uint8 or _grey_as_2d(content).ndim != 2
    ):
        return _from_array(content, channels)
    if channels not in MODES:
        raise ValueError(f"a picture file, which cannot have {channels} channels; see --in_chans")
    pixels = _plain_jpeg(content) if channels == 3 else None
    if pixels is None:
        pixels = torch.from_numpy(np.array(with_pillow(content, MODES[channels])))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _plain_jpeg(content: Content) -> torch.Tensor | None:
    """(H, W, 3) of a JPEG, by the faster decoder; None for what is no JPEG, or too damaged for it: Pillow judges."""
    if not isinstance(content, bytes) or not _has_plain_header(content) or fast_jpeg() is None:
        return None
    with contextlib.suppress(RuntimeError):
        return fast_jpeg()(content, mode="RGB").permute(1, 2, 0)  # contiguous, as it was decoded
    return None


def reason(error: Exception) -> str:
    """What is wrong with a picture, in words that are the same every time."""
    if isinstance(error, UnidentifiedImageError):
        return "in no format that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


@cache
def fast_jpeg():
    """torchcodec's JPEG decoder, which gives Pillow's pixels sooner; None where it is not installed for this torch."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):
        return None
    return decode_jpeg


def _grey_as_2d(array: np.ndarray) -> np.ndarray:
    """(H, W, 1) -> (H, W), as Pillow has it; others as they are."""
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def dtype_of(content: Content) -> np.dtype:
    """The type of a content's values, in the byte order of this machine; picture files are decoded to `uint8`."""
    return content.dtype.newbyteorder("=") if isinstance(content, np.ndarray) else np.dtype(np.uint8)


def _independent(image: Image.Image) -> Image.Image:
    return Image.frombytes("CMYK", image.size, image.tobytes()) if image.mode == "RGBA" else image


def _from_array(array: np.ndarray, channels: int) -> torch.Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != channels:
        raise ValueError(f"its shape is {array.shape}, not (height, width, {channels}); see --in_chans")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    scale = 65535 if dtype_of(array) == np.uint16 else 1
    pixels = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not pixels.isfinite().all():
        raise ValueError("some of its values are not finite")
    return pixels / scale


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey; Pillow's own conversion would cut everything above 255.

    ValueError for floats and 32 bits. Pillow gives 16 bits of PNG and PGM as 32, but also signed 16 bits of TIFF.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; read it with a --loader")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("its pixels are signed or 32-bit numbers of unknown range; read it with a --loader")
    if not image.mode.startswith("I"):
        return image
    scaled = Image.fromarray(np.clip(np.asarray(image, dtype=np.int64) // 257, 0, 255).astype(np.uint8))
    scaled.info = image.info
    return scaled


def _has_plain_header(data: bytes) -> bool:
    """True for a JPEG whose header states a size that is no decompression bomb: Pillow judges all others."""
    place = 2
    while data[:2] == b"\xff\xd8" and place + 9 < len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = _big_endian(data, place + 5), _big_endian(data, place + 7)
            return 0 < height * width <= _LARGEST
        place += 2 + _big_endian(data, place + 2)
    return False


def _big_endian(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 2], "big")
