"""Every kind of picture: shown rightly, or replaced, named once, counted, and stopping the run where there are many."""

from __future__ import annotations

import io
import itertools
import random
import struct
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from util.data import datasets, decode, transforms
from util.data.bad_images import BadImages, TooManyBadImages
from util.data.datasets import SeededImages
from util.data.resize import resize_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 10, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # 48 x 80


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb(format: str = "JPEG", **options) -> bytes:
    return encoded(Image.fromarray(PIXELS), format, **({"quality": 95} | options))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    return rgb(exif=exif.tobytes(), subsampling=0)


def exif(orientation: int, kind: str = "H", order: str = "II", before: list | None = None) -> bytes:
    """An APP1 segment whose EXIF says the orientation as SHORT (H) or LONG (I)."""
    pack = "<" if order == "II" else ">"
    values = [*(before or []), orientation]
    entries = [struct.pack(f"{pack}HHI", 0x0112, 3 if kind == "H" else 4, 1) for _ in values]
    fields = [entry + struct.pack(f"{pack}{kind}", v).ljust(4, b"\0") for entry, v in zip(entries, values, strict=True)]
    header = order.encode() + struct.pack(f"{pack}HIH", 42, 8, len(values))
    return segment(b"Exif\0\0" + header + b"".join(fields) + bytes(4))


def segment(payload: bytes, marker: int = 0xE1) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def xmp(orientation: int) -> bytes:
    text = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
    return segment(b"http://ns.adobe.com/xap/1.0/\0" + text.encode())


MAKERS = segment(b"Maker\0" + bytes(40))
SIDEWAYS = {
    "none": lambda o: b"",
    "exif": exif,
    "big-endian": lambda o: exif(o, order="MM"),
    "a maker's first": lambda o: MAKERS + exif(o),
    "xmp first": lambda o: xmp(1) + exif(o),
    "xmp only": xmp,
    "xmp after exif": lambda o: exif(1) + xmp(o),
    "a LONG": lambda o: exif(o, "I"),
    "a big-endian LONG": lambda o: exif(o, "I", "MM"),
    "said twice": lambda o: exif(o, before=[9 - o]),
    "two segments": lambda o: exif(o) + exif(9 - o),
    "doubled header": lambda o: segment(b"Exif\0\0" + exif(o)[4:]),
    "in the wrong segment": lambda o: segment(exif(o)[4:], 0xE4),
    "cut short": lambda o: segment(exif(o)[4:24]),
    "no tiff": lambda o: segment(b"Exif\0\0nothing that is TIFF"),
    "empty": lambda o: segment(b"Exif\0\0"),
}


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("place", SIDEWAYS)
def test_every_way_of_decoding_shows_the_image_as_upright_as_pillow(place, orientation):
    jpeg = rgb()
    content = jpeg[:2] + SIDEWAYS[place](orientation) + jpeg[2:]
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
    if place in ("a maker's first", "xmp first", "xmp only", "doubled header", "a big-endian LONG"):
        assert upright.size == ((48, 80) if orientation in (5, 6, 7, 8) else (80, 48))
    for channels, mode in decode.MODES.items():
        expected = np.asarray(upright.convert(mode)).reshape(*upright.size[::-1], channels)
        np.testing.assert_array_equal(decode.to_pixels(content, channels).numpy(), expected)
        np.testing.assert_array_equal(np.asarray(decode.to_picture(content, mode)).reshape(expected.shape), expected)


def turned_beside(field: bytes) -> bytes:
    """EXIF that turns the image a quarter clockwise, and has one more field."""
    fields = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + field
    return segment(b"Exif\0\0II" + struct.pack("<HIH", 42, 8, 2) + fields + bytes(4))


DAMAGED = {  # how often to turn, and EXIF that Pillow cannot read, or cannot write again
    "no tiff": (0, SIDEWAYS["no tiff"](6)),
    "a resolution of bytes": (1, turned_beside(struct.pack("<HHI4s", 0x011A, 1, 2, b"\1\2"))),
    "a text of floats": (1, turned_beside(struct.pack("<HHIf", 0x010E, 11, 1, 1.0))),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_exif_is_no_reason_to_lose_good_pixels(kind):
    turns, damaged = DAMAGED[kind]
    jpeg = rgb(dpi=(72, 72))  # without a density Pillow would look for it in the EXIF on opening, and pass over errors
    content = jpeg[:20] + damaged + jpeg[20:]
    expected = np.rot90(np.asarray(Image.open(io.BytesIO(jpeg))), -turns)
    np.testing.assert_array_equal(decode.with_pillow(content, "RGB"), expected)
    np.testing.assert_array_equal(decode.to_pixels(content, 3).numpy(), expected)
    assert (resize_image(content) == content) == (turns == 0)


@pytest.mark.parametrize(
    ("format", "mode"),
    [*((name, "RGB") for name in ("MPO", "WEBP", "AVIF")), *itertools.product(("PNG", "TIFF"), ("RGB", "P", "I;16"))],
)
def test_other_formats_are_upright_too(format, mode):
    pixels = Image.fromarray(PIXELS)
    tag = Image.Exif()
    tag[0x0112] = 6
    for number, options in enumerate(({}, {"exif": tag.tobytes()})):
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257) if mode == "I;16" else pixels.convert(mode)
        if mode == "P":
            options["transparency"] = 3
        found = decode.to_picture(encoded(image, format, **options), "RGB")
        assert found.size == ((48, 80) if number else (80, 48))


def tiff(bits: int, photometric: int, data: bytes, width: int) -> bytes:
    """A little-endian grey TIFF of one row."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data += bytes(len(data) % 2)
    return b"II" + struct.pack("<HI", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_deep_grey_tiffs_have_their_own_scale():
    deep = np.array([0, 256, 4095 * 16, 65535], dtype="<u2").tobytes()
    for photometric, expected in ((1, [0, 0, 254, 255]), (0, [255, 255, 1, 0])):
        found = np.asarray(decode.to_picture(tiff(16, photometric, deep, 4), "L"))
        assert found.tolist() == [expected]
    twelve = decode.to_picture(tiff(12, 1, bytes([0x00, 0x08, 0x00, 0xFF, 0xFF, 0xFF]), 4), "L")
    assert np.asarray(twelve).tolist() == [[0, 127, 255, 255]]


def test_no_program_is_run_on_a_file(tmp_path, monkeypatch):
    """Pillow would hand PostScript, which is code, to Ghostscript."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(Exception, match="cannot identify"):
        decode.to_picture(text, "RGB")
    assert not (tmp_path / "run").exists()
    assert not {".eps", ".ps"} & set(decode.EXTENSIONS)


def with_frames(format: str) -> bytes:
    others = [Image.fromarray(255 - PIXELS)]
    return rgb(format, save_all=True, append_images=others, lossless=True)


def palette() -> bytes:
    image = Image.fromarray(PIXELS).quantize(64)
    return encoded(image, "PNG", transparency=bytes(range(64)))


def sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65535, 48 * 80).astype(np.uint16).reshape(48, 80)), "PNG")


def with_tifffile(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels)
    return buffer.getvalue()


GOOD = {
    "jpeg": rgb(),
    "progressive": rgb(progressive=True),
    "grey.jpeg": encoded(Image.fromarray(PIXELS[..., 0]), "JPEG"),
    "cmyk.jpeg": encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"),
    "a png called.jpg": rgb("PNG"),
    "palette with transparency.png": palette(),
    "16 bit.png": sixteen_bits(),
    "16 bit.pgm": b"P5 80 48 65535\n" + np.linspace(0, 65535, 48 * 80).astype(">u2").tobytes(),
    "animated.png": with_frames("PNG"),
    "animated.webp": with_frames("WEBP"),
    "animated gif.jpg": with_frames("GIF"),
    "rotated.jpg": rotated(),
    "one pixel.jpg": encoded(Image.new("RGB", (1, 1), "red"), "JPEG"),
    "one pixel.png": encoded(Image.new("RGBA", (1, 1), "red"), "PNG"),
    "thin.png": encoded(Image.new("L", (1, 200), 7), "PNG"),
}


def bomb(size: int = 14000) -> bytes:
    """Few bytes, whose header announces more pixels than Pillow accepts."""
    data = bytearray(rgb())
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = size.to_bytes(2, "big") * 2
    return bytes(data)


BAD = {
    "truncated.jpg": rgb()[:-400],
    "truncated.png": rgb("PNG")[:-400],
    "empty.jpg": b"",
    "html.jpg": b"<html>404 not found</html>",
    "bomb.jpg": bomb(),
    "bomb.png": encoded(Image.new("1", (14000, 14000)), "PNG"),
    "float.tif": encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"),
    "32 bit.tif": encoded(Image.fromarray(PIXELS[..., 0].astype(np.int32)), "TIFF"),
    "signed.tif": with_tifffile(PIXELS[..., 0].astype(np.int16)),
}


two_decoders = pytest.mark.skipif(
    decode.fast_jpeg() is None, reason="no torchcodec that fits this torch: Pillow would be compared with itself"
)


@two_decoders
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_shown_is_shown(name, channels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = decode.with_pillow(GOOD[name], decode.MODES[channels])
    assert decode.to_picture(GOOD[name], decode.MODES[channels]).tobytes() == picture.tobytes()
    pixels = decode.to_pixels(GOOD[name], channels)
    expected = np.asarray(picture).reshape(picture.height, picture.width, channels)
    np.testing.assert_array_equal(pixels.numpy(), expected)  # both ways of decoding agree to the bit
    size = (32, 16)
    for exact, content in ((True, picture), (False, pixels)):
        crop, *_ = transforms.pretrain_transform(size, (0.2, 1.0), 0.5, exact)(content)
        assert crop.shape == (*size, channels)
        assert crop.dtype == torch.uint8
    if channels == 3:
        assert transforms.evaluation_transform(size, None)(picture).shape == (3, *size)


def test_the_picture_is_the_right_one():
    upright = decode.to_picture(rotated(), "RGB")
    assert upright.size == (48, 80)
    turned = Image.fromarray(np.rot90(PIXELS, -1))
    assert np.abs(np.asarray(upright).astype(int) - np.asarray(turned).astype(int)).mean() < 8
    for name in ("animated.png", "animated.webp", "a png called.jpg"):  # the first frame, exactly
        np.testing.assert_array_equal(np.asarray(decode.to_picture(GOOD[name], "RGB")), PIXELS)
    for name in ("16 bit.png", "16 bit.pgm"):
        grey = np.asarray(decode.to_picture(GOOD[name], "L"))
        assert (grey[0, 0], grey[-1, -1]) == (0, 255)
        assert len(np.unique(grey)) == 256
    clear = np.asarray(decode.to_picture(palette(), "RGBA"))[..., 3]
    assert set(np.unique(clear)) <= set(range(64))
    assert len(np.unique(clear)) > 30
    cmyk = np.asarray(decode.to_picture(GOOD["cmyk.jpeg"], "RGB")).astype(int)
    assert np.abs(cmyk - PIXELS).mean() < 12


@pytest.mark.parametrize("shape", [(1, 5, 3), (5, 1, 3), (1, 1, 3), (1, 5, 1), (1, 5), (5, 1), (4, 3, 3)])
def test_arrays_are_not_mistaken_for_grey_ones_where_a_side_is_1(shape):
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    expected = np.broadcast_to(array.reshape(*shape[:2], -1), (*shape[:2], 3))
    np.testing.assert_array_equal(decode.to_pixels(array, 3).numpy(), expected)
    np.testing.assert_array_equal(np.asarray(decode.to_picture(array, "RGB")), expected)


@pytest.fixture
def mixed(tmp_path):
    for number, (name, data) in enumerate((GOOD | BAD).items()):
        (tmp_path / f"{number:02} {name.replace('.jpeg', '.jpg')}").write_bytes(data)
    (tmp_path / "08 progressive without end.jpg").write_bytes(b"\xff\xd8")
    return tmp_path


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_replaced_named_and_counted(mixed, exact, workers, capsys):
    images = datasets.open_unlabelled("folder", str(mixed), 3)
    data = SeededImages(images, transforms.pretrain_transform((16, 16), (0.2, 1.0), 0.5, exact), max_bad_images=0.9)
    keys = [(epoch, index) for epoch in (0, 1) for index in range(len(images))]
    batches = [keys[i : i + 4] for i in range(0, len(keys), 4)]
    loader = torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=workers)
    crops = torch.cat([batch[0][0] for batch in loader])
    assert data.bad.collect(torch.device("cpu")) == len(BAD) + 1
    said = capsys.readouterr().err
    for name in [*BAD, "08 progressive without end.jpg"]:
        assert said.count(name) == 1, name
    assert data.bad.collect(torch.device("cpu")) == len(BAD) + 1
    assert capsys.readouterr().err == ""
    again = SeededImages(images, data.transform, max_bad_images=0.9)
    for place, key in list(enumerate(keys))[::-1]:  # another order: the same replacements
        assert torch.equal(again[key][0][0], crops[place])
    names = [images.source.name(i) for i in range(len(images))]
    empty = next(i for i, name in enumerate(names) if name.endswith("empty.jpg"))
    numbered = SeededImages(replace(images, labels=range(len(images))), data.transform, max_bad_images=0.9)
    assert numbered[0, empty][1] == 0  # all from it to the end are bad


@pytest.mark.parametrize("workers", [0, 2])
def test_a_transform_that_fails_makes_a_bad_image_like_any_other(mixed, workers, capsys):
    images = datasets.open_unlabelled("folder", str(mixed), 3)

    def transform(picture):
        if max(picture.size) == 200:
            raise RuntimeError("too\nthin")
        if picture.size == (1, 1) and torch.rand(1) < 0.5:  # not always: it is tried again
            raise ValueError("too small")
        return torch.rand(1)

    runs = []
    for again in (False, True):
        data = SeededImages(replace(images, labels=range(len(images))), transform, max_bad_images=0.9)
        keys = [(epoch, index) for epoch in range(4) for index in range(len(images))][again :: 1 + again]
        loader = torch.utils.data.DataLoader(data, batch_sampler=[[key] for key in keys], num_workers=workers)
        runs.append({key: tuple(map(float, sample)) for key, sample in zip(keys, loader, strict=True)})
    assert all(runs[0][key] == sample for key, sample in runs[1].items())  # whatever failed before
    data.bad.collect(torch.device("cpu"))
    said = capsys.readouterr().err
    (thin,) = (line for line in said.splitlines() if "thin.png" in line)
    assert "thin.png: the transform failed (too thin); the next good one takes its place" in thin


def test_too_many_stop_the_run_with_a_sentence(capsys):
    bad = BadImages(1000, 0.001, lambda index: f"picture-{index}.jpg")
    bad.mark(5)
    assert bad.collect(torch.device("cpu")) == 1
    bad.mark(7)
    with pytest.raises(TooManyBadImages) as error:
        bad.collect(torch.device("cpu"))
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "bad picture: picture-7.jpg" in said
    assert "error: 2 of 1000 pictures cannot be decoded, more than --max_bad_images 0.001 allows" in said


def test_nothing_but_bad_pictures_is_an_error_with_a_name(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"none")
    images = datasets.open_unlabelled("folder", str(tmp_path), 3)
    data = SeededImages(images, transforms.pretrain_transform((16, 16), (0.2, 1.0), 0.5))
    with pytest.raises(OSError, match=r"1\.png: cannot be decoded .* nor can the 3 pictures"):
        data[0, 1]


@pytest.mark.parametrize(("exact", "loader"), [(False, None), (True, None), (False, "util.loaders:npy")])
def test_once_too_many_are_bad_blank_pictures_fill_the_batch_and_the_run_ends(tmp_path, exact, loader, capsys):
    for number in range(4):
        (tmp_path / f"{number}.{'npy' if loader else 'png'}").write_bytes(b"none")
    if loader:
        np.save(tmp_path / "0.npy", np.full((9, 9, 3), 65535, dtype=np.uint16))
    else:
        Image.new("RGB", (9, 9), "white").save(tmp_path / "0.png")
    images = datasets.open_unlabelled("folder", str(tmp_path), 3, loader)
    transform = transforms.pretrain_transform((16, 16), (0.2, 1.0), 0.5, exact)
    data = SeededImages(images, transform, max_bad_images=0.3)
    ((pixels, *_), _) = torch.utils.data.default_collate([data[0, index] for index in (3, 2, 0, 1)])
    assert [crop.max().item() for crop in pixels] == [pixels[0].max().item(), 0, pixels[0].max().item(), 0]
    assert pixels[0].max() > 0  # the first bad one was replaced
    with pytest.raises(TooManyBadImages):
        data.bad.collect(torch.device("cpu"))
    assert "3 of 4 pictures cannot be decoded, more than --max_bad_images 0.3 allows" in capsys.readouterr().err


def test_all_bad_is_too_many_whatever_is_allowed(capsys):
    bad = BadImages(2, 1.0, str)
    bad.mark(0)
    assert (bad.collect(torch.device("cpu")), bad.too_many()) == (1, False)
    bad.mark(1)
    assert bad.too_many()
    with pytest.raises(TooManyBadImages):
        bad.collect(torch.device("cpu"))
    assert "error: 2 of 2 pictures cannot be decoded, which is all of them; mend" in capsys.readouterr().err


def damaged() -> Iterator[tuple[str, bytes]]:
    """Names and contents of 2,000 JPEGs and PNGs with cut ends and changed bytes."""
    random.seed(0)
    for number in range(2000):
        data = bytearray(rgb() if number % 2 else rgb("PNG"))
        if number % 3 == 0:
            del data[random.randrange(len(data)) :]
        for _ in range(random.randrange(1, 8)):
            if data:
                data[random.randrange(len(data))] = random.randrange(256)
        yield f"{number:04}.{'jpg' if number % 2 else 'png'}", bytes(data)


def test_2000_damaged_files_go_through_a_loader_and_all_bad_ones_are_named(tmp_path, capsys):
    bad = []
    for name, data in damaged():
        (tmp_path / name).write_bytes(data)
        try:
            decode.with_pillow(data, "RGB")
        except Exception:
            bad.append(name)
    assert 300 < len(bad) < 1900
    images = datasets.open_unlabelled("folder", str(tmp_path), 3)
    data = SeededImages(images, transforms.pretrain_transform((16, 16), (0.2, 1.0), 0.5), max_bad_images=0.99)
    batches = [[(0, index) for index in range(i, i + 50)] for i in range(0, 2000, 50)]
    loader = torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=2)
    assert sum(len(batch[0][0]) for batch in loader) == 2000
    assert data.bad.collect(torch.device("cpu")) == len(bad)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bad picture: ")]
    assert [next(name for name in line.split("/") if name[:4].isdigit()).split(":")[0] for line in said] == bad


@two_decoders
def test_damaged_files_never_crash_and_both_decoders_agree():
    """Decoded alike by both ways, or refused by both."""
    outcomes = set()
    for name, data in damaged():
        found = []
        for decoder in (lambda d: np.asarray(decode.with_pillow(d, "RGB")), lambda d: decode.to_pixels(d, 3).numpy()):
            try:
                found.append(decoder(data))
            except Exception:
                found.append(None)
        outcomes.add(found[0] is None)
        assert (found[0] is None) == (found[1] is None), name
        if found[0] is not None:
            np.testing.assert_array_equal(*found)
    assert outcomes == {True, False}


def test_pixels_are_had_by_the_names_of_the_arguments():
    pixels = decode.to_pixels(content=GOOD[next(iter(GOOD))], in_chans=3)
    assert pixels.dtype == torch.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_that_must_not_be_written_are_copied(dtype):
    array = np.ones((4, 5, 2), dtype=dtype)
    array.flags.writeable = False
    decode.to_pixels(array, 2).zero_()
    assert array.all()
