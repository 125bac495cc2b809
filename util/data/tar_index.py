"""What lies where in a tar shard: found by reading its headers once, then kept in an index beside it."""

from __future__ import annotations

import contextlib
import json
import posixpath
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from util.data import decode

EXTENSIONS = {*decode.EXTENSIONS, ".npy"}
# The first kept names as they were, newlines and all; the second knew fewer endings, and took sparse members.
_MAGIC, _OLD_MAGICS = "tar-index-3", (b"tar-index-1", b"tar-index-2")
_LONGEST_END = 1 << 20  # bytes of zeros, of writers in large blocks
_LONGEST_LABEL = 1 << 24  # bytes of a .cls or .json file


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of one shard lie.

    Attributes:
        starts, sizes: of the images' bytes in the shard.
        labels: their classes, -1 where the shard has none.
        names: of the members.
    """

    starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: list[str]

    def save(self, shard: Path) -> None:
        """Write it beside `shard`; whole or not at all."""
        rows = zip(self.starts, self.sizes, self.labels, map(json.dumps, self.names), strict=True)
        lines = [f"{_MAGIC}\t{shard.stat().st_size}\t{len(self.names)}", *("\t".join(map(str, row)) for row in rows)]
        # Containers that share the folder may have the same host name and process number.
        temporary = Path(f"{index_path(shard)}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_text("\n".join(lines) + "\n")
            temporary.replace(index_path(shard))
        finally:
            temporary.unlink(missing_ok=True)


def index_path(shard: Path) -> Path:
    """Return the index's place."""
    return shard.with_name(shard.name + ".idx")


def open_index(shard: Path) -> ShardIndex:
    """Return the index of `shard`, made and kept if there is none or an older one than the shard.

    Raises:
        ValueError: names what is missing, cut or does not match.
    """
    if not shard.is_file():
        raise ValueError(f"{shard}: this shard is missing")
    with _readable(shard):
        indexed = index_path(shard).is_file() and not _is_outdated(shard)
    if indexed:
        return _load_index(shard)
    index = scan(shard)
    try:
        index.save(shard)
    except OSError as error:
        print(f"{shard}: its index cannot be kept ({error.strerror}); every start reads the whole shard's headers")
    return index


def _is_outdated(shard: Path) -> bool:
    """Return whether an index is of an earlier format, or older than its shard, which was written again then."""
    with open(index_path(shard), "rb") as file:
        magic = file.read(len(_MAGIC))
    return magic in _OLD_MAGICS or index_path(shard).stat().st_mtime_ns < shard.stat().st_mtime_ns


def scan(shard: Path) -> ShardIndex:
    """Find the images of `shard` and their classes (key.cls, or a whole number as "label" in key.json).

    A key is a member's path up to the first dot of its last part, as WebDataset has it. ValueError if the shard is
    damaged or does not have one image for each key with images.
    """
    pictures: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, int] = {}
    members = _members(shard)
    by_name = {posixpath.normpath(member.name): member for member in members}
    with open(shard, "rb") as file:
        for member in members:
            path = PurePosixPath(member.name)
            stem, _, ending = path.name.partition(".")
            key = str(path.parent / stem)
            if not stem or not (member.isfile() or member.issym() or member.islnk()):
                continue
            if path.suffix.lower() in EXTENSIONS:
                pictures.setdefault(key, []).append(member)
            elif ending.lower() == "cls" or (ending.lower() == "json" and key not in labels):
                content = _followed(shard, member, by_name)
                file.seek(content.offset_data)
                labels[key] = _class_number(file.read(min(content.size, _LONGEST_LABEL)))
    if not pictures:
        raise ValueError(f"{shard}: no picture in this shard")
    chosen = [_picture_of(shard, found) for found in pictures.values()]
    contents = [_followed(shard, member, by_name) for member in chosen]
    return ShardIndex(
        np.array([content.offset_data for content in contents], dtype=np.int64),
        np.array([content.size for content in contents], dtype=np.int64),
        np.array([labels.get(key, -1) for key in pictures], dtype=np.int64),
        [member.name for member in chosen],
    )


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """Return the members of `shard`. ValueError: damaged, or one is no plain run of bytes in it."""
    members, length = [], shard.stat().st_size
    with _readable(shard):
        tar = tarfile.open(shard, "r:")  # noqa: SIM115 - closed below
    with tar:
        while True:
            with _readable(shard):
                member = tar.next()
            if member is None:
                _check_end(shard, tar.offset)
                return members
            if member.issparse():
                raise ValueError(f"{shard}: {member.name} is a sparse file; write the shard anew without --sparse")
            # A negative size would lead tarfile back, and on for ever.
            if member.size < 0 or (member.isfile() and member.offset_data + member.size > length):
                raise ValueError(
                    f"{shard}: {member.name} has {member.size} bytes by its header, which cannot be: damaged or cut "
                    "short; copy it again"
                )
            members.append(member)


@contextlib.contextmanager
def _readable(shard: Path) -> Iterator[None]:
    """Turn every error into a ValueError that names `shard`: damaged headers make tarfile raise many."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{shard}: not a whole, uncompressed tar file ({error}); copy it again") from error


def _check_end(shard: Path, end: int) -> None:
    """Raise unless only zeros follow the last member, two blocks or more: tarfile stops at anything else silently."""
    length = shard.stat().st_size - end
    if length > _LONGEST_END:
        raise ValueError(
            f"{shard}: {length} bytes follow its last member at byte {end}, too many for the end of a tar file: "
            "damaged, or not wholly written; copy it again"
        )
    with open(shard, "rb") as file:
        file.seek(end)
        rest = file.read()
    if rest.strip(b"\0"):
        raise ValueError(f"{shard}: damaged or cut short at byte {end}, where no member begins; copy it again")
    if length < 2 * tarfile.BLOCKSIZE:
        raise ValueError(f"{shard}: cut short, the end mark of a tar file is missing; copy it again")


def _followed(shard: Path, member: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """Return the member of the same shard that holds the bytes of `member`, which may be a link to it."""
    content, seen = member, 0
    while not content.isfile():
        folder = posixpath.dirname(content.name) if content.issym() else ""
        target = posixpath.normpath(posixpath.join(folder, content.linkname))
        seen += 1
        if target not in by_name or seen > len(by_name):  # the second: links in a circle
            raise ValueError(f"{shard}: {member.name} is a link to {target}, which is not a file of this shard")
        content = by_name[target]
    return content


def _class_number(content: bytes) -> int:
    """Return the class in a .cls or .json file; -1 if there is none, as in captions, or it is an identifier."""
    try:
        label = json.loads(content)
    except (ValueError, RecursionError):
        return -1
    label = label.get("label") if isinstance(label, dict) else label
    return label if type(label) is int and 0 <= label < 2**31 else -1


def _picture_of(shard: Path, members: list[tarfile.TarInfo]) -> tarfile.TarInfo:
    """Return the image among the members of one key: not key.seg.png, and not key.npy (an embedding) beside another."""
    plain, compound = [], []
    for member in members:
        path = PurePosixPath(member.name)
        (plain if path.name.count(".") == 1 else compound).append((path.suffix.lower() == ".npy", member))
    for is_array in (False, True):
        found = [member for kind, member in plain if kind == is_array]
        others = [member for kind, member in compound if kind == is_array]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{shard}: several pictures of one key ({_some(found)}); leave one of them")
        if others:
            raise ValueError(
                f"{shard}: more than an ending after the first dot ({_some(others)}), where a key ends; "
                "name each picture key.jpg, its key without a dot"
            )
    raise AssertionError("a key without a member")


def _some(members: list[tarfile.TarInfo], most: int = 3) -> str:
    return ", ".join(member.name for member in members[:most]) + (", ..." if len(members) > most else "")


def _load_index(shard: Path) -> ShardIndex:
    path, length = index_path(shard), shard.stat().st_size
    wrong = f"{path}: this index does not match its shard"
    remedy = "copy the shard again if it was cut short, or delete the index to have it made anew"
    try:
        header, *lines = path.read_text().splitlines()
        magic, num_bytes, num_samples = header.split("\t")
        rows = [line.split("\t", 3) for line in lines]
        starts, sizes, labels = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3).T
        index = ShardIndex(starts, sizes, labels, [json.loads(row[3]) for row in rows])
        expected = int(num_bytes)
        if magic != _MAGIC or not len(rows) == int(num_samples) > 0:
            raise ValueError(f"{len(rows)} of {num_samples} pictures")
        if not all(isinstance(name, str) for name in index.names) or labels.min() < -1 or sizes.min() < 0:
            raise ValueError("a name or number that cannot be")
    except (OSError, ValueError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole index ({error}); delete it to have it made anew") from error
    if length != expected:
        raise ValueError(f"{wrong}: {shard.name} has {length} bytes, not {expected}; {remedy}")
    outside = np.flatnonzero((starts < tarfile.BLOCKSIZE) | (starts > length) | (sizes > length - starts))
    if len(outside):
        raise ValueError(f"{wrong} at {index.names[outside[0]]}; {remedy}")
    with open(shard, "rb") as file:
        for row in {0, len(rows) - 1}:
            file.seek(starts[row] - tarfile.BLOCKSIZE)  # where the member's own header is
            try:
                member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            except Exception as error:
                raise ValueError(f"{wrong} at {index.names[row]} ({error}); {remedy}") from error
            if member.size != sizes[row]:
                raise ValueError(f"{wrong} at {index.names[row]}; {remedy}")
    return index
