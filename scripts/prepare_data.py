#!/usr/bin/env python3
"""Make the pictures of a data set smaller, once, into a folder or tar shards; or print the channels' statistics.

    python scripts/prepare_data.py /data/imagenet /data/imagenet_400 --long_side 400
    python scripts/prepare_data.py /data/imagenet /data/shards --short_side 256 --shards [--pixels]
    python scripts/prepare_data.py ~/pictures --stats

Every picture is decoded, before and after. Run again after an interruption, it goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from util import cli, datasets, prepare, seeding, tar_shards
from util.datasets import ImageSet
from util.decode import Content
from util.sources import Files

SETTINGS = "prepare_data.json"  # in the destination: what it was made with


@dataclass(frozen=True)
class Split:
    """Pictures to prepare: `title` is train, val, or empty for a folder without splits."""

    title: str
    images: ImageSet
    root: Path | None  # what the names of the pictures are relative to; None where they are no files


def main(argv: list[str] | None = None) -> None:
    """Prepare as the command line says."""
    arguments = parse(argv)
    torch.set_num_threads(1)
    with cli.exit_on_user_error():
        splits = open_splits(arguments)
        if arguments.stats:
            print_statistics(splits[0].images, arguments)
            return
        check_destination(arguments)
    bad = []
    for split in splits:
        work = shard_work(split, arguments) if arguments.shards else file_work(split, arguments)
        bad += in_parallel(work, arguments.workers, split.title or "pictures")
    destination = Path(arguments.destination)
    if arguments.shards:
        describe_shards(destination, splits)
    (destination / "bad_pictures.txt").write_text("".join(line + "\n" for line in sorted(bad)))
    total = sum(len(split.images) for split in splits)
    print(f"{total - len(bad)} pictures are in {destination}; {len(bad)} cannot be decoded and were left out")
    if bad:
        print(f"their names are in {destination / 'bad_pictures.txt'}, for example {bad[0]}")
    print_psnr(splits[0].images, arguments)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, with train/ and val/ or without; or what --data_path would be")
    parser.add_argument("destination", nargs="?", help="folder to write; not with --stats")
    parser.add_argument("--dataset", default="folder", help="of the source, as for pre-training")
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--short_side", type=int, help="pixels of the shorter side")
    side.add_argument("--long_side", type=int, help="pixels of the longest side")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--shards", action="store_true", help="write tar shards with an index instead of files")
    parser.add_argument("--pixels", action="store_true", help="no JPEGs in the shards: pixels, large but quick to read")
    parser.add_argument("--per_shard", type=int, default=5000, help="pictures in a shard")
    parser.add_argument("--in_chans", type=int, default=3, help="1 grey, 3 RGB, 4 RGBA (written as PNG)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--stats", action="store_true", help="only print --mean and --std of the training pictures")
    parser.add_argument("--stats_images", type=int, default=20000, help="pictures for --stats, evenly spaced")
    parser.add_argument("--loader", help="package.module:function, as for pre-training; for --stats")
    arguments = parser.parse_args(argv)
    if not arguments.stats and not arguments.destination:
        parser.error("the destination is missing")
    if arguments.loader and not arguments.stats:
        parser.error(f"--loader {arguments.loader}: its arrays have no picture format; it is only for --stats")
    if arguments.pixels and not arguments.shards:
        parser.error("--pixels: is for tar shards; add --shards")
    for name in ("short_side", "long_side", "per_shard", "workers", "stats_images", "quality", "in_chans"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    return arguments


def open_splits(arguments: argparse.Namespace) -> list[Split]:
    """The training and, if there are some, the validation pictures. ValueError if there is nothing."""
    name, source, chans = arguments.dataset, arguments.source, arguments.in_chans
    root = Path(source)
    if name == "folder" and not (root / "train").is_dir():
        return [Split("", datasets.open_unlabelled(name, source, chans, arguments.loader), root)]
    splits = []
    for title in ("train", "val"):
        try:
            images = datasets.open_labelled(name, source, title, chans)
        except ValueError as error:
            if title == "val":
                print(f"no validation pictures ({error})")
                continue
            images = datasets.open_unlabelled(name, source, chans, arguments.loader)
        splits.append(Split(title, images, root / title if name == "folder" else None))
    return splits


def check_destination(arguments: argparse.Namespace) -> None:
    """Make the destination. ValueError if it was made with other settings, or is the source."""
    destination = Path(arguments.destination)
    if destination.resolve() == Path(arguments.source).resolve():
        raise ValueError(f"{destination}: is the source; name another folder to write")
    names = ("source", "dataset", "short_side", "long_side", "quality", "shards", "pixels", "per_shard", "in_chans")
    settings = {name: getattr(arguments, name) for name in names}
    destination.mkdir(parents=True, exist_ok=True)
    path = destination / SETTINGS
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{destination}: was begun with other settings ({path}); name another folder, or remove it")
    path.write_text(json.dumps(settings))


def shrink(images: ImageSet, index: int, arguments: argparse.Namespace) -> Content:
    """Picture `index`, smaller. OSError names it if it cannot be decoded."""
    options = {name: getattr(arguments, name) for name in ("short_side", "long_side", "quality", "pixels")}
    return images.decoded(index, lambda content: prepare.resized(content, channels=images.channels, **options))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def file_work(split: Split, arguments: argparse.Namespace) -> list[Callable[[], list[str]]]:
    """One piece of work for every 64 pictures, which go to files named like theirs."""
    pieces = range(0, len(split.images), 64)
    return [functools.partial(write_files, split, arguments, start) for start in pieces]


def write_files(split: Split, arguments: argparse.Namespace, start: int) -> list[str]:
    """Write 64 pictures that are not there yet; what is wrong with the bad ones."""
    bad = []
    for index in range(start, min(start + 64, len(split.images))):
        target = Path(arguments.destination) / split.title / file_name(split, index)
        if target.is_file():
            continue
        try:
            write_whole(target, shrink(split.images, index, arguments))
        except OSError as error:
            if target.parent.is_dir() and not os.access(target.parent, os.W_OK):
                raise
            bad.append(str(error))
    return bad


def file_name(split: Split, index: int) -> Path:
    """Where the picture goes, below the split's folder: named like the source, its ending added to where it differs."""
    suffix = ".png" if split.images.channels == 4 else ".jpg"
    if split.root is None or not isinstance(split.images.source, Files):
        classes = split.images.classes
        folder = classes[int(split.images.labels[index])].replace("/", "_") if classes else ""
        return Path(folder) / f"{index:08}{suffix}"
    path = Path(split.images.source.name(index)).relative_to(split.root)
    same = path.suffix.lower() in ((".jpg", ".jpeg") if suffix == ".jpg" else (suffix,))
    return path if same else path.with_name(path.name + suffix)


def shard_name(split: Split, number: int) -> str:
    """train-000003.tar."""
    return f"{split.title or 'train'}-{number:06}.tar"


def shard_work(split: Split, arguments: argparse.Namespace) -> list[Callable[[], list[str]]]:
    """One piece of work for every shard. The pictures are shuffled, for readers that stream."""
    order = iter(seeding.permutation(0, 0, len(split.images)))
    groups = iter(lambda: list(itertools.islice(order, arguments.per_shard)), [])
    return [
        functools.partial(write_shard, split, arguments, Path(arguments.destination) / shard_name(split, number), group)
        for number, group in enumerate(groups)
    ]


def write_shard(split: Split, arguments: argparse.Namespace, path: Path, group: list[int]) -> list[str]:
    """Write a shard and its index, unless both are there; what is wrong with its bad pictures."""
    left_out = path.with_name(path.name + ".bad")
    if tar_shards.index_path(path).is_file():
        return left_out.read_text().splitlines() if left_out.is_file() else []
    bad = []
    temporary = path.with_name(path.name + ".tmp")
    with tarfile.open(temporary, "w") as tar:
        for index in group:
            try:
                members = as_member(shrink(split.images, index, arguments), split.images.channels)
            except OSError as error:
                bad.append(" ".join(str(error).split()))
                continue
            if split.images.classes:
                members["cls"] = str(int(split.images.labels[index])).encode()
            for kind, data in members.items():
                member = tarfile.TarInfo(f"{index:08}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    temporary.replace(path)
    if bad:
        write_whole(left_out, "\n".join(bad).encode())
    tar_shards.scan(path).save(path)  # last: it says that the shard is whole
    return bad


def as_member(picture: Content, channels: int) -> dict[str, bytes]:
    """Ending and content of the file that holds a picture."""
    if isinstance(picture, bytes):
        return {"png" if channels == 4 else "jpg": picture}
    buffer = io.BytesIO()
    np.save(buffer, picture)
    return {"npy": buffer.getvalue()}


def describe_shards(destination: Path, splits: list[Split]) -> None:
    """Write `_info.json`, as timm has it, and the names of the classes."""
    found = {}
    for split in splits:
        shards = sorted(destination.glob(f"{split.title or 'train'}-*.tar"))
        lengths = [len(tar_shards.open_index(shard).names) for shard in shards]
        names = [shard.name for shard in shards]
        title = split.title or "train"
        found[title] = {"name": title, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    info = {"splits": found, "classes": list(splits[0].images.classes)}
    write_whole(destination / tar_shards.INFO, json.dumps(info, indent=1).encode())


def in_parallel(work: list[Callable[[], list]], workers: int, title: str) -> list:
    """All results in one list, under a progress bar."""
    results = []
    with tqdm(total=len(work), desc=title, unit="part") as bar:
        for found in _run(work, workers):
            results += found
            bar.update()
    return results


def _run(work: list[Callable[[], list]], workers: int) -> Iterator[list]:
    if workers == 1:
        yield from (piece() for piece in work)
        return
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(work,)) as pool:
        yield from pool.map(_piece, range(len(work)))


_work: list[Callable[[], list]] = []


def _begin(work: list[Callable[[], list]]) -> None:
    _work[:] = work
    torch.set_num_threads(1)


def _piece(number: int) -> list:
    return _work[number]()


def print_psnr(images: ImageSet, arguments: argparse.Namespace, most: int = 200) -> None:
    """What the pictures lost, on some of them, evenly spaced."""
    found = []
    for index in range(0, len(images), -(-len(images) // most)):
        try:
            smaller = shrink(images, index, arguments)
            found.append(prepare.crop_psnr(images.source.read(index), smaller, index))
        except OSError:
            continue  # said before
    finite = [value for value in found if value != float("inf")]
    if not finite:
        print("the pictures are as they were: none was larger")
        return
    print(
        f"PSNR of 224-pixel crops against the original's: mean {mean(finite):.1f} dB, lowest {min(finite):.1f} dB, "
        f"over {len(finite)} pictures that changed, of {len(found)}"
    )


def print_statistics(images: ImageSet, arguments: argparse.Namespace) -> None:
    """`--mean` and `--std`, to paste."""
    step = -(-len(images) // arguments.stats_images)
    parts = [range(start, min(start + 64 * step, len(images)), step) for start in range(0, len(images), 64 * step)]
    work = [functools.partial(_statistics, images, part) for part in parts]
    total, bad = prepare.ChannelSums(images.channels), []
    for sums, wrong in in_parallel(work, arguments.workers, "statistics"):
        total.merge(sums)
        bad += wrong
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    if total.count == 0:
        raise ValueError(f"{arguments.source}: no picture can be decoded")
    flags = zip(("--mean", "--std"), total.mean_and_std(), strict=True)
    print(" ".join(" ".join([flag, *(f"{value:.4f}" for value in values)]) for flag, values in flags))


def _statistics(images: ImageSet, part: range) -> list:
    return [prepare.statistics_of(images, part)]


if __name__ == "__main__":
    main()
