#!/usr/bin/env python3
"""Draw what a checkpoint sees: image, salience, masks of each strategy, reconstruction, and pasted with the visible.

scripts/visualize.py output/run/checkpoint-last.pth picture.jpg folder/ --output masks.png
scripts/visualize.py --model mae_vit_base_patch16 picture.jpg         # an untrained model
scripts/visualize.py output/digits/checkpoint-last.pth --dataset digits
scripts/visualize.py output/run/checkpoint-last.pth picture.jpg --masking all   # all that can be drawn
scripts/visualize.py output/run/checkpoint-last.pth picture.jpg --columns attention,heads,pca   # the encoder
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import masking
from evaluation import checkpoints, drawing, figures, measure
from util import cli
from util.data import datasets, sources, transforms
from util.ratios import exact_ratio
from util.suggest import check_known


def main(argv: list[str] | None = None) -> None:
    """Open, draw, write."""
    given = make_parser().parse_intermixed_args(argv)
    with cli.exit_on_user_error():
        take_sizes(given)
        check_numbers(given)
        names = choose_columns(given)
        check_output(given.output)
        opened, places = open_model(given)
        images = open_images(given, opened, places)
        strategies, rebuilt = choose_strategies(given, opened, names)
        named = measure.Named(images, transforms.evaluation_transform(opened.size, given.crop_pct))
        pixels = torch.stack([picture(named, index) for index in range(min(given.rows, len(images)))])
    columns = figures.columns(
        opened.model,
        pixels,
        opened.normalize,
        strategies,
        temperature=figures.temperature_of(opened.strategy),
        rebuilt=rebuilt,
        seed=given.seed,
        names=names,
    )
    if not opened.has_decoder and "rebuilt" in names:
        print("the checkpoint has no decoder: the picture is without a reconstruction")
    if not opened.trained and rebuilt:
        print(f"{given.model} is untrained: its reconstruction is noise")
    for note in filter(None, [opened.assumed, *opened.refused.values()]):
        print(f"note: {note}")
    with cli.exit_on_user_error():
        try:
            drawing.save(drawing.draw(columns, cell=1.1 if len(columns) > 8 else 1.5), given.output)
        except OSError as error:
            raise ValueError(f"--output {given.output}: cannot be written ({error.strerror})") from error
    print(f"picture: {given.output}")


def take_sizes(given: argparse.Namespace) -> None:
    """Take the numbers after `--input_size` and `--patch_size`; what else stands there are more INPUTs."""
    for name in ("input_size", "patch_size"):
        values = getattr(given, name)
        if values is not None:
            count = sum(value.isdecimal() for value in values[:2])
            if not count or not values[0].isdecimal():
                raise ValueError(f"--{name} {values[0]}: give one side or height and width, in pixels")
            given.inputs += values[count:]
            setattr(given, name, [int(value) for value in values[:count]])


def check_numbers(given: argparse.Namespace) -> None:
    """Raise ValueError for numbers of which no picture can be made."""
    if given.rows < 1:
        raise ValueError(f"--rows {given.rows}: must be at least 1")
    measure.check_crop(given.crop_pct)


def open_model(given: argparse.Namespace) -> tuple[checkpoints.Opened, list[str]]:
    """Open the checkpoint or the untrained `--model`; return it, and the places of images among the arguments."""
    names = ("model", "input_size", "patch_size", "in_chans", "norm_pix_loss", "masking")
    changes = {name: getattr(given, name) for name in names if getattr(given, name) not in (None, "all")}
    if given.mask_ratio is not None:
        changes |= {"mask_ratio": str(given.mask_ratio)}
    first, *rest = given.inputs or [""]
    if first.endswith((".pth", ".pt", ".pth.tar", ".safetensors")) or Path(first, "config.json").is_file():
        return checkpoints.open_checkpoint(first, given.device, **changes), rest
    if "model" not in changes:
        problem = f"{first}: no checkpoint (.pth)" if first else "no checkpoint (.pth) is named"
        raise ValueError(f"{problem}; name one first, or an untrained --model")
    return checkpoints.untrained(changes.pop("model"), given.device, **changes), given.inputs


def open_images(given: argparse.Namespace, opened: checkpoints.Opened, places: list[str]) -> datasets.ImageSet:
    """Open the named images and folders; without any, the validation images of the digits (`--dataset digits`)."""
    channels = opened.settings.in_chans
    if given.dataset:
        return datasets.open_labelled(given.dataset, None, "val", channels)
    checkpoints.check_pictures(opened.settings)
    if not places:
        raise ValueError("name at least one picture or folder of pictures, or --dataset digits")
    items = []
    for place in places:
        if Path(place).is_dir():
            found = datasets.open_unlabelled("folder", place, channels)
            items += [found.source.name(index) for index in range(len(found))]
        elif Path(place).is_file():
            items.append(place)
        else:
            raise ValueError(f"{place}: there is no such picture or folder")
    return datasets.ImageSet(sources.Files(items), np.zeros(len(items), dtype=np.int64), (), channels)


def picture(images: measure.Named, index: int) -> torch.Tensor:
    """Return image `index`, decoded, (C, H, W). ValueError names a file that is none."""
    try:
        return images[0, index][0]
    except OSError as error:
        raise ValueError(str(error)) from error


def choose_columns(given: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the columns: `--columns`, or the usual ones, without a reconstruction of every strategy."""
    if given.columns is None:
        return tuple(n for n in figures.STANDARD if n != "rebuilt" or given.rebuild or given.masking != "all")
    names = tuple(given.columns.split(","))
    for name in names:
        check_known("columns", name, figures.COLUMNS)
    return names


def choose_strategies(
    given: argparse.Namespace, opened: checkpoints.Opened, names: tuple[str, ...]
) -> tuple[dict, str | None]:
    """Return the strategies by name, and the one to reconstruct, if any.

    It is the checkpoint's, unless `--rebuild` names another.
    """
    if {"salience", "masks", "rebuilt"}.isdisjoint(names):
        return {}, None
    if not given.rebuild:
        opened.require("masking")
    choose = figures.every_strategy if given.masking == "all" else figures.standard_strategies
    strategies = choose(opened.settings, opened.strategy, opened.model.num_patches)
    width, grid = opened.model.cls_token.shape[-1], opened.model.patch_embed.grid_size
    for name in strategies:
        masking.check(strategies[name], opened.model.num_patches, width, grid=grid, offers=masking.NEEDS)
    rebuilt = given.rebuild or figures.own_name(opened.settings, opened.strategy)
    if rebuilt not in strategies:
        raise ValueError(f"--rebuild {rebuilt}: choose one of {', '.join(strategies)}")
    return strategies, rebuilt if opened.has_decoder and "rebuilt" in names else None


def check_output(output: Path) -> None:
    """Raise ValueError unless `--output` is a PNG or PDF that can be written."""
    if output.suffix not in (".png", ".pdf"):
        raise ValueError(f"--output {output}: the name must end in .png or .pdf")
    if output.is_dir():
        raise ValueError(f"--output {output}: is a folder; name a file")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs",
        nargs="*",
        type=cli.path_text,
        metavar="INPUT",
        help="a checkpoint (.pth, or weights as for --finetune) first, then pictures and folders",
    )
    parser.add_argument("--output", type=cli.path, default=Path("masks.png"), help="PNG or PDF")
    parser.add_argument("--rows", type=int, default=6, help="pictures at most")
    parser.add_argument(
        "--columns",
        metavar="NAME,...",
        help=f"beside the image: {','.join(figures.COLUMNS)}; default: {','.join(figures.STANDARD)}",
    )
    parser.add_argument("--rebuild", help="strategy whose mask is reconstructed; default: the checkpoint's own")
    parser.add_argument("--mask_ratio", type=exact_ratio, help="such as 0.75 or 32/49; default: the checkpoint's")
    parser.add_argument(
        "--masking", help="all, or your own module:Class, which a checkpoint may not choose; default: the three"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the masks' noise")
    parser.add_argument("--crop_pct", type=float, default=1.0, help="centre crop over resized side")
    parser.add_argument("--dataset", choices=["digits"], help="the built-in digits instead of pictures")
    parser.add_argument("--model", help="architecture; without a checkpoint: untrained")
    parser.add_argument(
        "--input_size", nargs="+", metavar="N", help="side, or height and width, where no checkpoint tells"
    )
    parser.add_argument("--patch_size", nargs="+", metavar="N", help="untrained model: side, or height and width")
    parser.add_argument("--in_chans", type=int, help="untrained model: channels")
    parser.add_argument(
        "--norm_pix_loss", action=argparse.BooleanOptionalAction, default=None, help="default: the checkpoint's"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    return parser


if __name__ == "__main__":
    main()
