"""Pictures made smaller once: whole, the same after an interruption, usable for training; statistics; the crops."""

from __future__ import annotations

import io
import multiprocessing
import time

import data_files
import numpy as np
import pytest
import torch
from helpers import write_pictures
from PIL import Image
from torchvision import transforms as tv

from scripts import prepare_data
from util import crop, datasets, decode, prepare


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def pictures(tmp_path):
    folder = write_pictures(tmp_path / "pictures", per_class=80, size=(90, 60))
    Image.new("RGBA", (200, 100), "blue").save(folder / "train" / "class0" / "0.png")  # beside 0.jpg
    (folder / "train" / "class1" / "9.jpg").write_bytes(b"")
    return folder


def test_a_folder_keeps_its_tree(pictures, tmp_path, capsys):
    target = tmp_path / "small"
    prepare_data.main([str(pictures), str(target), "--short_side", "32", "--workers", "2"])
    said = capsys.readouterr().out
    assert "1 cannot be decoded" in said
    assert "9.jpg" in said
    assert "PSNR" in said
    train, val = (datasets.open_labelled("folder", str(target), split, 3) for split in ("train", "val"))
    assert (len(train), len(val)) == (160, 160)
    assert train.picture(2).size == (48, 32)
    assert (target / "train" / "class0" / "0.png.jpg").is_file()
    assert "class1/9.jpg: cannot be decoded" in (target / "bad_pictures.txt").read_text()
    with pytest.raises(SystemExit) as error:
        prepare_data.main([str(pictures), str(target), "--short_side", "40"])
    assert error.value.code == 2
    assert "was begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--shards", "--per_shard", "30"]], ids=["folder", "shards"])
def test_killed_in_the_middle_and_run_again(pictures, tmp_path, more):
    def flags(target):
        return [str(pictures), str(tmp_path / target), "--long_side", "64", *more, "--workers", "1"]

    def written(target):
        return list((tmp_path / target).rglob("*.idx" if more else "*.jpg"))

    prepare_data.main(flags("whole"))
    process = multiprocessing.get_context("fork").Process(target=prepare_data.main, args=(flags("killed"),))
    process.start()
    while process.is_alive() and not written("killed"):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert 0 < len(written("killed")) < len(written("whole"))
    prepare_data.main(flags("killed"))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_shards_train_as_the_folder_does(pictures, tmp_path):
    target = tmp_path / "shards"
    prepare_data.main([str(pictures), str(target), "--shards", "--per_shard", "50", "--workers", "2"])
    shards = datasets.open_labelled("wds", str(target), "train", 3)
    folder = datasets.open_labelled("folder", str(pictures), "train", 3)
    assert shards.classes == folder.classes == ("class0", "class1")
    assert len(shards) == len(folder) - 1 == 160
    expected = sorted((int(label), folder.source.read(i)) for i, label in enumerate(folder.labels))
    found = sorted((int(label), shards.source.read(i)) for i, label in enumerate(shards.labels))
    same = [pair for pair in found if pair in expected]
    assert len(same) == 159  # byte for byte, but the PNG
    assert len(datasets.open_labelled("wds", str(target), "val", 3)) == 160
    again = tmp_path / "from shards"
    prepare_data.main([str(target), str(again), "--dataset", "wds", "--long_side", "40", "--workers", "1"])
    back = datasets.open_labelled("folder", str(again), "train", 3)
    assert sorted(back.labels) == sorted(shards.labels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shards_of_pixels_hold_what_jpegs_would_before_they_are_encoded(pictures, tmp_path, channels, capsys):
    target = tmp_path / "shards"
    flags = ["--shards", "--pixels", "--short_side", "30", "--in_chans", str(channels), "--workers", "1"]
    prepare_data.main([str(pictures), str(target), *flags])
    assert "PSNR" in capsys.readouterr().out
    folder = datasets.open_labelled("folder", str(pictures), "train", channels)
    shards = datasets.open_labelled("wds", str(target), "train", channels)
    assert len(shards) == 160
    for index in range(5):
        original = folder.picture(int(shards.source.name(index).split(":")[1].split(".")[0]))
        smaller = original.resize([round(length * 30 / min(original.size)) for length in original.size], Image.LANCZOS)
        expected = np.asarray(smaller).reshape(smaller.height, smaller.width, channels)
        np.testing.assert_array_equal(shards.pixels(index).numpy(), expected)
        np.testing.assert_array_equal(np.asarray(shards.picture(index)).reshape(expected.shape), expected)
    with pytest.raises(SystemExit) as error:
        prepare_data.main([str(pictures), str(tmp_path / "other"), "--pixels"])
    assert error.value.code == 2
    assert "--pixels: is for tar shards; add --shards" in capsys.readouterr().err


def test_statistics(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "grey").mkdir()
    values = rng.integers(0, 256, (5, 30, 40), dtype=np.uint8)
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / "grey" / f"{number}.png")
    prepare_data.main([str(tmp_path / "grey"), "--stats", "--in_chans", "1", "--workers", "1"])
    expected = f"--mean {values.mean() / 255:.4f} --std {values.std() / 255:.4f}"
    assert capsys.readouterr().out.strip() == expected
    place = data_files.write_npy(tmp_path / "deep", 4, "uint16")
    flags = ["--stats", "--in_chans", "4", "--loader", "util.loaders:npy", "--workers", "1"]
    prepare_data.main([str(place), *flags])
    words = capsys.readouterr().out.split()
    deep = np.stack([np.load(path) for path in place.glob("*.npy")]) / 65535
    assert words[:1] + words[5:6] == ["--mean", "--std"]
    np.testing.assert_allclose([float(word) for word in words[1:5]], deep.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose([float(word) for word in words[6:]], deep.std((0, 1, 2)), atol=1e-4)


def photographs(count):
    """Smooth pictures of many shapes, as JPEGs."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        width, height = rng.integers(20, 160, 2)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def test_exact_crops_are_torchvision_s_to_the_bit_and_fast_ones_near():
    """1,000 pictures with the same random numbers; the fast crop at most 6 of 255 levels off."""
    size, scale = (32, 32), (0.2, 1.0)
    reference = tv.Compose(
        [
            tv.RandomResizedCrop(size, scale=scale, interpolation=tv.InterpolationMode.BICUBIC),
            tv.RandomHorizontalFlip(),
            tv.PILToTensor(),
        ]
    )
    exact, fast = crop.PictureCrop(size, scale, 0.5), crop.PixelCrop(size, scale, 0.5)
    apart = []
    for number, data in enumerate(photographs(1000)):
        torch.manual_seed(number)
        expected = reference(Image.open(io.BytesIO(data)).convert("RGB"))
        torch.manual_seed(number)
        pixels, flip = exact(decode.to_picture(data, "RGB"))
        found = pixels.permute(2, 0, 1)
        assert torch.equal(found.flip(2) if flip else found, expected), number
        torch.manual_seed(number)
        near, near_flip = fast(decode.to_pixels(data, 3))
        assert near_flip == flip
        apart.append((near.int() - pixels.int()).abs())
    apart = torch.stack(apart).float()
    assert apart.max() <= 6
    assert apart.mean() < 0.1


@pytest.mark.parametrize("shape", [(500, 375), (40, 400), (400, 40), (1, 1), (1, 300), (3, 2)])
def test_the_box_is_torchvision_s(shape):
    for seed in range(200):
        torch.manual_seed(seed)
        expected = tv.RandomResizedCrop.get_params(torch.empty(3, shape[1], shape[0]), (0.2, 1.0), (3 / 4, 4 / 3))
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert crop.draw_box(*shape, (0.2, 1.0)) == expected
        assert torch.rand(1) == after


def test_psnr_and_what_stays_as_it_is():
    (data,) = photographs(1)
    width, height = decode.to_picture(data, "RGB").size
    assert prepare.resized(data, long_side=max(width, height)) is data
    assert prepare.crop_psnr(data, data, 0, 32) == float("inf")
    smaller = prepare.resized(data, short_side=min(width, height) // 2)
    assert decode.to_picture(smaller, "RGB").size[0] in (width // 2, width // 2 + 1)
    assert 15 < prepare.crop_psnr(data, smaller, 0, 32) < 60
