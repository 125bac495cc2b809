"""Pictures to tensors: layouts, channels, determinism, transforms, and errors that say what to do."""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile

import data_files
import numpy as np
import pytest
import tifffile
import torch
from helpers import refusal, write_pictures
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as F

import main_finetune
import main_pretrain
from evaluation import checkpoints, measure
from util.config import FinetuneSettings
from util.data import datasets, decode, resize, sources, tar_shards, transforms
from util.data.crop import SingleDrawResizedCrop
from util.data.datasets import SeededImages
from util.training import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "CMYK")])
def test_channels(folder, tmp_path, channels, mode):
    assert datasets.open_unlabelled("folder", str(folder), channels).picture(0).mode == mode
    written = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    Image.fromarray(written).save(tmp_path / "a.png")
    images = datasets.open_unlabelled("folder", str(tmp_path), channels)
    grey = np.asarray(Image.fromarray(written[..., :3]).convert("L"))[..., None]
    expected = grey if channels == 1 else written[..., :channels]
    np.testing.assert_array_equal(images.pixels(0).numpy(), expected)
    np.testing.assert_array_equal(np.asarray(images.picture(0)).reshape(expected.shape), expected)


def test_colours_stay_where_the_fourth_channel_is_zero():
    """Infrared of water is 0: nothing may take the fourth channel for transparency."""
    pixels = np.full((60, 80, 4), (200, 100, 50, 0), dtype=np.uint8)
    pixels[:, np.arange(80) % 8 < 4, 3] = 255  # in every crop both
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    picture, size, scale = decode.to_picture(buffer.getvalue(), "RGBA"), (24, 32), (0.2, 1.0)
    found = {
        "exact": transforms.pretrain_transform(size, scale, 0.5, exact=True)(picture)[0].permute(2, 0, 1),
        "probe": transforms.probe_transform(size, scale, 0.5)(picture),
        "fine-tuning": transforms.finetune_transform(size, scale, 0.5, None, None, (0.5,) * 4)(picture),
        "evaluation": transforms.evaluation_transform(size, None)(picture),
    }
    as_file, as_array = (
        resize.resize_image(buffer.getvalue(), short_side=24, channels=4, pixels=pixels) for pixels in (False, True)
    )
    found["resized file"] = decode.to_pixels(as_file, 4).permute(2, 0, 1)
    found["resized array"] = torch.tensor(as_array).permute(2, 0, 1)
    for name, result in found.items():
        assert result.shape == (4, *size), name
        for band, value in enumerate((200, 100, 50)):
            assert (result[band] == value).all(), name
        assert result[3].max() > result[3].min(), name


def test_what_is_wrong_with_a_folder_is_said(tmp_path, folder):
    cases = [
        (lambda: datasets.open_unlabelled("folder", None, 3), "--data_path is not given"),
        (lambda: datasets.open_unlabelled("folder", str(tmp_path / "none"), 3), "there is no such folder"),
        (lambda: datasets.open_unlabelled("folder", str(tmp_path), 3), "no picture below it"),
        (lambda: datasets.open_labelled("folder", str(tmp_path), "train", 3), "<class>/<picture>"),
        (lambda: datasets.open_labelled("folder", str(folder / "train"), "val", 3), "<class>/<picture>"),
        (lambda: datasets.open_unlabelled("fodler", str(folder), 3), "did you mean 'folder'"),
        (lambda: datasets.open_unlabelled("folder", str(folder), 2), "1 \\(grey\\), 3 \\(RGB\\)"),
        (lambda: datasets.open_unlabelled("folder", str(folder), 3, "os"), "write package.module:function"),
        (lambda: datasets.open_unlabelled("folder", str(folder), 3, "os:none"), "--loader os:none: cannot be imported"),
        (lambda: datasets.open_unlabelled("folder", str(folder), 3, "util.loaders:npy"), r"no file \.npy below it"),
        (lambda: datasets.open_unlabelled("folder", str(folder), 3, "numpy:load"), "cannot be decoded"),
        (lambda: datasets.open_unlabelled("digits", None, 1, "util.loaders:npy"), "needs --dataset folder"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    images = datasets.open_unlabelled("folder", str(tmp_path), 3)
    with pytest.raises(OSError, match=r"broken\.jpg: cannot be decoded"):
        images.picture(0)


def test_16_bit_grey_keeps_its_shades(tmp_path):
    shades = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    found = np.asarray(datasets.open_unlabelled("folder", str(tmp_path), 1).picture(0))
    np.testing.assert_array_equal(found, shades // 257)


def test_loaders_keep_every_band_and_depth(tmp_path):
    rng = np.random.default_rng(0)
    bands = rng.integers(0, 65536, (30, 40, 5), dtype=np.uint16)
    (tmp_path / "train").mkdir()
    tifffile.imwrite(tmp_path / "train" / "0.tif", np.moveaxis(bands, -1, 0), photometric="minisblack")
    images = datasets.open_unlabelled("folder", str(tmp_path), 5, "util.loaders:tiff")
    np.testing.assert_allclose(images.pixels(0).numpy(), bands / 65535, rtol=1e-6)
    crop, *_ = transforms.pretrain_transform((16, 24), (0.2, 1.0), 0.5)(images.pixels(0))
    assert (crop.shape, crop.dtype) == ((16, 24, 5), torch.float32)
    with pytest.raises(ValueError, match=r"0\.tif: cannot be decoded .*not \(height, width, 4\); see --in_chans"):
        datasets.open_unlabelled("folder", str(tmp_path), 4, "util.loaders:tiff")


def test_finetuning_with_four_channels_takes_no_colour_augmentation():
    FinetuneSettings(in_chans=4, aa=None).check()
    for flag, options in (("aa", {}), ("color_jitter", {"aa": None, "color_jitter": 0.4})):
        with pytest.raises(ValueError, match=f"--in_chans 4: --{flag} needs 1 or 3 channels"):
            FinetuneSettings(in_chans=4, **options).check()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_files_of_a_loader_are_of_one_type(tmp_path, workers, capsys):
    """Depths mixed in a batch are normalised wrongly, so another one than the first file's is a bad picture."""
    for number, dtype in enumerate((">u2", np.uint16, np.uint8, np.float32)):
        np.save(tmp_path / f"{number}.npy", np.full((9, 9, 2), 257, dtype=np.uint16).astype(dtype))
    images = datasets.open_unlabelled("folder", str(tmp_path), 2, "util.loaders:npy")
    data = SeededImages(images, transforms.pretrain_transform((8, 8), (0.2, 1.0), 0.5), max_bad_images=0.5)
    loader = torch.utils.data.DataLoader(data, batch_sampler=[[(0, 0), (0, 1), (0, 2), (0, 3)]], num_workers=workers)
    ((pixels, *_), _), *_ = loader
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.full_like(pixels, 257 / 65535))
    assert data.bad.collect(torch.device("cpu")) == 2
    said = capsys.readouterr().err
    assert "2.npy: cannot be decoded (its values are uint8, those of the first picture uint16; they must be" in said
    assert "3.npy: cannot be decoded (its values are float32" in said


def test_a_loader_s_first_file_may_be_bad(tmp_path):
    (tmp_path / "0.npy").write_bytes(b"")
    np.save(tmp_path / "1.npy", np.zeros((4, 4, 2), dtype=np.float32))
    images = datasets.open_unlabelled("folder", str(tmp_path), 2, "util.loaders:npy")
    assert (len(images), images.dtype) == (2, np.float32)


def test_a_loader_may_lie_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "lies_here.py").write_text("def read(path): ...\n")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    assert sources.import_loader("lies_here:read").__module__ == "lies_here"


def test_a_loader_with_a_mistake_in_it_is_named(tmp_path, folder, monkeypatch):
    (tmp_path / "wrongly_written.py").write_text("def read(path:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"--loader wrongly_written:read: cannot be imported .SyntaxError"):
        datasets.open_unlabelled("folder", str(folder), 3, "wrongly_written:read")


def write_shard(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, content)
                content = buffer.getvalue()
            data_files.add_member(tar, name, content)
    return str(path.parent)


def test_arrays_in_shards_may_have_any_channels(tmp_path, folder, capsys):
    bands = np.random.default_rng(0).integers(0, 65536, (20, 20, 12), dtype=np.uint16)
    jpeg = (folder / "train" / "class0" / "0.jpg").read_bytes()
    place = write_shard(tmp_path / "shards" / "train-0.tar", {"a.npy": bands, "b.jpg": jpeg})
    images = datasets.open_unlabelled("wds", place, 12)
    np.testing.assert_allclose(images.pixels(0).numpy(), bands / 65535, rtol=1e-6)
    with pytest.raises(OSError, match=r"b\.jpg: cannot be decoded .its values are uint8"):
        images.pixels(1)
    place = write_shard(tmp_path / "bytes" / "train-0.tar", {"a.npy": bands.astype(np.uint8), "b.jpg": jpeg})
    with pytest.raises(OSError, match=r"b\.jpg: cannot be decoded .a picture file, which cannot have 12 channels"):
        datasets.open_unlabelled("wds", place, 12).pixels(1)
    with pytest.raises(ValueError, match="--in_chans 12: training with classes takes 1"):
        datasets.open_labelled("wds", place, "train", 12)
    flags = ["--model", "mae_vit_mini_patch4", "--input_size", 16, "--epochs", 1, "--num_workers", 0, "--batch_size", 2]
    flags += ["--dataset", "wds", "--data_path", place, "--in_chans", 12, "--max_bad_images", 0.5, "--device", "cpu"]
    main_pretrain.main([*map(str, flags), "--output_dir", str(tmp_path / "run")])
    assert "b.jpg: cannot be decoded" in capsys.readouterr().err


def test_arrays_that_pillow_cannot_resize_are_refused_where_it_would(tmp_path, capsys):
    bands = {f"{number}.npy": np.ones((20, 20, 3), dtype=np.float32) for number in range(4)}
    classes = {f"{number}.cls": str(number % 2).encode() for number in range(4)}
    write_shard(tmp_path / "shards" / "train-0.tar", bands | classes)
    place = write_shard(tmp_path / "shards" / "val-0.tar", bands | classes)
    data = ["--dataset", "wds", "--data_path", place, "--output_dir", tmp_path / "run", "--num_workers", 0]
    model = ["--model", "mae_vit_mini_patch4", "--input_size", 16, "--epochs", 0]
    for flag in (["--eval_every", 1], ["--vis_every", 1], ["--exact_resize"]):
        said = refusal(main_pretrain.main, [*data, *model, *flag], capsys)
        assert f"{flag[0]}: resizes with Pillow, which cannot take float32 arrays of 3 channels" in said
    main_pretrain.main([*map(str, [*data, *model])])
    assert "--dataset wds: resizes with Pillow" in refusal(main_finetune.main, data, capsys)
    opened = checkpoints.open_checkpoint(tmp_path / "run" / checkpoint.LAST)
    with pytest.raises(ValueError, match="--dataset wds: resizes with Pillow"):
        measure.measure(opened, ("rank_me",))


def test_a_class_without_a_name_is_named(tmp_path, folder):
    jpeg = (folder / "train" / "class0" / "0.jpg").read_bytes()
    place = write_shard(tmp_path / "s" / "train-0.tar", {"a.jpg": jpeg, "a.cls": b"1", "b.jpg": jpeg, "b.cls": b"2"})
    (tmp_path / "s" / tar_shards.INFO).write_text(json.dumps({"splits": {}, "classes": ["cat", "dog"]}))
    with pytest.raises(ValueError, match=r"b\.jpg: its class is 2, but only 2 classes have names"):
        datasets.open_labelled("wds", place, "train", 3)


@pytest.mark.parametrize("name", ["eval_every", "vis_every"])
def test_what_looks_at_pictures_is_refused_for_arrays(name, folder, capsys):
    channels = ["--in_chans", "5"]
    for more in (["--loader", "util.loaders:npy"], [*channels, "--loader", "util.loaders:npy"], channels):
        with pytest.raises(SystemExit) as error:
            main_pretrain.main(["--data_path", str(folder), f"--{name}", "1", *more])
        assert error.value.code == 2
        assert f"error: --{name}: resizes with Pillow, which" in capsys.readouterr().err


def test_the_digits_are_split_without_overlap():
    train, val = (datasets.open_labelled("digits", None, split, 1) for split in ("train", "val"))
    assert (len(train), len(val)) == (1438, 359)
    assert set(train.labels) == set(val.labels) == set(range(10))
    assert train.picture(0).mode == "L"
    assert max(np.asarray(train.picture(i)).max() for i in range(9)) == 255


@pytest.mark.parametrize("exact", [False, True])
def test_a_sample_depends_on_seed_epoch_and_index_only(folder, exact):
    images = datasets.open_unlabelled("folder", str(folder), 3)
    data = SeededImages(images, transforms.pretrain_transform((32, 32), (0.2, 1.0), 0.5, exact), seed=1)
    (first, flip, _), _ = data[2, 5]
    torch.rand(3), np.random.rand(3), random.random()
    state = torch.get_rng_state()
    assert torch.equal(data[2, 5][0][0], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.uint8
    assert first.shape == (32, 32, 3)
    assert [bool(data[2, 5][0][1]) for _ in range(3)] == [bool(flip)] * 3
    assert {bool(data[epoch, 5][0][1]) for epoch in range(20)} == {False, True}
    others = [data[3, 5][0], data[2, 6][0], SeededImages(images, data.transform, seed=2)[2, 5][0]]
    assert not any(torch.equal(first, other) for other, *_ in others)


def test_the_finetuning_augmentation_is_deterministic_too(folder):
    images = datasets.open_labelled("folder", str(folder), "train", 3)
    transform = transforms.finetune_transform((32, 32), (0.08, 1.0), 0.5, "rand-m9-mstd0.5-inc1", None, (0.5,) * 3)
    data = SeededImages(images, transform)
    for epoch in range(20):
        assert torch.equal(data[epoch, 0][0], data[epoch, 0][0])
    assert not torch.equal(data[0, 0][0], data[1, 0][0])
    assert data[0, 0][0].dtype == torch.uint8


def test_normalisation_equals_to_tensor_and_normalize():
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = transforms.channel_statistics(3, None, None)
    expected = F.normalize(pixels.float() / 255, mean, std)
    torch.testing.assert_close(transforms.Normalize(mean, std)(pixels), expected, rtol=1e-5, atol=1e-6)


def test_flips_and_floats_on_the_device():
    pixels = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    normalize = transforms.Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    flips = torch.tensor([True, False, False, True])
    flipped, plain = normalize(pixels, flips), normalize(pixels)
    assert torch.equal(flipped[flips], plain[flips].flip(3))
    assert torch.equal(flipped[~flips], plain[~flips])
    torch.testing.assert_close(normalize(pixels.float() / 255), plain)


def test_channel_statistics():
    assert transforms.channel_statistics(1, None, None) == ((0.5,), (0.5,))
    assert transforms.channel_statistics(3, None, None)[0] == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match="one number for each of the 3 channels"):
        transforms.channel_statistics(3, [0.5], None)
    with pytest.raises(ValueError, match="above 0"):
        transforms.channel_statistics(1, None, [0.0])
    for mean, std in (([float("nan")], None), (None, [float("nan")]), (None, [float("inf")])):
        with pytest.raises(ValueError, match="every number must be finite"):
            transforms.channel_statistics(1, mean, std)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_evaluation_is_a_centre_crop(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    result = transforms.evaluation_transform(size, None)(picture)
    assert result.shape == (3, *size)
    shape = (36, 48) if size == (32, 32) else (34, 45)  # 60 x 80 just over the size / 0.875
    resized = F.resize(picture, shape, F.InterpolationMode.BICUBIC)
    assert torch.equal(result, F.pil_to_tensor(F.center_crop(resized, size)))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("shape", [(60, 80), (8, 100), (500, 40), (1, 12), (7, 7)])
def test_evaluation_shows_ordinary_images_as_timm_does(size, shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = create_transform(
        size if size[0] != size[1] else size[0], crop_pct=0.875, interpolation="bicubic", normalize=False
    )
    assert torch.equal(transforms.evaluation_transform(size, None)(image), expected(image))


@pytest.mark.parametrize("size", [(224, 224), (64, 256)])
@pytest.mark.parametrize("shape", [(8000, 1), (1, 8000), (2, 60000), (400, 2)])
def test_a_thin_image_takes_little_memory_in_evaluation(size, shape, monkeypatch):
    ramp = np.linspace(0, 255, max(shape)).round().astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[:, None] if shape[0] > shape[1] else ramp, shape).copy())
    resize, areas = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda *args, **kwargs: areas.append(args[1][0] * args[1][1]) or resize(*args, **kwargs)
    )
    result = transforms.evaluation_transform(size, None)(image)
    assert max(areas) < 5e6  # of one byte each
    assert result.shape == (1, *size)
    assert abs(result.float().mean() - 127.5) < 1.5  # the middle


def test_the_probes_crop_has_the_published_mean_area():
    """One draw, clamped: 0.52 of a 500 x 375 image on average, where torchvision's has 0.435."""
    random.seed(0)
    areas, crop = [], SingleDrawResizedCrop((8, 8))
    image = Image.new("RGB", (500, 375))
    image.im  # noqa: B018 - loaded once, so that the loop is about the crop
    taken = []
    original = F.resized_crop

    def record(img, top, left, height, width, *rest):
        assert 0 <= top <= 375 - height
        assert 0 <= left <= 500 - width
        taken.append(height * width / (500 * 375))
        return img

    F.resized_crop = record
    try:
        for _ in range(20000):
            crop(image)
    finally:
        F.resized_crop = original
    areas = np.array(taken)
    assert abs(areas.mean() - 0.52) < 0.01


def test_the_probes_crop_of_a_tiny_picture():
    assert SingleDrawResizedCrop((8, 8))(Image.new("RGB", (1, 1))).size == (8, 8)


def test_erasing_and_mixing_come_after_normalisation(monkeypatch):
    settings = FinetuneSettings(reprob=1.0, mixup=0.8, cutmix=1.0)
    prepare = main_finetune.make_prepare(settings, 10, transforms.Normalize((0.5,), (0.5,)), torch.device("cpu"))
    torch.manual_seed(0)
    images, targets = prepare([torch.zeros(8, 1, 32, 32, dtype=torch.uint8), torch.arange(8)])
    assert images.unique().numel() > 100  # noise in the erased boxes
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert targets.min() > 0  # the smoothing is in the targets
