"""Tar shards (the WebDataset layout) read by number: an index of offsets, made once, stands beside each shard."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.decode import Content
from util.sources import Strings

INFO = "_info.json"  # beside the shards, as timm reads it: which shards make a split, and how long each is
EXTENSIONS = {*IMG_EXTENSIONS, ".npy"}
_MAGIC = "tar-index-1"
_OPEN_FILES = 64


@dataclass(frozen=True)
class ShardIndex:
    """Where the pictures of one shard lie.

    Attributes:
        starts, sizes: of the pictures' bytes in the shard.
        labels: their classes, -1 where the shard has none.
        names: of the members.
    """

    starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: list[str]

    def save(self, shard: Path) -> None:
        """Write it beside `shard`; whole or not at all."""
        rows = zip(self.starts, self.sizes, self.labels, self.names, strict=True)
        lines = [f"{_MAGIC}\t{shard.stat().st_size}\t{len(self.names)}", *("\t".join(map(str, row)) for row in rows)]
        temporary = Path(f"{index_path(shard)}.{os.getpid()}.tmp")
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(index_path(shard))


class TarShards:
    """The pictures of several shards, one after the other."""

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
        """The picture's bytes; of a .npy member the array."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        size = int(self.sizes[index])
        data = os.pread(self._descriptor(shard), size, int(self.starts[index]))  # no file position to share
        if len(data) != size:
            raise OSError("the shard is cut short")
        return np.load(io.BytesIO(data), allow_pickle=False) if self.names[index].endswith(".npy") else data

    def name(self, index: int) -> str:
        """shard:member."""
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


def index_path(shard: Path) -> Path:
    """The index's place."""
    return shard.with_name(shard.name + ".idx")


def open_index(shard: Path) -> ShardIndex:
    """The index of `shard`, made and kept if there is none. ValueError names what is missing, cut or does not match."""
    if not shard.is_file():
        raise ValueError(f"{shard}: this shard is missing")
    if index_path(shard).is_file():
        return _load_index(shard)
    index = scan(shard)
    try:
        index.save(shard)
    except OSError as error:
        print(f"{shard}: its index cannot be kept ({error.strerror}); every start reads the whole shard's headers")
    return index


def scan(shard: Path) -> ShardIndex:
    """Find the pictures of `shard` and their classes (key.cls, or key.json with "label")."""
    pictures: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                key, kind = str(path.parent / path.name.split(".")[0]), path.suffix.lower()
                if kind in EXTENSIONS:
                    pictures[key] = (member.offset_data, member.size, member.name)
                elif kind in (".cls", ".json"):
                    label = json.loads(tar.extractfile(member).read())
                    labels[key] = int(label["label"] if isinstance(label, dict) else label)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard}: not a whole, uncompressed tar file ({error}); copy it again") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"{shard}: {member.name} holds no class number ({error!r})") from error
    _check_end(shard)
    if not pictures:
        raise ValueError(f"{shard}: no picture in this shard")
    starts, sizes, names = zip(*pictures.values(), strict=True)
    found = np.array([labels.get(key, -1) for key in pictures], dtype=np.int64)
    return ShardIndex(np.array(starts, dtype=np.int64), np.array(sizes, dtype=np.int64), found, list(names))


def _check_end(shard: Path) -> None:
    """A tar file ends with two blocks of zeros; one that was cut between two members has no other mark."""
    with open(shard, "rb") as file:
        file.seek(max(0, shard.stat().st_size - 1024))
        if file.read().strip(b"\0"):
            raise ValueError(f"{shard}: cut short, the end mark of a tar file is missing; copy it again")


def _load_index(shard: Path) -> ShardIndex:
    path = index_path(shard)
    wrong = f"{path}: this index does not match its shard"
    remedy = "copy the shard again if it was cut short, or delete the index to have it made anew"
    try:
        header, *lines = path.read_text().splitlines()
        magic, num_bytes, num_samples = header.split("\t")
        rows = [line.split("\t", 3) for line in lines]
        table = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
        index = ShardIndex(*table.T, [row[3] for row in rows])
        expected = (int(num_bytes), int(num_samples))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a whole index ({error}); delete it to have it made anew") from error
    if magic != _MAGIC or len(rows) != expected[1]:
        raise ValueError(f"{path}: not a whole index; delete it to have it made anew")
    if shard.stat().st_size != expected[0]:
        raise ValueError(f"{wrong}: {shard.name} has {shard.stat().st_size} bytes, not {expected[0]}; {remedy}")
    with open(shard, "rb") as file:
        for row in {0, len(rows) - 1}:
            file.seek(index.starts[row] - tarfile.BLOCKSIZE)  # where the member's own header is
            try:
                member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            except tarfile.TarError as error:
                raise ValueError(f"{wrong} at {index.names[row]} ({error}); {remedy}") from error
            if member.size != index.sizes[row]:
                raise ValueError(f"{wrong} at {index.names[row]}; {remedy}")
    return index


def read_info(root: Path) -> dict:
    """The content of `_info.json`, {} where there is none. ValueError if it cannot be read."""
    path = root / INFO
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text())
        for split in info["splits"].values():
            assert len(split["filenames"]) == len(split["shard_lengths"])
        return info
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path}: not a description of shards ({error!r}); delete it to take all shards") from error


def find_shards(root: Path, pattern: str, split: str) -> list[Path]:
    """The shards of `split`: those of `pattern` (with {000..009} or *), else of `_info.json`, else by their names.

    Raises:
        ValueError: there is none, or one that `_info.json` or the braces name is missing.
    """
    if pattern:
        shards = [path for part in _expand(pattern) for path in (sorted(root.glob(part)) or [root / part])]
    else:
        synonyms = ("train", "training") if split == "train" else ("val", "validation", "valid")
        listed = [part for name, part in read_info(root).get("splits", {}).items() if name in synonyms]
        if listed:
            return _listed_shards(root, listed[0])
        places = [place for name in synonyms for place in (f"{name}/*.tar", f"{name}[-_.]*.tar")]
        shards = next((found for place in places if (found := sorted(root.glob(place)))), [])
        if not shards and split == "train":
            shards = sorted(root.glob("*.tar"))
    if not shards:
        raise ValueError(f"--data_path {root}: no shards of the split {split}; expected {split}/*.tar or {split}-*.tar")
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard}: this shard is missing")
    return shards


def _listed_shards(root: Path, split: dict) -> list[Path]:
    shards = [root / name for name in split["filenames"]]
    for shard, length in zip(shards, split["shard_lengths"], strict=True):
        if not shard.is_file():
            raise ValueError(f"{shard}: this shard is missing, though {root / INFO} names it")
        found = len(open_index(shard).names)
        if found != length:
            raise ValueError(f"{shard}: holds {found} pictures, but {root / INFO} says {length}; copy it again")
    return shards


def _expand(pattern: str) -> list[str]:
    """a-{008..010}.tar -> a-008.tar, a-009.tar, a-010.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [name for number in numbers for name in _expand(f"{before}{number:0{len(found[1])}}{after}")]
