"""Where the images of a data set lie: any of them, by its number, without the others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np

from util.data.decode import Content
from util.registry import import_attribute


class Source(Protocol):
    """Images by number. `read` may fail with any error; the caller adds `name`."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Content:
        """Return the encoded file, or its pixels."""

    def name(self, index: int) -> str:
        """Return the name by which a person can find it."""


class Strings(Sequence):
    """Many strings in two arrays: a list of a million would be copied into each worker, by its reference counts."""

    def __init__(self, texts: Iterable[str]):
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._data = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        first = self._ends[index - 1] if index else 0
        return self._data[first : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def encoded(self) -> Iterator[memoryview]:
        """Iterate over the strings' bytes, faster than over the strings."""
        data, first = memoryview(self._data), 0
        for end in self._ends.tolist():
            yield data[first:end]
            first = end


class Files:
    """Images that are files.

    Args:
        paths: of the files.
        loader: path -> array (H, W, C); None decodes usual image files.
    """

    def __init__(self, paths: Iterable[str], loader: Callable[[str], np.ndarray] | None = None):
        self.paths, self.loader = Strings(paths), loader

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Content:
        """Return the file's bytes, or what the loader makes of it."""
        path = self.paths[index]
        return Path(path).read_bytes() if self.loader is None else np.asarray(self.loader(path))

    def name(self, index: int) -> str:
        """Return its path."""
        return self.paths[index]


class Chosen:
    """Some of the images of another source."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Content:
        """Do as the other source."""
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        """Do as the other source."""
        return self.source.name(self.indices[index])


class Arrays:
    """Images in memory: an array (N, H, W) or (N, H, W, C), or anything that gives an array for an index."""

    def __init__(self, arrays: Sequence, title: str):
        self.arrays, self.title = arrays, title

    def __len__(self) -> int:
        return len(self.arrays)

    def read(self, index: int) -> Content:
        """Return the pixels."""
        return np.asarray(self.arrays[index])

    def name(self, index: int) -> str:
        """Return the data set and the number."""
        return f"{self.title}, picture {index}"


def find_files(root: Path, endings: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Return the files below `root` with these endings, sorted by path, and how many others have which ending.

    Capitals and small letters are alike in endings.

    Raises:
        ValueError: a folder cannot be read.
    """
    found, passed_over, taken = [], Counter(), tuple(text.lower() for text in endings)
    for place, _, names in walk(root):
        wanted = {name for name in names if name.lower().endswith(taken)}
        found += [os.path.join(place, name) for name in wanted]
        passed_over.update(ending(name) or "no ending" for name in names if name not in wanted)
    return sorted(found), passed_over


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder from `root` down, with the names of its folders and of its files.

    Links are followed, but no folder is entered twice; what is hidden is skipped, such as macOS's `._a.jpg`.

    Raises:
        ValueError: a folder cannot be read. What looks like one, without an ending, counts: a link to nothing.
    """
    seen = set()
    for place, folders, names in os.walk(root, followlinks=True, onerror=_refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        names = [name for name in names if not name.startswith(".")]
        for name in names:
            if not ending(name):
                try:
                    os.stat(os.path.join(place, name))
                except OSError as error:
                    _refuse(error)
        yield place, folders, names


def ending(name: str) -> str:
    """Return the ending of a file's name, in lower case."""
    return os.path.splitext(name)[1].lower()


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(
        f"--data_path: {error.filename} cannot be read ({error.strerror}); mend its permissions or link, or remove it"
    ) from error


def import_loader(name: str) -> Callable[[str], np.ndarray]:
    """Return the function `package.module:function`. ValueError if there is none."""
    if ":" not in name:
        raise ValueError(f"--loader {name}: write package.module:function, such as util.loaders:npy")
    try:
        return import_attribute(name)
    except Exception as error:  # the module may raise anything
        raise ValueError(f"--loader {name}: cannot be imported ({type(error).__name__}: {error})") from error
