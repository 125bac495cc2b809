"""The content of one image -> pixels, upright, with the wanted channels. Whatever is wrong with it is an error."""

from __future__ import annotations

import io
import warnings
from functools import cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

Content = bytes | np.ndarray  # an encoded file, or pixels (H, W) or (H, W, C)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name

# Pillow would warn of large images and odd EXIF in every worker, for every image; what it cannot decode is an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Image.init()
# What Pillow names but does not decode, or hands to another program: PostScript is code, which Ghostscript would run.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_FORMATS = ["JPEG", *(name for name in Image.ID if name not in {"JPEG", *_NOT_DECODED})]  # tried in this order
EXTENSIONS = tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in _FORMATS))

_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags, and a value of the second


def to_picture(content: Content, mode: str) -> Image.Image:
    """Return a PIL image in `mode`: the first frame, upright, 16-bit grey scaled to 8 bits, no alpha blended.

    RGBA comes under the name CMYK, with the bands R, G, B, A: Pillow's resizing multiplies the colours of an image
    that is called RGBA by its alpha, and so loses them where that is 0.

    Raises:
        Exception: of any type, if it cannot be decoded; libraries raise many.
    """
    with _opened(content) as image:
        pixels = _fast_jpeg_pixels(image, content) if mode == "RGB" else None
        return _converted(image, mode) if pixels is None else Image.fromarray(pixels.numpy())


def with_pillow(content: Content, mode: str) -> Image.Image:
    """Return the same by Pillow alone, which is slower for JPEGs, and the judge of what can be decoded."""
    with _opened(content) as image:
        return _converted(image, mode)


def to_pixels(content: Content, in_chans: int) -> torch.Tensor:
    """Return the same pixels as a tensor (H, W, C), `uint8`; fp32 for arrays of other types.

    Arrays keep their channels, which must be as many as `in_chans`. `uint16` becomes 0..1, floats stay what they are.
    """
    if isinstance(content, np.ndarray) and (
        in_chans not in MODES or content.dtype != np.uint8 or _grey_as_2d(content).ndim != 2
    ):
        return _from_array(content, in_chans)
    if in_chans not in MODES:
        raise ValueError(f"a picture file, which cannot have {in_chans} channels; see --in_chans")
    with _opened(content) as image:
        pixels = _fast_jpeg_pixels(image, content) if in_chans == 3 else None
        if pixels is None:
            pixels = torch.from_numpy(np.array(_converted(image, MODES[in_chans])))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _opened(content: Content) -> Image.Image:
    """Return an image of which only the header has been read."""
    if isinstance(content, np.ndarray):
        return Image.fromarray(_grey_as_2d(content))
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    image.load()  # which turns TIFFs, and so comes before their orientation is read
    turn = _TURNS.get(orientation(image))
    shown = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else _eight_bits(image)
    shown = shown.convert(mode) if shown.mode != mode else shown
    return _independent(shown if turn is None else shown.transpose(turn))


def orientation(image: Image.Image) -> int:
    """Return what EXIF or XMP say of an opened image; 1, upright, where they say nothing or cannot be read.

    Pillow's `exif_transpose` would fail with damaged EXIF, though the pixels are good: it reads and rewrites all of it.
    """
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many
        return 1


def _fast_jpeg_pixels(image: Image.Image, content: bytes) -> torch.Tensor | None:
    """Return (H, W, 3) of a JPEG from the faster decoder; None for what is no JPEG, lies, or is too damaged for it.

    Pillow decides which way is up. The other decoder would turn the image too, but finds other orientations; so it
    gets the file without its EXIF. Pillow turns an image faster than a tensor is turned.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB") or fast_jpeg() is None:
        return None
    if orientation(image) in _TURNS:
        return None
    for _, segment in image.applist:
        if segment.startswith(b"Exif"):
            content = content.replace(segment, bytes(len(segment)), 1)
    try:
        return fast_jpeg()(content, mode="RGB").permute(1, 2, 0)  # contiguous, as it was decoded
    except RuntimeError:
        return None


def reason(error: Exception) -> str:
    """Describe what is wrong with an image, in words that are the same every time."""
    if isinstance(error, UnidentifiedImageError):
        return "in no format that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


@cache
def fast_jpeg():
    """Return torchcodec's JPEG decoder, which gives Pillow's pixels faster; None where it is not installed."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):
        return None
    return decode_jpeg


def _grey_as_2d(array: np.ndarray) -> np.ndarray:
    """Squeeze (H, W, 1) -> (H, W), as Pillow has it; leave others as they are."""
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def dtype_of(content: Content) -> np.dtype:
    """Return the type of a content's values, in this machine's byte order; image files are decoded to `uint8`."""
    return content.dtype.newbyteorder("=") if isinstance(content, np.ndarray) else np.dtype(np.uint8)


def _independent(image: Image.Image) -> Image.Image:
    return Image.frombytes("CMYK", image.size, image.tobytes()) if image.mode == "RGBA" else image


def _from_array(array: np.ndarray, channels: int) -> torch.Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != channels:
        raise ValueError(f"its shape is {array.shape}, not (height, width, {channels}); see --in_chans")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.require(array, requirements="CW"))
    scale = 65535 if dtype_of(array) == np.uint16 else 1
    pixels = torch.from_numpy(np.require(array, np.float32, "CW"))
    if not pixels.isfinite().all():
        raise ValueError("some of its values are not finite")
    return pixels / scale


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as 8-bit grey, others as they are; Pillow's own conversion would cut everything above 255.

    ValueError for floats and 32 bits. Pillow gives 16 bits of PNG and PGM as 32, but also signed 16 bits of TIFF.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; read it with a --loader")
    if not image.mode.startswith("I"):
        return image
    if image.format not in ("PNG", "PPM") and (image.mode == "I" or image.format not in ("TIFF", "JPEG2000", None)):
        raise ValueError("its pixels are signed or 32-bit numbers of unknown range; read it with a --loader")
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    scaled = np.clip(np.asarray(image, dtype=np.int64) * 255 // largest, 0, 255).astype(np.uint8)
    return Image.fromarray(255 - scaled if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else scaled)
