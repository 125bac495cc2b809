"""Data sets by name -> images by number. Any one is read without the others, so that every run resumes exactly."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from util import seeding
from util.data import decode, libraries, names, sources, tar_shards
from util.data.bad_images import BadImages
from util.suggest import check_known

NAMES = ("folder", "digits", "wds", "hfds", "torch")  # the last three also as wds/PATTERN, hfds/NAME, torch/NAME
_STREAMS = ("hfids", "tfds")
_MOST_CLASSES = 10**6  # a larger class number is an identifier, and would ask for a head of gigabytes


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels, not yet transformed.

    Attributes:
        source: reads an image by its number.
        labels: class of each; -1: none.
        classes: names of the classes; empty if the labels mean nothing.
        channels: that are wanted.
        dtype: of the values of every image that is made a tensor, `uint8` for image files; None: any.
        passed_over: how many files beside them have which ending.
        why_unlabelled: where the labels are no class numbers: what they are, in a sentence.
    """

    source: sources.Source
    labels: Sequence[int]
    classes: tuple[str, ...]
    channels: int
    dtype: np.dtype | None = None
    passed_over: Counter[str] = field(default_factory=Counter)
    why_unlabelled: str = ""

    def __len__(self) -> int:
        return len(self.source)

    def summary(self, title: str) -> str:
        """Return a line about what was found, for the log."""
        classes = f" of {len(self.classes)} classes" if self.classes else ""
        ordered = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0]))
        counts = [f"{ending} {count}" for ending, count in ordered]
        shown = ", ".join(counts[:10]) + (", ..." if len(counts) > 10 else "")
        passed_over = f"; passed over {self.passed_over.total()} files ({shown})" if counts else ""
        line = f"{title}: found {len(self)} images{classes}{passed_over}"
        return line.encode("ascii", "backslashreplace").decode()  # a file's name may be in any encoding

    @functools.cached_property
    def digest(self) -> str | None:
        """Return a hash of the ordered names of the images, as far as the source knows them."""
        return names.digest(self.source)

    @property
    def fingerprint(self) -> int:
        """Return a number of 56 bits, which other names, labels or classes change."""
        known = repr((len(self), self.digest, self.classes)).encode()
        labels = np.asarray(self.labels, dtype=np.int64).tobytes()
        return int.from_bytes(hashlib.blake2b(known + labels, digest_size=7).digest(), "big")

    def relabelled(self, classes: tuple[str, ...], where: str) -> ImageSet:
        """Return the same validation images, their classes numbered as in `classes`.

        Raises:
            ValueError: a class is not among them; names `where` the images are.
        """
        if extra := sorted(set(self.classes) - set(classes)):
            raise ValueError(f"{where}: classes of val/ that train/ has not: {extra[:5]}")
        if self.classes == classes:
            return self
        number = np.array([classes.index(name) for name in self.classes])
        return replace(self, labels=number[self.labels], classes=classes)

    def check_pictures(self, what: str, remedy: str) -> None:
        """Raise ValueError, a sentence about `what`, unless the images are files or arrays that can be PIL images."""
        if self.dtype in (None, np.uint8) or (self.dtype == np.uint16 and self.channels == 1):
            return
        raise ValueError(
            f"{what}: resizes with Pillow, which cannot take {self.dtype} arrays of {self.channels} channels, such as "
            f"{self.source.name(0)}; {remedy}"
        )

    def picture(self, index: int) -> Image.Image:
        """Return image `index` for PIL. OSError names it if it cannot be decoded."""
        return self.decoded(index, self.to_picture)

    def pixels(self, index: int) -> torch.Tensor:
        """Return image `index` as a tensor (H, W, C), `uint8` or fp32. OSError names it if it cannot be decoded."""
        return self.decoded(index, self.to_pixels)

    def to_picture(self, content: decode.Content) -> Image.Image:
        """Decode as `decode.to_picture`, in the wanted channels."""
        return decode.to_picture(content, decode.MODES[self.channels])

    def to_pixels(self, content: decode.Content) -> torch.Tensor:
        """Decode as `decode.to_pixels`. ValueError if the values are of a type other than `dtype`."""
        found = decode.dtype_of(content)
        if self.dtype is not None and found != self.dtype:
            raise ValueError(f"its values are {found}, those of the first picture {self.dtype}; they must be alike")
        return decode.to_pixels(content, self.channels)

    def decoded(self, index: int, decoder: Callable):
        """Decode the content of image `index` with `decoder`; an OSError with its name for any error."""
        try:
            return decoder(self.source.read(index))
        except Exception as error:  # decoders raise everything
            raise OSError(f"{self.source.name(index)}: cannot be decoded ({decode.reason(error)})") from error


class SeededImages(Dataset):
    """`dataset[epoch, index]` -> transformed image and label, random only in (seed, epoch, index).

    An image that cannot be decoded or transformed is replaced by the next good one, with its label, and marked in
    `bad`. Once those are too many, a blank image is handed out instead of searching on: `bad.collect` will end the
    run.

    Args:
        images: the images.
        transform: PIL image -> tensor (C, H, W); or, if it has a true attribute `takes_pixels`, of a tensor (H, W, C).
        seed: of the augmentation.
        max_bad_images: share of the images that may be bad; None where nobody calls `bad.collect`: then only a set
            without any good image is an OSError.
    """

    def __init__(self, images: ImageSet, transform: Callable, seed: int = 0, max_bad_images: float | None = None):
        self.images, self.transform, self.seed = images, transform, seed
        self._decoder = images.to_pixels if getattr(transform, "takes_pixels", False) else images.to_picture
        # Tried once by each worker. A transform is tried again: whether it fails may depend on its random numbers.
        self._undecodable: dict[int, str] = {}
        self._collected = max_bad_images is not None
        self.bad = BadImages(len(images), max_bad_images if self._collected else 1.0, self._describe)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        for candidate in ((index + distance) % len(self) for distance in range(len(self))):
            try:
                return self._sample(candidate, (epoch, index)), int(self.images.labels[candidate])
            except OSError:
                self.bad.mark(candidate)
            if self._collected and self.bad.too_many():
                return self.transform(self._blank()), int(self.images.labels[index])
        raise OSError(f"{self._describe(index)}; nor can the {len(self)} pictures from it on")

    def name(self, index: int) -> str:
        """Return the name of image `index`, for messages."""
        return self.images.source.name(index)

    def _sample(self, index: int, key: tuple[int, int]):
        """Return image `index`, transformed with the random numbers of `key`. OSError names it if that fails."""
        if index in self._undecodable:
            raise OSError(self._undecodable[index])
        try:
            picture = self.images.decoded(index, self._decoder)
        except OSError as error:
            self._undecodable[index] = str(error)
            raise
        with seeding.sample_state(self.seed, *key):
            try:
                return self.transform(picture)
            except Exception as error:  # transforms raise everything, too
                raise OSError(f"{self.name(index)}: the transform failed ({decode.reason(error)})") from error

    def _blank(self) -> Image.Image | torch.Tensor:
        """Return a blank image that fits into a batch with the others."""
        array, dtype = np.zeros((8, 8, self.images.channels), dtype=np.uint8), self.images.dtype
        return self._decoder(array if self._decoder == self.images.to_picture or dtype is None else array.astype(dtype))

    def _describe(self, index: int) -> str:
        try:
            self._sample(index, (0, index))
        except OSError as error:
            return str(error)
        return f"{self.name(index)}: could not be decoded or transformed, but now it can"


def open_unlabelled(name: str, data_path: str | None, in_chans: int, loader: str | None = None) -> ImageSet:
    """Open images to pre-train on, of the split train; of a folder without train/ all below it.

    Args:
        name: of the data set: folder, digits, wds, hfds, torch/NAME; see docs/DATA.md.
        data_path: where it is.
        in_chans: channels of the images.
        loader: `package.module:function`, path -> array (H, W, C), for all files below a folder, or those with the
            endings in the function's attribute `extensions`.

    Raises:
        ValueError: unknown data set, nothing at `data_path`, or no image in it.
    """
    check(name, in_chans, loader)
    if name != "folder":
        return _open(name, data_path, "train", in_chans)
    root = _training_folder(_folder(data_path))
    if loader is not None:
        return _with_loader(root, loader, in_chans)
    paths, passed_over = sources.find_files(root, decode.EXTENSIONS)
    if not paths:
        raise ValueError(
            f"--data_path {data_path}: no picture below it; any folder of pictures will do, nested or flat"
        )
    return ImageSet(sources.Files(paths), np.zeros(len(paths), dtype=np.int64), (), in_chans, passed_over=passed_over)


def open_labelled(name: str, data_path: str | None, split: str, in_chans: int) -> ImageSet:
    """Open images with classes; of a folder `data_path`/{train,val}/<class>/<image>. A class may have no image.

    Raises:
        ValueError: unknown data set, nothing at `data_path`, or an image without a class.
    """
    check(name, in_chans, None)
    if in_chans not in decode.MODES:
        raise ValueError(f"--in_chans {in_chans}: training with classes takes 1 (grey), 3 (RGB) or 4 (RGBA) channels")
    if name.startswith("wds/"):
        raise ValueError(f"--dataset {name}: a pattern is for pre-training; name the shards train-*.tar and val-*.tar")
    if name == "folder":
        images = _class_folders(_folder(data_path) / split, in_chans)
    else:
        images = _open(name, data_path, split, in_chans)
    return _with_classes(images)


def _training_folder(root: Path) -> Path:
    """Return the folder train in `root`, or `root` itself where it is not divided into splits."""
    if (root / "train").is_dir():
        return root / "train"
    _, folders, _ = next(sources.walk(root))
    held_out = [name for name in folders if tar_shards.split_of(name) in ("val", "test")]
    if held_out:
        raise ValueError(
            f"--data_path {root}: holds the folder {held_out[0]}, which is not to be trained on, but none named train; "
            f"rename the training folder to train, or name it with --data_path"
        )
    return root


def _class_folders(root: Path, in_chans: int) -> ImageSet:
    """Return the images `root`/<class>/<picture>. A class may have no image."""
    _, classes, beside = next(sources.walk(root)) if root.is_dir() else ("", [], [])
    found = [sources.find_files(root / name, decode.EXTENSIONS) for name in classes]
    paths = [path for part, _ in found for path in part]
    if not paths:
        raise ValueError(
            f"--data_path {root.parent}: no picture in {root}/<class>/<picture>; expected folders train and val"
        )
    passed_over = Counter(f"{sources.ending(name) or 'no ending'} beside the class folders" for name in beside)
    passed_over += sum((others for _, others in found), Counter())
    labels = np.repeat(np.arange(len(classes)), [len(part) for part, _ in found])
    return ImageSet(sources.Files(paths), labels, tuple(classes), in_chans, passed_over=passed_over)


def check(name: str, in_chans: int, loader: str | None) -> None:
    """Raise ValueError for a data set, a number of channels or a loader that cannot be."""
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
    source, labels, classes, why = opener(name, data_path, split)
    if not len(source):
        raise ValueError(f"--dataset {name}: the split {split} is empty")
    return ImageSet(source, labels, classes, in_chans, why_unlabelled=why)


def _with_classes(images: ImageSet) -> ImageSet:
    """Return the images, their classes named. ValueError: one has no class."""
    labels, name = np.asarray(images.labels), images.source.name
    missing = np.flatnonzero((labels < 0) | (labels >= _MOST_CLASSES))
    if len(missing):
        why = images.why_unlabelled or f"a class is a number from 0 to {_MOST_CLASSES - 1}"
        raise ValueError(
            f"{name(missing[0])}: this picture has no class; training with classes needs one for each ({why})"
        )
    classes = images.classes or tuple(map(str, range(int(max(labels)) + 1)))
    beyond = np.flatnonzero(labels >= len(classes))
    if len(beyond):
        raise ValueError(
            f"{name(beyond[0])}: its class is {labels[beyond[0]]}, but only {len(classes)} "
            "classes have names, counted from 0; mend the label, or the list of the names"
        )
    return replace(images, classes=classes)


def check_several_classes(images: ImageSet) -> None:
    """Raise ValueError: all images are of one class, which any classifier gets right."""
    first = images.labels[0]
    if (np.asarray(images.labels) == first).all():
        raise ValueError(
            f"{images.source.name(0)}: every picture to train on is of the class {images.classes[first]}, so there is "
            "nothing to tell apart; in a folder, is there one level too many above those of the classes?"
        )


def _with_loader(root: Path, loader: str, in_chans: int) -> ImageSet:
    function = sources.import_loader(loader)
    endings = getattr(function, "extensions", "")
    endings = (endings,) if isinstance(endings, str) else tuple(endings)
    paths, passed_over = sources.find_files(root, endings)
    if not paths:
        raise ValueError(f"--data_path {root}: no file {' or '.join(endings)} below it for --loader {loader}")
    files = sources.Files(paths, function)
    labels = np.zeros(len(paths), dtype=np.int64)
    images, error = _all_like_the_first(ImageSet(files, labels, (), in_chans, passed_over=passed_over))
    if images.dtype is None:
        raise ValueError(f"--loader {loader}: {error}") from error
    return images


def _all_like_the_first(images: ImageSet, most: int = 1000) -> tuple[ImageSet, OSError | None]:
    """Hold the images to the type of the first good one; return them, and what is wrong with a bad one before it.

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
    return Path(data_path).absolute()  # the hash of the names is the same however the folder is written


def _digits(split: str, in_chans: int) -> ImageSet:
    """Return scikit-learn's 1797 handwritten digits, 8 x 8 pixels; every fifth is for validation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 4) == (split != "train")
    pictures = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return ImageSet(sources.Arrays(pictures, f"digits {split}"), data.target[chosen], tuple("0123456789"), in_chans)
