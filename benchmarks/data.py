"""Images per second and core from JPEG files to crops: MAE's pipeline, ours, and what else could be taken.

Run as `python scripts/benchmark.py data`.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

from benchmarks import report, timing
from benchmarks.pictures import write_jpegs
from util import cli, seeding
from util.data import crop, decode
from util.data.datasets import ImageSet
from util.data.multi_crop import MultiCrop
from util.data.resize import resize_image
from util.data.sources import Files, Source
from util.data.tar_shards import TarShards

SIZE, SCALE = (224, 224), (0.2, 1.0)
Crop = Callable[[bytes], np.ndarray]  # an encoded image -> its crop (h, w, 3), flipped or not


def main(argv: list[str]) -> None:
    """Measure, print a table, and write it to --json."""
    parser = argparse.ArgumentParser(prog="benchmark.py data", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=28, help="JPEGs that one round goes through")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, in each of which every contender runs once")
    parser.add_argument("--compared", type=int, default=200, help="crops whose pixels are compared")
    parser.add_argument("--json", type=cli.path_text, help="file for the numbers")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.pictures, arguments.rounds, arguments.compared)
        size = mean(path.stat().st_size for path in Path(folder).glob("*.jpg")) / 1024
    environment = report.environment(("torch", "torchvision", "pillow", "torchcodec", "simplejpeg", "timm"))
    environment["pictures"] = f"{arguments.pictures} JPEGs, 500 x 375, quality 90, {size:.0f} KiB on average"
    print("  ".join(f"{name} {value}" for name, value in environment.items()))
    print(report.table([{name: _text(value) for name, value in row.items()} for row in rows]))
    if arguments.json:
        plain = [{name: vars(v) if isinstance(v, timing.Spread) else v for name, v in row.items()} for row in rows]
        report.write_json(arguments.json, {"environment": environment, "rows": plain})


def measure(folder: Path, pictures: int, rounds: int, compared: int) -> list[dict[str, object]]:
    """Return the rows of the table: time, images per second and core, ratio to the baseline, pixel differences."""
    files = {"original": write_jpegs(folder, pictures)}
    for name, side in (("short side 256", {"short_side": 256}), ("longest side 400", {"long_side": 400})):
        place = folder / name
        place.mkdir()
        files[name] = [place / path.name for path in files["original"]]
        for source, target in zip(files["original"], files[name], strict=True):
            target.write_bytes(resize_image(source.read_bytes(), quality=90, **side))
    sources: dict[str, Source] = {name: Files(map(str, paths)) for name, paths in files.items()}
    sources["short side 256, pixels"] = pixel_shard(files["original"], folder / "pixels.tar", short_side=256)
    sets = {name: ImageSet(source, [0] * pictures, (), 3) for name, source in sources.items()}
    contenders = {"MAE's: PIL, ToTensor, Normalize": over_files(files["original"], _Baseline())}
    crops: dict[str, Crop] = {}
    differences = {}
    for name, exact, kind in _ours(sets):
        transform = (crop.PictureCrop if exact else crop.PixelCrop)(SIZE, SCALE, 0.5)
        contenders[name] = over_set(sets[kind], transform)
        if kind == "original":
            crops[name] = _ours_crop(exact)
        else:
            differences[name] = resized_difference(sources["original"], sources[kind], compared)
    for name, function in candidates().items():
        contenders[name], crops[name] = over_files(files["original"], function), function
    differences |= {name: difference(function, files["original"], compared) for name, function in crops.items()}
    seconds = timing.interleave(contenders, rounds, warmup=2)
    baseline = next(iter(contenders))
    return [
        {
            "from JPEG to crop": name,
            "images/s/core": round(pictures / median(seconds[name])),
            "ms/image": timing.Spread.of([1000 * value / pictures for value in seconds[name]]),
            "times the baseline": timing.ratio(seconds, baseline, name),
            "max difference": differences.get(name, ("", ""))[0],
            "mean difference": differences.get(name, ("", ""))[1],
        }
        for name in contenders
    ]


def pixel_shard(files: list[Path], path: Path, **sizes: int) -> TarShards:
    """Write a tar shard of the images' pixels, as `scripts/prepare_data.py --pixels` makes it."""
    with tarfile.open(path, "w") as tar:
        for number, picture in enumerate(files):
            buffer = io.BytesIO()
            np.save(buffer, resize_image(picture.read_bytes(), pixels=True, **sizes))
            member = tarfile.TarInfo(f"{number:08}.npy")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    return TarShards([path])


def _ours(sets: dict[str, ImageSet]) -> list[tuple[str, bool, str]]:
    rows = []
    for title, exact in (("ours exact", True), ("ours fast (default)", False)):
        short = title.split(" (")[0]
        rows += [(title if name == "original" else f"{short}, {name}", exact, name) for name in sets]
    return rows


def difference(function: Crop, files: list[Path], compared: int) -> tuple[int, float]:
    """Return the largest and mean difference of its pixels from torchvision's pipeline on PIL images, of 255 levels."""
    reference, apart = _Baseline(), []
    for number in range(compared):
        data = files[number % len(files)].read_bytes()
        found = []
        for pipeline in (reference.crop, function):
            torch.default_generator.manual_seed(number)
            found.append(pipeline(data).astype(np.int16))
        apart.append(np.abs(found[0] - found[1]))
    return int(np.max(apart)), round(float(np.mean(apart)), 3)


def resized_difference(originals: Source, smaller: Source, compared: int) -> tuple[int, float]:
    """Return the same for images resized ahead: between the same crops, both cut by Pillow."""
    apart = []
    for number in range(compared):
        index = number % len(originals)
        first, second = crop_pair(originals.read(index), smaller.read(index), number)
        apart.append(np.abs(first - second))
    return int(np.max(apart)), round(float(np.mean(apart)), 3)


def crop_pair(original: decode.Content, smaller: decode.Content, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return crop `number` of `original`, and the same crop of `smaller`; both (*SIZE, 3), fp64, 0..255."""
    images = [decode.to_picture(content, "RGB") for content in (original, smaller)]
    with seeding.sample_state(0, 0, number):
        top, left, height, width = crop.draw_box(*images[0].size, SCALE)
    crops = []
    for image in images:
        x, y = image.width / images[0].width, image.height / images[0].height
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        crops.append(np.asarray(image.resize(SIZE, Image.Resampling.BICUBIC, box=box), dtype=np.float64))
    return crops[0], crops[1]


class _Baseline:
    """MAE's pre-training pipeline, as its paper and every torchvision user has it."""

    def __init__(self):
        self.random_crop = tv.RandomResizedCrop(SIZE, scale=SCALE, interpolation=InterpolationMode.BICUBIC)
        self.flip = tv.RandomHorizontalFlip()
        self.normalize = tv.Compose([tv.ToTensor(), tv.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])

    def __call__(self, data: bytes) -> torch.Tensor:
        return self.normalize(self._picture(data))

    def crop(self, data: bytes) -> np.ndarray:
        return np.asarray(self._picture(data))

    def _picture(self, data: bytes) -> Image.Image:
        return self.flip(self.random_crop(Image.open(io.BytesIO(data)).convert("RGB")))


def _ours_crop(exact: bool) -> Crop:
    transform = (crop.PictureCrop if exact else crop.PixelCrop)(SIZE, SCALE, 0.5)

    def run(data: bytes) -> np.ndarray:
        pixels, flip, _ = transform(decode.to_picture(data, "RGB") if exact else decode.to_pixels(data, 3))
        return (pixels.flip(1) if flip else pixels).numpy()

    return run


def candidates() -> dict[str, Crop]:
    """Return other ways that were considered, as far as their libraries are installed."""
    found: dict[str, Crop] = {"Pillow to uint8, torch's bicubic": _with_decoder(_pillow)}
    try:
        import simplejpeg

        found["simplejpeg, torch's bicubic"] = _with_decoder(
            lambda data: torch.from_numpy(simplejpeg.decode_jpeg(data))
        )
    except ImportError:
        pass
    try:
        import cv2

        cv2.setNumThreads(1)

        def opencv(data: bytes) -> np.ndarray:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            top, left, height, width = crop.draw_box(picture.shape[1], picture.shape[0], SCALE)
            part = cv2.resize(picture[top : top + height, left : left + width], SIZE, interpolation=cv2.INTER_CUBIC)
            return cv2.flip(part, 1) if torch.rand(1) < 0.5 else part

        found["OpenCV, no antialiasing"] = opencv
    except ImportError:
        pass
    try:
        from nvidia import nvimgcodec

        found["nvimgcodec, only the crop's region, torch's bicubic"] = _region_decoder(nvimgcodec)
    except ImportError:
        pass
    return found


def _pillow(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(decode.with_pillow(data, "RGB")))


def _with_decoder(decoder: Callable[[bytes], torch.Tensor]) -> Crop:
    transform = crop.PixelCrop(SIZE, SCALE, 0.5)

    def run(data: bytes) -> np.ndarray:
        pixels, flip, _ = transform(decoder(data))
        return (pixels.flip(1) if flip else pixels).numpy()

    return run


def _region_decoder(nvimgcodec) -> Crop:
    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
    )

    def run(data: bytes) -> np.ndarray:
        stream = nvimgcodec.CodeStream(data)
        top, left, height, width = crop.draw_box(stream.width, stream.height, SCALE)
        region = nvimgcodec.Region(top, left, top + height, left + width)
        part = torch.from_numpy(np.asarray(decoder.decode(stream.get_sub_code_stream(region=region)).cpu()))
        resized = torch.nn.functional.interpolate(part.permute(2, 0, 1)[None], SIZE, mode="bicubic", antialias=True)[
            0
        ].permute(1, 2, 0)
        return (resized.flip(1) if torch.rand(1) < 0.5 else resized).numpy()

    return run


def over_files(files: list[Path], function: Callable[[bytes], object]) -> Callable[[], None]:
    """Return what reads every file and calls `function` with its content."""

    def run() -> None:
        for number, path in enumerate(files):
            torch.default_generator.manual_seed(number)
            function(path.read_bytes())

    return run


def over_set(images: ImageSet, transform: crop.PixelCrop | MultiCrop) -> Callable[[], None]:
    """Return what decodes every image of the set and calls `transform` with it."""
    load = images.pixels if transform.takes_pixels else images.picture

    def run() -> None:
        for number in range(len(images)):
            torch.default_generator.manual_seed(number)
            transform(load(number))

    return run


def _text(value: object) -> object:
    return value.format() if isinstance(value, timing.Spread) else value
