"""Tar shards (the WebDataset layout) read by number: an index of offsets, made once, stands beside each shard."""

from __future__ import annotations

import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from util.data.decode import Content
from util.data.sources import Strings
from util.data.tar_index import open_index

INFO = "_info.json"  # beside the shards, as timm reads it: which shards make a split, and how long each is
_OPEN_FILES = 64
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}


class TarShards:
    """The images of several shards, one after the other."""

    def __init__(self, shards: list[Path]):
        indices = [open_index(shard) for shard in shards]
        self.shards = shards
        self.ends = np.cumsum([len(index.names) for index in indices])
        self.starts = np.concatenate([index.starts for index in indices])
        self.sizes = np.concatenate([index.sizes for index in indices])
        self.labels = np.concatenate([index.labels for index in indices])
        self.names = Strings(name for index in indices for name in index.names)
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, the least recently used first

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> Content:
        """Return the image's bytes; of a .npy member the array."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        size = int(self.sizes[index])
        data = os.pread(self._descriptor(shard), size, int(self.starts[index]))  # no file position to share
        if len(data) != size:
            raise OSError("the shard is cut short")
        return np.load(io.BytesIO(data), allow_pickle=False) if self.names[index].lower().endswith(".npy") else data

    def name(self, index: int) -> str:
        """Return shard:member."""
        return f"{self.shards[np.searchsorted(self.ends, index, side='right')]}:{self.names[index]}"

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) == _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}


def read_info(root: Path) -> dict:
    """Return the content of `_info.json`, {} where there is none. ValueError if it is not what it should be."""
    path = root / INFO
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text())
        for split in info["splits"].values():
            _check_list(split["filenames"], str)
            _check_list(split["shard_lengths"], int)
            if len(split["filenames"]) != len(split["shard_lengths"]):
                raise ValueError("filenames and shard_lengths are not equally many")
        _check_list(info.setdefault("classes", []), str)
        return info
    except Exception as error:  # whatever type stands where another belongs
        raise ValueError(f"{path}: not a description of shards ({error!r}); delete it to take all shards") from error


def _check_list(values: list, kind: type) -> None:
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise TypeError(f"{values!r:.50} is no list of {kind.__name__}")


def find_shards(root: Path, pattern: str, split: str) -> list[Path]:
    """Find the shards of `split`: by `pattern` (with {000..009} or *), else by `_info.json`, else by their names.

    Raises:
        ValueError: there is none, or one that `_info.json` or the braces name is missing.
    """
    if pattern:
        shards = _matching_shards(root, pattern)
    else:
        listed = [part for name, part in read_info(root).get("splits", {}).items() if name in _SPLITS[split]]
        if listed:
            return _listed_shards(root, listed[0])
        shards = _named_shards(root, split)
    if not shards:
        raise ValueError(f"--data_path {root}: no shards of the split {split}; expected {split}/*.tar or {split}-*.tar")
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard}: this shard is missing")
    return shards


def _named_shards(root: Path, split: str) -> list[Path]:
    """Return those in a folder of the split's name, else those whose names say it, else, to train on, the unnamed."""
    inside = [shard for name in _SPLITS[split] for shard in sorted(root.glob(f"{name}/*.tar"))]
    beside = sorted(root.glob("*.tar"))
    for shards, wanted in ((inside, split), (beside, split), (beside, None)):
        found = [shard for shard in shards if _said_split(shard.relative_to(root)) == wanted]
        if found and (wanted or split == "train"):
            return found
    return []


def _said_split(path: Path) -> str | None:
    """Return the split that a word of the path says, such as imagenet-train-000.tar. ValueError if it says two."""
    said = sorted({split_of(word) for word in re.split(r"[-_./]", path.as_posix())} - {None})
    if len(said) > 1:
        raise ValueError(f"{path}: {' or '.join(said)}? Rename this shard, or name all with --dataset wds/PATTERN")
    return said[0] if said else None


def split_of(word: str) -> str | None:
    """Return the split that a word names, in any case of letters: train, val, test or none."""
    return next((split for split, names in _SPLITS.items() if word.lower() in names), None)


def _listed_shards(root: Path, split: dict) -> list[Path]:
    shards = [root / name for name in split["filenames"]]
    for shard, length in zip(shards, split["shard_lengths"], strict=True):
        if not shard.is_file():
            raise ValueError(f"{shard}: this shard is missing, though {root / INFO} names it")
        found = len(open_index(shard).names)
        if found != length:
            raise ValueError(f"{shard}: holds {found} pictures, but {root / INFO} says {length}; copy it again")
    return shards


def _matching_shards(root: Path, pattern: str) -> list[Path]:
    """Return the shards of a pattern such as a-{008..010}.tar or a-*.tar; ends at the first that is missing."""
    if Path(pattern).is_absolute():
        raise ValueError(f"--dataset wds/{pattern}: give the pattern below --data_path {root}, without its folders")
    shards = []
    for part in _expand(pattern):
        shards += sorted(root.glob(part)) or [root / part]
        if not shards[-1].is_file():
            break
    return shards


def _expand(pattern: str) -> Iterator[str]:
    """Expand a-{008..010}.tar -> a-008.tar, a-009.tar, a-010.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from _expand(f"{before}{number:0{len(found[1])}}{after}")
