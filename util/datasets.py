"""Images from disk or from a built-in set: file -> decoded, cropped `uint8` tensor. Normalisation is the device's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import seeding
from util.suggest import check_known

NAMES = ("folder", "digits")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name


@dataclass(frozen=True)
class ImageSet:
    """Pictures with labels, not yet transformed.

    Attributes:
        items: file paths, or pictures as arrays (H, W) uint8.
        labels: class of each.
        classes: names of the classes; empty if the labels mean nothing.
        mode: Pillow's name of the channels that are wanted.
    """

    items: Sequence
    labels: Sequence[int]
    classes: tuple[str, ...]
    mode: str

    def __len__(self) -> int:
        return len(self.items)

    def relabelled(self, classes: tuple[str, ...]) -> ImageSet:
        """The same pictures, their classes numbered as in `classes`."""
        number = [classes.index(name) for name in self.classes]
        return ImageSet(self.items, [number[label] for label in self.labels], classes, self.mode)

    def picture(self, index: int) -> Image.Image:
        """Picture `index`, decoded, with the wanted channels. OSError names the file if it cannot be decoded."""
        item = self.items[index]
        if not isinstance(item, str):
            return Image.fromarray(item).convert(self.mode)
        try:
            with Image.open(item) as image:
                return _eight_bits(image).convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise OSError(f"{item}: cannot be decoded ({error})") from error


class SeededImages(Dataset):
    """`dataset[epoch, index]` -> transformed picture and label, random only in (seed, epoch, index).

    Args:
        images: the pictures.
        transform: PIL image -> tensor (C, H, W).
        seed: of the augmentation.
    """

    def __init__(self, images: ImageSet, transform: Callable, seed: int = 0):
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        with seeding.sample_state(self.seed, epoch, index):
            return self.transform(self.images.picture(index)), self.images.labels[index]


def open_unlabelled(name: str, data_path: str | None, in_chans: int) -> ImageSet:
    """Pictures to pre-train on: all below `data_path`/train, or below `data_path` where there is no such folder.

    Raises:
        ValueError: unknown data set, missing folder, or no picture in it.
    """
    mode = _mode(name, in_chans)
    if name == "digits":
        return _digits("train", mode)
    root = _folder(data_path)
    root = root / "train" if (root / "train").is_dir() else root
    found, _ = find_images_and_targets(str(root), types=IMG_EXTENSIONS)
    if not found:
        raise ValueError(
            f"--data_path {data_path}: no picture below it; any folder of pictures will do, nested or flat"
        )
    return ImageSet([path for path, _ in found], [0] * len(found), (), mode)


def open_labelled(name: str, data_path: str | None, split: str, in_chans: int) -> ImageSet:
    """Pictures with classes: `data_path`/{train,val}/<class>/<picture>.

    Raises:
        ValueError: unknown data set, missing folder, or not this layout.
    """
    mode = _mode(name, in_chans)
    if name == "digits":
        return _digits(split, mode)
    root = _folder(data_path) / split
    try:
        folder = ImageFolder(str(root))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"--data_path {data_path}: expected {root}/<class>/<picture>, and folders train and val ({error})"
        ) from error
    return ImageSet([path for path, _ in folder.samples], folder.targets, tuple(folder.classes), mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit grey; Pillow's own conversion would cut everything above 255. ValueError for floats."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.int64) // 257, 0, 255).astype(np.uint8))


def _folder(data_path: str | None) -> Path:
    if not data_path:
        raise ValueError("--data_path is not given: name the folder that holds train/ and val/")
    if not Path(data_path).is_dir():
        raise ValueError(f"--data_path {data_path}: there is no such folder")
    return Path(data_path)


def _mode(name: str, in_chans: int) -> str:
    check_known("dataset", name, NAMES)
    if in_chans not in _MODES:
        raise ValueError(f"--in_chans {in_chans}: pictures have 1 (grey), 3 (RGB) or 4 (RGBA) channels")
    return _MODES[in_chans]


def _digits(split: str, mode: str) -> ImageSet:
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels; every fifth is for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 4) == (split != "train")
    pictures = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return ImageSet(list(pictures), data.target[chosen].tolist(), tuple("0123456789"), mode)
