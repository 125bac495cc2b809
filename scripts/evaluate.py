#!/usr/bin/env python3
"""Measure a checkpoint's encoder: k-NN, effective rank, salience, a linear and an attentive probe, segmentation.

scripts/evaluate.py output/run/checkpoint-last.pth --data_path /data/imagenet --train_images 100000
scripts/evaluate.py output/run/checkpoint-last.pth --metrics segmentation --data_path /data/VOC2012
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from evaluation import checkpoints, measure, segmentation
from methods import base
from models_base import keep_blocks
from util import cli
from util.files import write_whole
from util.training import following


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write `--output`."""
    given = make_parser().parse_args(argv)
    with cli.exit_on_user_error():
        check_output(given.output)
        opened = open_model(given)
        keep_blocks(opened.model, given.probe_blocks)
        start = time.perf_counter()
        result = measurements(given, opened)
    print(f"images are normalised with {following.describe(base.channel_statistics(opened.settings))}")
    for note in filter(None, [opened.assumed, *opened.refused.values()]):
        print(f"note: {note}")
    measured = {"checkpoint": given.checkpoint or given.model}
    measured |= {"probe_blocks": given.probe_blocks} if given.probe_blocks else {}
    result = measured | result | {"seconds": time.perf_counter() - start}
    for name, value in result.items():
        print(f"{name:22} {value:.4f}" if isinstance(value, float) else f"{name:22} {value}")
    if given.output:
        path = Path(given.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result, indent=1) + "\n")


def measurements(given: argparse.Namespace, opened: checkpoints.Opened) -> dict:
    """Return what `--metrics` asks for, by name."""
    shared = {name: getattr(given, name) for name in ("neighbours", "train_images", "val_images")}
    if "segmentation" not in given.metrics:
        if given.num_classes is not None:
            raise ValueError(f"--num_classes {given.num_classes}: is of --metrics segmentation alone; leave it out")
        if given.ignore_index != [255]:
            labels = " ".join(map(str, given.ignore_index))
            raise ValueError(f"--ignore_index {labels}: is of --metrics segmentation alone; leave it out")
        shared |= {name: getattr(given, name) for name in ("num_workers", "pool", "crop_pct")}
        return measure.measure(opened, tuple(given.metrics), **shared)
    if given.crop_pct != 1:
        raise ValueError(f"--crop_pct {given.crop_pct}: segmentation takes whole images; leave it out")
    if given.pool != "mean":
        raise ValueError(f"--pool {given.pool}: segmentation classifies the patch tokens one by one; leave it out")
    if len(given.metrics) > 1:
        raise ValueError(
            f"--metrics {' '.join(given.metrics)}: segmentation needs label masks at --data_path, the others do not; "
            "measure it alone"
        )
    ignored = tuple(given.ignore_index)
    return segmentation.segment(
        opened, num_classes=given.num_classes, ignored=ignored, threads=given.num_workers, **shared
    )


def check_output(output: str | None) -> None:
    """Raise ValueError unless `--output` can be written: before the work."""
    if output is None:
        return
    if Path(output).is_dir():
        raise ValueError(f"--output {output}: is a folder; name a file")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(output).parent):
            pass
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror})") from error


def open_model(given: argparse.Namespace) -> checkpoints.Opened:
    """Open the checkpoint, or an untrained `--model`."""
    names = ("model", "dataset", "data_path", "input_size", "in_chans", "seed", "masking")
    changes = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if given.checkpoint:
        return checkpoints.open_checkpoint(given.checkpoint, device, **changes)
    if not given.model:
        raise ValueError("name a CHECKPOINT, or an untrained --model")
    return checkpoints.untrained(changes.pop("model"), device, **changes)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", nargs="?", type=cli.path_text, help="of this project, or public weights as for --finetune"
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=[*measure.METRICS, "segmentation"], default=list(measure.METRICS[:4])
    )
    parser.add_argument("--output", type=cli.path_text, help="JSON file for the numbers")
    parser.add_argument("--neighbours", type=int, default=10, help="k of k-NN")
    parser.add_argument(
        "--pool", choices=["mean", "cls"], default="mean", help="features: mean of patch tokens, or cls"
    )
    parser.add_argument(
        "--crop_pct", type=float, default=1.0, help="centre crop over resized side; 0.875 in published k-NN accuracies"
    )
    parser.add_argument("--probe_blocks", type=int, help="features: output of so many blocks; default: all")
    parser.add_argument("--train_images", type=int, help="at most so many, evenly spread; default: all")
    parser.add_argument("--val_images", type=int, help="at most so many, evenly spread; default: all")
    parser.add_argument("--num_classes", type=int, help="segmentation: of how many; default: training masks' labels")
    parser.add_argument(
        "--ignore_index", type=int, nargs="*", default=[255], help="segmentation: labels of pixels that do not count"
    )
    parser.add_argument("--model", help="architecture; without a checkpoint: untrained")
    parser.add_argument(
        "--dataset", help="as in pre-training: folder, wds, hfds/NAME, torch/NAME, digits; default: the checkpoint's"
    )
    parser.add_argument(
        "--data_path",
        type=cli.path_text,
        help="folder with train/<class>/ and val/<class>/, or with label masks; default: the checkpoint's",
    )
    parser.add_argument(
        "--input_size", type=int, nargs="+", help="side, or height and width, where no checkpoint tells"
    )
    parser.add_argument("--in_chans", type=int, help="for an untrained model: channels")
    parser.add_argument("--masking", help="needed where it is your own module:Class, which a checkpoint may not choose")
    parser.add_argument("--seed", type=int, help="for an untrained model: of its weights")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes; segmentation: threads")
    return parser


if __name__ == "__main__":
    main()
