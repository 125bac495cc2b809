"""Images per second and core from JPEG files to iBOT's views: its authors' pipeline on PIL images, v2's steps, ours.

Run as `python scripts/benchmark.py views`.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from PIL import Image, ImageFilter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode, v2

from benchmarks import report, timing
from benchmarks.data import over_files, over_set
from benchmarks.pictures import write_jpegs
from util import cli
from util.data.datasets import ImageSet
from util.data.multi_crop import MultiCrop
from util.data.sources import Files

SIZE, SCALE = (224, 224), (0.25, 1.0)
LOCAL_SIZE, LOCAL_SCALE, LOCAL_NUMBER = (96, 96), (0.05, 0.25), 10
JITTER = 0.4, 0.4, 0.2, 0.1
BLUR_SOLARIZE = (1.0, 0.0), (0.1, 0.2), (0.5, 0.0)  # of the first global view, of the second, of the local ones


def main(argv: list[str]) -> None:
    """Measure, print a table, and write it to --json."""
    parser = argparse.ArgumentParser(prog="benchmark.py views", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=14, help="JPEGs that one round goes through")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, in each of which every contender runs once")
    timing.add_clock_flag(parser)
    parser.add_argument("--json", type=cli.path_text, help="file for the numbers")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        calls = contenders(write_jpegs(Path(folder), arguments.pictures))
        seconds = timing.interleave(calls, arguments.rounds, warmup=1, clock=timing.CLOCKS[arguments.clock])
    environment = report.environment(("torch", "torchvision", "pillow", "torchcodec"))
    rows = [row(name, seconds, arguments.pictures) for name in calls]
    print("  ".join(f"{name} {value}" for name, value in environment.items()))
    print(report.table(rows))
    if arguments.json:
        report.write_json(arguments.json, {"environment": environment, "rows": rows, "seconds": seconds})


def row(name: str, seconds: dict[str, list[float]], pictures: int) -> dict[str, object]:
    """Describe one contender; the first is the baseline."""
    return {
        f"from JPEG to 2 + {LOCAL_NUMBER} views": name,
        "images/s/core": timing.short(pictures / median(seconds[name])),
        "ms/image": timing.Spread.of([1000 * value / pictures for value in seconds[name]]).format(),
        "times the baseline": timing.ratio(seconds, next(iter(seconds)), name).format(),
    }


def contenders(files: list[Path]) -> dict[str, Callable[[], None]]:
    """Return the pipelines over `files`; the last is also measured without its colours."""
    images = ImageSet(Files(map(str, files)), [0] * len(files), (), 3)
    ours, plain, stepwise = (MultiCrop(SIZE, SCALE, 0.5, LOCAL_SIZE, LOCAL_SCALE, LOCAL_NUMBER) for _ in range(3))
    plain.colours = (torch.Tensor.contiguous,) * 3
    stepwise.colours = tuple(v2_colours(*pair) for pair in BLUR_SOLARIZE)
    return {
        "the authors': PIL, ToTensor, Normalize": over_files(files, PILViews()),
        "ours, colours by v2 on tensors": over_set(images, stepwise),
        "ours": over_set(images, ours),
        "ours, crops without colours": over_set(images, plain),
    }


def v2_colours(blur: float, solarize: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Build the same steps of torchvision's v2, on tensors."""
    steps = [v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8), v2.RandomGrayscale(0.2)]
    return v2.Compose(
        [*steps, v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur), v2.RandomSolarize(128, p=solarize)]
    )


class PILViews:
    """The views as the method's authors make them, with torchvision and Pillow's own blur."""

    def __init__(self):
        self.large = [self._steps(SIZE, SCALE, *BLUR_SOLARIZE[number]) for number in (0, 1)]
        self.small = self._steps(LOCAL_SIZE, LOCAL_SCALE, *BLUR_SOLARIZE[2])

    def __call__(self, data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [steps(image) for steps in self.large] + [self.small(image) for _ in range(LOCAL_NUMBER)]

    @staticmethod
    def _steps(size: tuple[int, int], scale: tuple[float, float], blur: float, solarize: float) -> tv.Compose:
        return tv.Compose(
            [
                tv.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
                tv.RandomHorizontalFlip(),
                tv.RandomApply([tv.ColorJitter(*JITTER)], p=0.8),
                tv.RandomGrayscale(0.2),
                tv.RandomApply([_pillow_blur], p=blur),
                tv.RandomSolarize(128, p=solarize),
                tv.ToTensor(),
                tv.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )


def _pillow_blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
