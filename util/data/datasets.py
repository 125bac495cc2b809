"""Data sets by name -> pictures by number. Any one is read without the others, so that every run resumes exactly."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import seeding
from util.data import decode, libraries, names, sources, tar_shards
from util.data.bad_images import BadImages
from util.suggest import check_known

NAMES = ("folder", "digits", "wds", "hfds", "torch")  # the last three also as wds/PATTERN, hfds/NAME, torch/NAME
_STREAMS = ("hfids", "tfds")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Pictures with labels, not yet transformed.

    Attributes:
        source: reads a picture by its number.
        labels: class of each.
        classes: names of the classes; empty if the labels mean nothing.
        channels: that are wanted.
        dtype: of the values of every picture that is made a tensor, `uint8` for picture files; None: any.
    """

    source: sources.Source
    labels: Sequence[int]
    classes: tuple[str, ...]
    channels: int
    dtype: np.dtype | None = None

    def __len__(self) -> int:
        return len(self.source)

    @functools.cached_property
    def digest(self) -> str | None:
        """A hash of the ordered names of the images, as far as the source knows them."""
        return names.digest(self.source)

    def relabelled(self, classes: tuple[str, ...]) -> ImageSet:
        """The same pictures, their classes numbered as in `classes`."""
        number = np.array([classes.index(name) for name in self.classes])
        return replace(self, labels=number[self.labels], classes=classes)

    def picture(self, index: int) -> Image.Image:
        """Picture `index` for PIL. OSError names it if it cannot be decoded."""
        return self.decoded(index, self.to_picture)

    def pixels(self, index: int) -> torch.Tensor:
        """Picture `index` as a tensor (H, W, C), `uint8` or fp32. OSError names it if it cannot be decoded."""
        return self.decoded(index, self.to_pixels)

    def to_picture(self, content: decode.Content) -> Image.Image:
        """As `decode.to_picture`, in the wanted channels."""
        return decode.to_picture(content, decode.MODES[self.channels])

    def to_pixels(self, content: decode.Content) -> torch.Tensor:
        """As `decode.to_pixels`. ValueError if the values are of another type than `dtype`."""
        found = decode.dtype_of(content)
        if self.dtype is not None and found != self.dtype:
            raise ValueError(f"its values are {found}, those of the first picture {self.dtype}; they must be alike")
        return decode.to_pixels(content, self.channels)

    def decoded(self, index: int, decoder: Callable):
        """What `decoder` makes of the content of picture `index`; an OSError with its name for any error."""
        try:
            return decoder(self.source.read(index))
        except Exception as error:  # decoders raise everything
            raise OSError(f"{self.source.name(index)}: cannot be decoded ({decode.reason(error)})") from error


class SeededImages(Dataset):
    """`dataset[epoch, index]` -> transformed picture and label, random only in (seed, epoch, index).

    A picture that cannot be decoded is replaced by the next good one, with its label, and marked in `bad`. Once those
    are too many, a blank picture is handed out instead of searching on: `bad.collect` will end the run.

    Args:
        images: the pictures.
        transform: PIL image -> tensor (C, H, W); or, if it has a true attribute `takes_pixels`, of a tensor (H, W, C).
        seed: of the augmentation.
        max_bad_images: share of the pictures that may be bad; None where nobody calls `bad.collect`: then only a set
            without any good picture is an OSError.
    """

    def __init__(self, images: ImageSet, transform: Callable, seed: int = 0, max_bad_images: float | None = None):
        self.images, self.transform, self.seed = images, transform, seed
        self._decoder = images.to_pixels if getattr(transform, "takes_pixels", False) else images.to_picture
        self._collected = max_bad_images is not None
        self.bad = BadImages(len(images), max_bad_images if self._collected else 1.0, self._describe)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        good, picture = self._first_good(index)
        with seeding.sample_state(self.seed, epoch, index):
            try:
                return self.transform(picture), int(self.images.labels[good])
            except Exception as error:
                raise RuntimeError(f"{self.images.source.name(good)}: the transform failed ({error})") from error

    def name(self, index: int) -> str:
        """Of picture `index`, for messages."""
        return self.images.source.name(index)

    def _first_good(self, index: int) -> tuple[int, Image.Image | torch.Tensor]:
        for candidate in ((index + distance) % len(self) for distance in range(len(self))):
            if candidate not in self.bad:
                try:
                    return candidate, self.images.decoded(candidate, self._decoder)
                except OSError:
                    self.bad.mark(candidate)
            if self._collected and self.bad.too_many():
                return index, self._blank()
        raise OSError(f"{self._describe(index)}; nor can the {len(self)} pictures from it on")

    def _blank(self) -> Image.Image | torch.Tensor:
        """A picture that fits into a batch with the others."""
        array, dtype = np.zeros((8, 8, self.images.channels), dtype=np.uint8), self.images.dtype
        return self._decoder(array if self._decoder == self.images.to_picture or dtype is None else array.astype(dtype))

    def _describe(self, index: int) -> str:
        try:
            self.images.decoded(index, self._decoder)
        except OSError as error:
            return str(error)
        return f"{self.images.source.name(index)}: could not be decoded, but now it can"


def open_unlabelled(name: str, data_path: str | None, in_chans: int, loader: str | None = None) -> ImageSet:
    """Pictures to pre-train on, of the split train; of a folder without train/ all below it.

    Args:
        name: of the data set: folder, digits, wds, hfds, torch/NAME; see docs/DATA.md.
        data_path: where it is.
        in_chans: channels of the pictures.
        loader: `package.module:function`, path -> array (H, W, C), for all files below a folder, or those with the
            endings in the function's attribute `extensions`.

    Raises:
        ValueError: unknown data set, nothing at `data_path`, or no picture in it.
    """
    check(name, in_chans, loader)
    if name != "folder":
        return _open(name, data_path, "train", in_chans)
    root = _folder(data_path)
    root = root / "train" if (root / "train").is_dir() else root
    if loader is not None:
        return _with_loader(root, loader, in_chans)
    paths = sources.find_files(root, IMG_EXTENSIONS)
    if not paths:
        raise ValueError(
            f"--data_path {data_path}: no picture below it; any folder of pictures will do, nested or flat"
        )
    return ImageSet(sources.Files(paths), np.zeros(len(paths), dtype=np.int64), (), in_chans)


def open_labelled(name: str, data_path: str | None, split: str, in_chans: int) -> ImageSet:
    """Pictures with classes; of a folder `data_path`/{train,val}/<class>/<picture>. A class may have no picture.

    Raises:
        ValueError: unknown data set, nothing at `data_path`, or a picture without a class.
    """
    check(name, in_chans, None)
    if in_chans not in decode.MODES:
        raise ValueError(f"--in_chans {in_chans}: training with classes takes 1 (grey), 3 (RGB) or 4 (RGBA) channels")
    if name.startswith("wds/"):
        raise ValueError(f"--dataset {name}: a pattern is for pre-training; name the shards train-*.tar and val-*.tar")
    if name != "folder":
        return _with_classes(_open(name, data_path, split, in_chans))
    root = _folder(data_path) / split
    folders = root.iterdir() if root.is_dir() else ()
    classes = tuple(sorted(place.name for place in folders if place.is_dir() and not place.name.startswith(".")))
    paths = [sources.find_files(root / name, IMG_EXTENSIONS) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in paths])
    if not len(labels):
        raise ValueError(
            f"--data_path {data_path}: no picture in {root}/<class>/<picture>; expected folders train and val"
        )
    return ImageSet(sources.Files(itertools.chain.from_iterable(paths)), labels, classes, in_chans)


def check(name: str, in_chans: int, loader: str | None) -> None:
    """ValueError for a data set, a number of channels or a loader that cannot be."""
    kind = name.partition("/")[0]
    if kind in _STREAMS:
        raise ValueError(f"--dataset {name}: a stream cannot be resumed exactly; use hfds/..., wds or a folder")
    check_known("dataset", kind, NAMES)
    if name == "torch":
        raise ValueError("--dataset torch: name one of torchvision's, such as torch/cifar10")
    if loader is not None and name != "folder":
        raise ValueError(f"--loader {loader}: reads files, so it needs --dataset folder, not {name}")
    if loader is None and in_chans not in decode.MODES and kind != "wds":
        raise ValueError(
            f"--in_chans {in_chans}: pictures have 1 (grey), 3 (RGB) or 4 (RGBA) channels; others need a --loader, "
            "or arrays in tar shards"
        )


def _open(name: str, data_path: str | None, split: str, in_chans: int) -> ImageSet:
    kind, _, rest = name.partition("/")
    if kind == "digits":
        return _digits(split, in_chans)
    if kind == "wds":
        root = _folder(data_path)
        shards = tar_shards.TarShards(tar_shards.find_shards(root, rest, split))
        classes = tuple(tar_shards.read_info(root).get("classes", ()))
        return _all_like_the_first(ImageSet(shards, shards.labels, classes, in_chans))[0]
    opener = libraries.open_torchvision if kind == "torch" else libraries.open_hugging_face
    source, labels, classes = opener(name, data_path, split)
    if not len(source):
        raise ValueError(f"--dataset {name}: the split {split} is empty")
    return ImageSet(source, labels, classes, in_chans)


def _with_classes(images: ImageSet) -> ImageSet:
    missing = np.flatnonzero(np.asarray(images.labels) < 0)
    if len(missing):
        raise ValueError(
            f"{images.source.name(missing[0])}: this picture has no class; training with classes needs one for each"
        )
    beyond = np.flatnonzero(np.asarray(images.labels) >= len(images.classes)) if images.classes else ()
    if len(beyond):
        raise ValueError(
            f"{images.source.name(beyond[0])}: its class is {images.labels[beyond[0]]}, but only {len(images.classes)} "
            "classes have names, counted from 0; mend the label, or the list of the names"
        )
    if images.classes:
        return images
    return replace(images, classes=tuple(str(number) for number in range(int(max(images.labels)) + 1)))


def _with_loader(root: Path, loader: str, in_chans: int) -> ImageSet:
    function = sources.import_loader(loader)
    endings = tuple(getattr(function, "extensions", ("",)))
    paths = sources.find_files(root, endings)
    if not paths:
        raise ValueError(f"--data_path {root}: no file {' or '.join(endings)} below it for --loader {loader}")
    files = sources.Files(paths, function)
    images, error = _all_like_the_first(ImageSet(files, np.zeros(len(paths), dtype=np.int64), (), in_chans))
    if images.dtype is None:
        raise ValueError(f"--loader {loader}: {error}") from error
    return images


def _all_like_the_first(images: ImageSet, most: int = 1000) -> tuple[ImageSet, OSError | None]:
    """The same pictures, held to the type of the first good one of them, and what is wrong with a bad one before it.

    Mixed types cannot make a batch, or would be normalised wrongly.
    """
    first = None
    for index in range(min(most, len(images))):
        try:
            images.pixels(index)
            return replace(images, dtype=decode.dtype_of(images.source.read(index))), first
        except OSError as error:
            first = first or error
    return images, first


def _folder(data_path: str | None) -> Path:
    if not data_path:
        raise ValueError("--data_path is not given: name the folder that holds train/ and val/")
    if not Path(data_path).is_dir():
        raise ValueError(f"--data_path {data_path}: there is no such folder")
    return Path(data_path)


def _digits(split: str, in_chans: int) -> ImageSet:
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels; every fifth is for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 4) == (split != "train")
    pictures = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return ImageSet(sources.Arrays(pictures, f"digits {split}"), data.target[chosen], tuple("0123456789"), in_chans)
