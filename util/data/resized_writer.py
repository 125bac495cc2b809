"""Write resized images as tar shards, each whole or not at all, and continue what an earlier process has begun."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from util import seeding
from util.data import tar_index
from util.data.datasets import ImageSet
from util.data.resize import resize_image
from util.data.sources import Files
from util.data.tar_shards import INFO, TarShards
from util.files import replacing, write_whole

SETTINGS = "prepare_data.json"  # in the destination: which images it holds, and how they were resized
BAD = "bad_pictures.txt"


class ResizedWriter:
    """Write the resized images of a data set into one folder, in a random order for readers that stream.

    Args:
        destination: the folder, which exists and in which no other process writes.
        source: where the images come from; a destination is continued from the same one only.
        splits: the images of train and, if there are some, of val.
        per_shard: images in a shard.
        options: of `resize_image`.
    """

    def __init__(self, destination: Path, source: str, splits: dict[str, ImageSet], per_shard: int, **options):
        self.destination, self.source, self.splits = destination, source, splits
        self.per_shard, self.options = per_shard, options

    def begin(self) -> None:
        """Record the settings in the destination, or compare them with those recorded there.

        Raises:
            ValueError: the destination holds other images, or the same with other settings.
            OSError: it cannot be written.
        """
        path = self.destination / SETTINGS
        settings = self.options | {"per_shard": self.per_shard, "source": self.source, "images": self._digest()}
        content = json.dumps(settings, indent=1).encode()
        if not path.exists() and any(self.destination.glob("*.tar")):
            raise ValueError(f"{self.destination}: holds tar files of something else; name another folder to write")
        if path.exists() and path.read_bytes() != content:
            raise ValueError(
                f"{self.destination}: was begun with other settings, other images or other classes ({path}); "
                "name another folder to write, or remove this one"
            )
        write_whole(path, content)

    def _digest(self) -> str:
        """Return a hash of the images' names and classes; of their number where a name costs as much as its image."""
        found = hashlib.sha256()
        for split, images in self.splits.items():
            found.update(repr((split, len(images), images.channels, images.classes)).encode())
            found.update(np.asarray(images.labels, dtype=np.int64).tobytes())
            for index in range(len(images)) if isinstance(images.source, (Files, TarShards)) else ():
                found.update(_encoded(images.source.name(index)) + b"\0")
        return found.hexdigest()

    def shards(self) -> list[tuple[str, int]]:
        """Return split and number of every shard."""
        counts = {split: -(-len(images) // self.per_shard) for split, images in self.splits.items()}
        return [(split, number) for split, count in counts.items() for number in range(count)]

    def write_shard(self, split: str, number: int) -> list[str]:
        """Write a shard and its index, unless it is there with every image that can be decoded.

        Returns:
            One message for each image that is left out. If that is all of them, there is no shard.

        Raises:
            ValueError: a shard that is there does not match its index.
            OSError: the shard cannot be written.
        """
        images, path = self.splits[split], self._path(split, number)
        first = number * self.per_shard
        chosen = seeding.permutation(0, 0, len(images))[first : first + self.per_shard]
        written, bad = set(), []
        if path.is_file() and tar_index.index_path(path).is_file():
            written = {int(PurePosixPath(name).stem) for name in tar_index.open_index(path).names}
        if not any(self._members(images, [index for index in chosen if index not in written], bad)):
            return bad
        bad.clear()  # the whole shard is written, with what an earlier command could not decode
        with replacing(path, durable=True) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in self._members(images, chosen, bad):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        tar_index.scan(path).save(path)  # last: it says that the shard is whole
        return bad

    def _path(self, split: str, number: int) -> Path:
        return self.destination / f"{split}-{number:06}.tar"

    def _members(self, images: ImageSet, indices: list[int], bad: list[str]) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of a shard's files; add a message to `bad` for each image that cannot be decoded."""
        for index in indices:
            try:
                image = images.decoded(
                    index, lambda content: resize_image(content, channels=images.channels, **self.options)
                )
            except OSError as error:
                bad.append(" ".join(str(error).split()))
                continue
            if isinstance(image, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, image)
                yield f"{index:08}.npy", buffer.getvalue()
            else:
                yield f"{index:08}.{'png' if images.channels == 4 else 'jpg'}", image
            if images.labels[index] >= 0:
                yield f"{index:08}.cls", str(images.labels[index]).encode()

    def finish(self, bad: list[str]) -> None:
        """Write the list of the bad images and `_info.json`, as timm reads it. OSError: they cannot be written.

        Raises:
            ValueError: no image could be decoded.
        """
        write_whole(self.destination / BAD, _encoded("".join(line + "\n" for line in sorted(bad))))
        info: dict[str, dict] = {}
        for split in self.splits:
            shards = sorted(self.destination.glob(f"{split}-*.tar"))
            lengths = [len(tar_index.open_index(shard).names) for shard in shards]
            names = [shard.name for shard in shards]
            if shards:
                info[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
        if not info:
            raise ValueError(f"{self.source}: no image can be decoded; {self.destination / BAD} says why")
        classes = next((images.classes for images in self.splits.values() if images.classes), ())
        write_whole(self.destination / INFO, json.dumps({"splits": info, "classes": list(classes)}, indent=1))


def _encoded(text: str) -> bytes:
    """Encode a file's name to the bytes it had, in whatever encoding they were."""
    return text.encode("utf-8", "surrogateescape")
