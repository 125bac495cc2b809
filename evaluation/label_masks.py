"""Folders of images with label masks, laid out as Pascal VOC or ADE20K."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from util.data import datasets, decode, sources
from util.data.crop import Squash

IGNORED = 255  # the class of pixels that do not count
_FOLDERS = {"train": ("training", "train"), "val": ("validation", "val")}
_LAYOUTS = (
    "images/{training,validation} and annotations/{training,validation} as in ADE20K, or JPEGImages, SegmentationClass "
    "and ImageSets/Segmentation/{train,val}.txt as in VOC"
)


class Pair(NamedTuple):
    """The files of an image and of its label mask."""

    image: str
    mask: str


class Sample(NamedTuple):
    """An image squashed to the model's size, uint8 (C, h, w); the labels of its pixels, uint8 (H, W), and their file.

    They have the size of the image's file.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    mask: str


def find(data_path: str | None, split: str, most: int | None = None) -> list[Pair]:
    """Find the images of a split, "train" or "val", and their masks; at most so many, evenly spread.

    Raises:
        ValueError: neither layout, no image, or an image or mask is missing.
    """
    root = Path(data_path or "")
    if data_path is None or not root.is_dir():
        raise ValueError(f"--data_path {data_path}: there is no such folder; name one with {_LAYOUTS}")
    names = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    folder = next((name for name in _FOLDERS[split] if (root / "images" / name).is_dir()), None)
    if names.is_file():
        pairs = _as_voc(root, names.read_text().split())
    elif folder is not None:
        pairs = _as_ade20k(root / "images" / folder, root / "annotations" / folder)
    else:
        raise ValueError(f"--data_path {root}: no images of the split {split} with label masks; expected {_LAYOUTS}")
    if not pairs:
        raise ValueError(f"--data_path {root}: the split {split} has no image")
    for path in (path for pair in pairs for path in pair):
        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such file; every image of the split {split} needs its label mask")
    chosen = np.linspace(0, len(pairs) - 1, min(most or len(pairs), len(pairs))).round().astype(int)
    return [pairs[index] for index in chosen]


def _as_voc(root: Path, names: list[str]) -> list[Pair]:
    return [
        Pair(str(root / "JPEGImages" / f"{name}.jpg"), str(root / "SegmentationClass" / f"{name}.png"))
        for name in names
    ]


def _as_ade20k(images: Path, masks: Path) -> list[Pair]:
    paths, _ = sources.find_files(images, decode.EXTENSIONS)
    return [Pair(path, str(masks / Path(path).relative_to(images).with_suffix(".png"))) for path in paths]


def load(pairs: list[Pair], size: tuple[int, int], channels: int, threads: int = 1) -> list[Sample]:
    """Read all pairs, the images squashed to `size` (height, width).

    Raises:
        ValueError: names a file that cannot be decoded, a mask that is none, or one of a size other than its image's.
    """
    images = datasets.ImageSet(
        sources.Files(pair.image for pair in pairs), np.zeros(len(pairs), dtype=np.int64), (), channels
    )
    squash = Squash(size)

    def sample(index: int) -> Sample:
        try:
            pixels = images.pixels(index)  # (H, W, C)
        except OSError as error:
            raise ValueError(str(error)) from error
        labels = read_mask(pairs[index].mask)
        if labels.shape != pixels.shape[:2]:
            (height, width), wanted = labels.shape, " x ".join(map(str, pixels.shape[:2]))
            raise ValueError(
                f"{pairs[index].mask}: this label mask has {height} x {width} pixels, and its image "
                f"{pairs[index].image} has {wanted}; give it the size of its image"
            )
        return Sample(squash(pixels), labels, pairs[index].mask)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(sample, range(len(pairs))))


def read_mask(path: str) -> torch.Tensor:
    """Return a mask's labels, uint8 (H, W): the numbers in the file, whatever its palette makes of them.

    Raises:
        ValueError: it cannot be decoded, has several numbers for a pixel, or one above 255.
    """
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes()), formats=["PNG"]) as image:
            labels = np.array(image)
    except Exception as error:  # decoders raise everything
        raise ValueError(f"{path}: cannot be decoded as a PNG ({decode.reason(error)})") from error
    if labels.ndim != 2:
        raise ValueError(
            f"{path}: this label mask is a picture of {labels.shape[2]} channels; "
            "write the number of its class for each pixel, as a grey PNG or one with a palette"
        )
    if labels.max() > 255:
        raise ValueError(f"{path}: this label mask has the label {labels.max()}; labels are numbers from 0 to 255")
    return torch.from_numpy(labels.astype(np.uint8))


def check_classes(ignored: tuple[int, ...], number: int | None) -> None:
    """Raise ValueError for labels to ignore, or a number of classes, that cannot be."""
    for label in ignored:
        if not 0 <= label <= 255:
            raise ValueError(f"--ignore_index {label}: labels are numbers from 0 to 255")
    if number is not None and not 2 <= number <= IGNORED:
        raise ValueError(f"--num_classes {number}: choose 2 to {IGNORED} classes")


class Classes:
    """Numbers the labels that count from 0 on, in their order.

    Args:
        train: the samples to learn from.
        ignored: labels of pixels that do not count.
        number: the first so many labels that are not ignored; None: those that `train` has.

    Raises:
        ValueError: a label of `train` that is neither a class nor ignored, or fewer than two that count.
    """

    def __init__(self, train: list[Sample], ignored: tuple[int, ...], number: int | None = None):
        present = {label for sample in train for label in sample.labels.unique().tolist()}
        self.labels = sorted((present if number is None else set(range(256))) - set(ignored))[: number or IGNORED]
        if len(present - set(ignored)) < 2:
            raise ValueError(
                f"{train[0].mask}: this and the other training masks have the labels {sorted(present)} alone, of which "
                f"two must count at least; those of --ignore_index {' '.join(map(str, ignored))} do not"
            )
        self._table = torch.full((256,), IGNORED, dtype=torch.uint8)
        self._table[self.labels] = torch.arange(len(self.labels), dtype=torch.uint8)
        self._known = {*self.labels, *ignored}
        self.check(train)

    def __len__(self) -> int:
        return len(self.labels)

    def check(self, samples: list[Sample]) -> None:
        """Raise ValueError if a sample has a label that is neither a class nor ignored."""
        for sample in samples:
            beyond = sorted(set(sample.labels.unique().tolist()) - self._known)
            if beyond:
                raise ValueError(
                    f"{sample.mask}: this label mask has the label {beyond[0]}, which is none of the {len(self)} "
                    f"classes ({self.labels[0]} to {self.labels[-1]}); mend it, or change --num_classes or "
                    "--ignore_index"
                )

    def number(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the class of each label (H, W), uint8; 255 for those that do not count."""
        return self._table[labels.long()]
