#!/usr/bin/env python3
"""Make the pictures of a data set smaller, once, into a folder or tar shards; or print the channels' statistics.

    python scripts/prepare_data.py /data/imagenet /data/imagenet_400 --long_side 400
    python scripts/prepare_data.py /data/imagenet /data/shards --short_side 256 --shards [--pixels]
    python scripts/prepare_data.py ~/pictures --stats

Every picture is decoded, before and after. Run again after an interruption, it goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from util import cli
from util.data import datasets, resize, resized_writer, statistics
from util.data.datasets import ImageSet
from util.data.resized_writer import Recipe, Split
from util.distributed import world


def main(argv: list[str] | None = None) -> None:
    """Prepare as the command line says."""
    arguments = parse(argv)
    torch.set_num_threads(1)
    with cli.exit_on_user_error():
        if arguments.stats:
            print_statistics(arguments)
            return
        recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)})
        splits = open_splits(recipe)
        for split in splits:
            say_what_is_left_out(split)
        with exit_where_nothing_can_be_written(recipe):
            resized_writer.begin(recipe, splits)
    bad = []
    with exit_where_nothing_can_be_written(recipe):
        for split in splits:
            bad += in_parallel(resized_writer.pieces(split, recipe), arguments.workers, split.title or "pictures")
        resized_writer.finish(recipe, splits, bad)
    total = sum(len(split.images) for split in splits)
    say(f"{total - len(bad)} pictures are in {recipe.destination}; {len(bad)} cannot be decoded and were left out")
    if bad:
        say(f"their names are in {Path(recipe.destination) / 'bad_pictures.txt'}, for example {bad[0]}")
    print_psnr(splits[0].images, recipe)


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
    parser.add_argument("--workers", type=int, default=world.usable_cores(), help="processes")
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
    if arguments.source:
        arguments.source = os.path.abspath(arguments.source)  # the same source, however it is written
    return arguments


def open_splits(recipe: Recipe) -> list[Split]:
    """The training and, if there are some, the validation pictures, of the same classes.

    Raises:
        ValueError: there is nothing, or validation has a class that training has not.
    """
    name, source, chans = recipe.dataset, recipe.source, recipe.in_chans
    root = Path(source)
    if name == "folder" and not (root / "train").is_dir():
        say(f"{source}: has no folder train, so the pictures are prepared without classes and splits")
        return [Split("", datasets.open_unlabelled(name, source, chans), root)]
    train = open_training(recipe)
    try:
        images = datasets.open_labelled(name, source, "val", chans)
    except ValueError as error:
        say(f"no validation pictures ({error})")
        return [train]
    classes = train.images.classes
    if classes and images.classes != classes:
        extra = sorted(set(images.classes) - set(classes))
        if extra:
            raise ValueError(f"{source}: classes of the validation pictures that train has not: {extra[:5]}")
        images = images.relabelled(classes)
    return [train, Split("val", images, root / "val" if name == "folder" else None)]


def open_training(recipe: Recipe) -> Split:
    """The training pictures; without classes, and the reason is said, where not all have one."""
    name, source, chans = recipe.dataset, recipe.source, recipe.in_chans
    root = Path(source) / "train" if name == "folder" else None
    try:
        return Split("train", datasets.open_labelled(name, source, "train", chans), root)
    except ValueError as error:
        split = Split("train", datasets.open_unlabelled(name, source, chans), root)
        without = int((split.labels < 0).sum())
        if without:
            say(f"{without} of {len(split.images)} training pictures are prepared without a class ({error})")
        return split


def say_what_is_left_out(split: Split) -> None:
    """How many pictures lie beside the folders of the classes."""
    if split.root is None or not split.images.classes:
        return
    names = [entry.name.lower() for entry in split.root.iterdir() if entry.is_file()]
    loose = sum(name.endswith(IMG_EXTENSIONS) and not name.startswith(".") for name in names)
    if loose:
        say(f"{split.root}: {loose} pictures beside the folders of the classes are left out")


@contextlib.contextmanager
def exit_where_nothing_can_be_written(recipe: Recipe) -> Iterator[None]:
    """Turn an OSError, which reading a picture never ends in, into a sentence on stderr and exit status 1."""
    try:
        yield
    except OSError as error:
        sys.exit(
            f"prepare_data.py: error: {recipe.destination}: cannot be written ({error}); "
            "make room there, or let it be writable, and run the same again: it goes on where it was"
        )


def say(text: str) -> None:
    """Print what may hold names of files, in any encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


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


def print_psnr(images: ImageSet, recipe: Recipe, most: int = 200) -> None:
    """What the pictures lost, on some of them, evenly spaced."""
    found = []
    for index in range(0, len(images), -(-len(images) // most)):
        try:
            smaller = recipe.shrink(images, index)
            found.append(resize.crop_psnr(images.source.read(index), smaller, index))
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


def print_statistics(arguments: argparse.Namespace) -> None:
    """`--mean` and `--std` of the pictures that pre-training would see, to paste."""
    images = datasets.open_unlabelled(arguments.dataset, arguments.source, arguments.in_chans, arguments.loader)
    step = -(-len(images) // arguments.stats_images)
    parts = [range(start, min(start + 64 * step, len(images)), step) for start in range(0, len(images), 64 * step)]
    work = [functools.partial(_statistics, images, part) for part in parts]
    total, bad = statistics.ChannelSums(images.channels), []
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
    return [statistics.statistics_of(images, part)]


if __name__ == "__main__":
    main()
