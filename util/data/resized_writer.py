"""Where prepared pictures go: a tree of files or tar shards, each written whole or not at all, begun and continued."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from util import seeding
from util.data import resize, tar_index
from util.data.datasets import ImageSet
from util.data.decode import Content
from util.data.sources import Files
from util.data.tar_shards import INFO, TarShards

SETTINGS = "prepare_data.json"  # in the destination: what it was made with
Piece = Callable[[], list[str]]  # writes some pictures; gives what is wrong with the bad ones


@dataclass(frozen=True)
class Recipe:
    """What is made of which pictures, and where; the fields are the flags of scripts/prepare_data.py."""

    source: str
    destination: str
    dataset: str
    short_side: int | None
    long_side: int | None
    quality: int
    shards: bool
    pixels: bool
    per_shard: int
    in_chans: int

    def shrink(self, images: ImageSet, index: int) -> Content:
        """Picture `index`, smaller. OSError names it if it cannot be decoded."""
        sizes = {"short_side": self.short_side, "long_side": self.long_side}
        options = {"quality": self.quality, "pixels": self.pixels, "channels": images.channels}
        return images.decoded(index, lambda content: resize.resized(content, **sizes, **options))


@dataclass(frozen=True)
class Split:
    """Pictures to prepare: `title` is train, val, or empty for a folder without splits."""

    title: str
    images: ImageSet
    root: Path | None  # what the names of the pictures are relative to; None where they are no files

    @property
    def labels(self) -> np.ndarray:
        """(N,) class of each picture, -1 where it has none."""
        labels = np.asarray(self.images.labels, dtype=np.int64)
        return np.full_like(labels, -1) if self.root and not self.images.classes else labels


def begin(recipe: Recipe, splits: list[Split]) -> None:
    """Make the destination, or see that what is there was made from the same pictures in the same way.

    Raises:
        ValueError: it cannot be made, was made in another way, or two pictures would be one file there.
        OSError: it cannot be written.
    """
    destination, source = Path(recipe.destination), Path(recipe.source)
    if recipe.source and source.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise ValueError(f"{destination}: is the source {source}, or inside it; name another folder to write")
    for split in () if recipe.shards else splits:
        _check_names(split)
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{destination}: cannot be made ({error.strerror}); name another folder to write") from error
    path = destination / SETTINGS
    settings = {name: value for name, value in asdict(recipe).items() if name != "destination"}
    numbered = recipe.shards or splits[0].root is None  # then what a picture is called depends on all others
    settings["pictures"] = _digest(splits) if numbered else None
    if path.is_file():
        try:
            begun = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: is not whole; name another folder to write, or remove this one") from error
        if begun | {"pictures": None} != settings | {"pictures": None}:
            raise ValueError(
                f"{destination}: was begun with other settings ({path}); name another folder, or remove it"
            )
        if begun != settings:
            raise ValueError(
                f"{destination}: was begun with other pictures or classes; name another folder to write, or remove it"
            )
    write_whole(path, json.dumps(settings).encode())


def _digest(splits: list[Split]) -> str:
    """Of the pictures' names and classes; where a name costs as much as the picture, of their number instead."""
    found = hashlib.sha256()
    for split in splits:
        source = split.images.source
        found.update(repr((split.title, len(source), split.images.classes)).encode("utf-8", "surrogateescape"))
        found.update(split.labels.tobytes())
        for index in range(len(source)) if isinstance(source, (Files, TarShards)) else ():
            found.update(source.name(index).encode("utf-8", "surrogateescape") + b"\0")
    return found.hexdigest()


def pieces(split: Split, recipe: Recipe) -> list[Piece]:
    """The work: a piece for every 64 pictures, which go to files named like theirs, or for every shard."""
    if not recipe.shards:
        return [functools.partial(_write_files, split, recipe, start) for start in range(0, len(split.images), 64)]
    order = iter(seeding.permutation(0, 0, len(split.images)))  # for readers that stream
    groups = iter(lambda: list(itertools.islice(order, recipe.per_shard)), [])
    prefix = Path(recipe.destination) / (split.title or "train")
    return [
        functools.partial(_write_shard, split, recipe, Path(f"{prefix}-{number:06}.tar"), group)
        for number, group in enumerate(groups)
    ]


def finish(recipe: Recipe, splits: list[Split], bad: list[str]) -> None:
    """Write `bad_pictures.txt` and, beside shards, `_info.json`, as timm has it."""
    destination = Path(recipe.destination)
    write_whole(destination / "bad_pictures.txt", _as_bytes("".join(line + "\n" for line in sorted(bad))))
    if not recipe.shards:
        return
    found = {}
    for title in (split.title or "train" for split in splits):
        shards = sorted(destination.glob(f"{title}-*.tar"))
        lengths = [len(tar_index.open_index(shard).names) for shard in shards]
        names = [shard.name for shard in shards]
        found[title] = {"name": title, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    classes = next((split.images.classes for split in splits if split.images.classes), ())
    write_whole(destination / INFO, json.dumps({"splits": found, "classes": list(classes)}, indent=1).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _write_files(split: Split, recipe: Recipe, start: int) -> list[str]:
    """Write 64 pictures that are not there yet. OSError if the destination cannot be written."""
    bad = []
    for index in range(start, min(start + 64, len(split.images))):
        target = Path(recipe.destination) / split.title / _file_name(split, index)
        if target.is_file():
            continue
        try:
            picture = recipe.shrink(split.images, index)
        except OSError as error:
            bad.append(_one_line(error))
            continue
        write_whole(target, picture)
    return bad


def _file_name(split: Split, index: int) -> str:
    """Where the picture goes, below the split's folder: named like the source, its ending added to where it differs."""
    suffix = ".png" if split.images.channels == 4 else ".jpg"
    if split.root is None:
        label, classes = int(split.images.labels[index]), split.images.classes
        folder = "" if label < 0 else _folder_names(classes)[label] if classes else str(label)
        return os.path.join(folder, f"{index:08}{suffix}")
    name = _relative_name(split, index)
    same = name.lower().endswith((".jpg", ".jpeg") if suffix == ".jpg" else suffix)
    return name if same else name + suffix


def _relative_name(split: Split, index: int) -> str:
    return split.images.source.name(index).removeprefix(str(split.root)).lstrip(os.sep)


@functools.cache
def _folder_names(classes: tuple[str, ...]) -> list[str]:
    """Folders of the classes; numbered where two have the same name, as ImageNet's two cranes have."""
    names = [name.replace("/", "_") for name in classes]
    return names if len(set(names)) == len(names) else [f"{number:04}_{name}" for number, name in enumerate(names)]


def _check_names(split: Split) -> None:
    """ValueError if a.png would be written to a.png.jpg, and there is one."""
    if split.root is None:
        return
    names = [_relative_name(split, index) for index in range(len(split.images))]
    targets = [_file_name(split, index) for index in range(len(split.images))]
    new = {target: name for name, target in zip(names, targets, strict=True) if name != target}
    for name, target in zip(names, targets, strict=True):
        if new.get(target, name) != name:
            raise ValueError(f"{split.root}: {new[target]} and {name} would both become {target}; rename one of them")


def _write_shard(split: Split, recipe: Recipe, path: Path, group: list[int]) -> list[str]:
    """Write a shard and its index, unless both are there, or no picture of it is good."""
    left_out = path.with_name(path.name + ".bad")
    if tar_index.index_path(path).is_file() or (left_out.is_file() and not path.is_file()):
        return left_out.read_text("utf-8", "surrogateescape").split("\n") if left_out.is_file() else []
    bad, labels = [], split.labels
    temporary = path.with_name(path.name + ".tmp")
    with tarfile.open(temporary, "w") as tar:
        for index in group:
            try:
                members = _as_member(recipe.shrink(split.images, index), split.images.channels)
            except OSError as error:
                bad.append(_one_line(error))
                continue
            if labels[index] >= 0:
                members["cls"] = str(labels[index]).encode()
            for kind, data in members.items():
                member = tarfile.TarInfo(f"{index:08}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    if len(bad) == len(group):
        temporary.unlink()
        write_whole(left_out, _as_bytes("\n".join(bad)))
        return bad
    temporary.replace(path)
    if bad:
        write_whole(left_out, _as_bytes("\n".join(bad)))
    tar_index.scan(path).save(path)  # last: it says that the shard is whole
    return bad


def _as_member(picture: Content, channels: int) -> dict[str, bytes]:
    """Ending and content of the file that holds a picture."""
    if isinstance(picture, bytes):
        return {"png" if channels == 4 else "jpg": picture}
    buffer = io.BytesIO()
    np.save(buffer, picture)
    return {"npy": buffer.getvalue()}


def _one_line(error: OSError) -> str:
    return " ".join(str(error).split())


def _as_bytes(text: str) -> bytes:
    """Names of files may be in any encoding; the same bytes are written again."""
    return text.encode("utf-8", "surrogateescape")
