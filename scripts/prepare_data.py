#!/usr/bin/env python3
"""Resize the images of a data set once, into tar shards; or print mean and deviation of its channels.

    python scripts/prepare_data.py /data/imagenet /data/imagenet_400 --long_side 400
    python scripts/prepare_data.py /data/imagenet /data/pixels --short_side 256 --pixels
    python scripts/prepare_data.py ~/pictures --stats

Train on the shards with --dataset wds --data_path DESTINATION. The same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from util import cli
from util.data import datasets, decode
from util.data.datasets import ImageSet
from util.data.resized_writer import BAD, ResizedWriter
from util.data.statistics import channel_sums
from util.distributed import world
from util.training import lock


def main(argv: list[str] | None = None) -> None:
    """Resize, or print statistics, as the command line says."""
    arguments = parse(argv)
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in any encoding
    try:
        with cli.exit_on_user_error():
            (print_statistics if arguments.stats else resize)(arguments)
        return
    except OSError as error:  # a bad image raises none here
        reason = f"{arguments.destination or arguments.source}: cannot be read or written ({error}); mend that and"
    except BrokenProcessPool:
        reason = "a worker was killed, perhaps for the memory that it took; choose fewer --workers and"
    sys.exit(f"prepare_data.py: error: {reason} run the same again: it goes on where it was")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=_path, help="folder, with train/ and val/ or without; or as for --data_path")
    parser.add_argument("destination", type=_path, nargs="?", help="folder to write; not with --stats")
    parser.add_argument("--dataset", default="folder", help="of the source, as for pre-training")
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--short_side", type=int, help="pixels of the shorter side")
    side.add_argument("--long_side", type=int, help="pixels of the longest side")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--pixels", action="store_true", help="pixels instead of JPEGs: large, but quick to read")
    parser.add_argument("--per_shard", type=int, default=5000, help="images in a shard")
    parser.add_argument("--in_chans", type=int, default=3, help="1 grey, 3 RGB, 4 RGBA (written as PNG)")
    parser.add_argument("--workers", type=int, default=world.usable_cores(), help="processes")
    parser.add_argument("--stats", action="store_true", help="only print --mean and --std of the training images")
    parser.add_argument("--stats_images", type=int, default=20000, help="images for --stats, evenly spaced")
    parser.add_argument("--loader", help="package.module:function, as for pre-training; for --stats")
    arguments = parser.parse_args(argv)
    if not arguments.stats and not arguments.destination:
        parser.error("the destination is missing")
    if arguments.loader and not arguments.stats:
        parser.error(f"--loader {arguments.loader}: its arrays have no image format; it is only for --stats")
    if arguments.in_chans not in decode.MODES and not arguments.stats:
        parser.error(f"--in_chans {arguments.in_chans}: images are written with 1, 3 or 4 channels")
    for name, value in vars(arguments).items():
        if type(value) is int and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    return arguments


def _path(text: str) -> str:
    """Return the same absolute path, however it is written; an empty text as it is."""
    return os.path.abspath(cli.path_text(text)) if text else text


def resize(arguments: argparse.Namespace) -> None:
    """Write the resized images into the destination, and print what became of them."""
    splits = open_splits(arguments)
    for split, images in splits.items():
        print(images.summary(split))
    destination = Path(arguments.destination)
    options = {name: getattr(arguments, name) for name in ("short_side", "long_side", "quality", "pixels")}
    with locked(destination, arguments.source):
        source = f"{arguments.dataset} {arguments.source}"
        writer = ResizedWriter(destination, source, splits, arguments.per_shard, **options)
        writer.begin()
        found = in_parallel(writer.write_shard, writer.shards(), arguments.workers, "shards")
        bad = [line for lines in found for line in lines]
        writer.finish(bad)
    count = sum(map(len, splits.values())) - len(bad)
    print(f"{count} images are in {destination}; {len(bad)} cannot be decoded and were left out")
    if bad:
        print(f"{destination / BAD} names them, for example {bad[0]}")
    print(f"to train on them: --dataset wds --data_path {destination}")


def open_splits(arguments: argparse.Namespace) -> dict[str, ImageSet]:
    """Open the training and, if there are some, the validation images, of the same classes.

    Raises:
        ValueError: there are no images, or validation has no classes, or one that training lacks.
    """
    source, chans = (arguments.dataset, arguments.source), arguments.in_chans
    root = Path(arguments.source) if arguments.dataset == "folder" else None
    try:
        train = datasets.open_labelled(*source, "train", chans)
    except ValueError as error:
        train = datasets.open_unlabelled(*source, chans)
        if root:
            train = dataclasses.replace(train, labels=np.full(len(train), -1))
        if without := int((np.asarray(train.labels) < 0).sum()):
            print(f"{without} of {len(train)} training images are written without a class ({error})")
    if root and not (root / "train").is_dir():
        return {"train": train}  # which are all below the source
    try:
        splits = {"train": train, "val": datasets.open_labelled(*source, "val", chans)}
    except ValueError as error:
        if root and train.classes and (root / "val").is_dir() and any((root / "val").iterdir()):
            raise
        print(f"no validation images ({error})")
        return {"train": train}
    if train.classes:
        splits["val"] = splits["val"].relabelled(train.classes, arguments.source)
    return splits


def locked(destination: Path, source: str) -> contextlib.AbstractContextManager:
    """Make the destination, and let no other process write there until the context ends.

    Raises:
        ValueError: it cannot be made, lies inside the source, or another process writes there.
    """
    if source and Path(source).resolve() in (destination.resolve(), *destination.resolve().parents):
        raise ValueError(f"{destination}: is the source, or inside it; name another folder to write")
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{destination}: cannot be made ({error.strerror}); name another folder to write") from error
    return lock.hold(destination, wait_s=0, flag="destination") or contextlib.nullcontext()


def in_parallel(function: Callable, arguments: Sequence[tuple], workers: int, title: str) -> Iterator:
    """Yield `function(*values)` for all `values` of `arguments`, in order, under a progress bar."""
    pool = ProcessPoolExecutor(workers, initializer=_begin_worker, initargs=(function,))
    try:
        futures = [pool.submit(_call, values) for values in arguments]
        for future in tqdm(futures, desc=title, unit="part", disable=sys.stderr is None):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(function: Callable) -> None:
    global _function
    _function = function
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait until the main process is gone: its lock is gone with it, and nobody may write any longer."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(values: tuple) -> object:
    return _function(*values)


def print_statistics(arguments: argparse.Namespace) -> None:
    """Print `--mean` and `--std` of the images that pre-training would see, to paste."""
    images = datasets.open_unlabelled(arguments.dataset, arguments.source, arguments.in_chans, arguments.loader)
    step = -(-len(images) // arguments.stats_images)
    parts = [(range(start, min(start + 64 * step, len(images)), step),) for start in range(0, len(images), 64 * step)]
    total = torch.zeros(3, images.channels, dtype=torch.float64)
    for sums, bad in in_parallel(functools.partial(channel_sums, images), parts, arguments.workers, "statistics"):
        total += sums
        for line in bad:
            print(f"left out: {line}", file=sys.stderr)
    if not total[0, 0]:
        raise ValueError(f"{arguments.source}: no image can be decoded")
    mean, square = total[1] / total[0], total[2] / total[0]
    for flag, values in (("--mean", mean), ("--std", (square - mean**2).clamp(min=0).sqrt())):
        print(flag, *(f"{value:.4f}" for value in values.tolist()), end=" " if flag == "--mean" else "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, and its workers, like any other kill
    main()
