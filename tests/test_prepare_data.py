"""Pictures made smaller once: whole, the same after an interruption, usable for training; statistics; the crops."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import data_files
import numpy as np
import pytest
import torch
from helpers import ROOT, environment, write_pictures
from PIL import Image
from torchvision import transforms as tv

from scripts import prepare_data
from util import seeding
from util.data import crop, datasets, decode, resize
from util.distributed import world


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
    both = (("wds", target), ("folder", pictures))
    shards, folder = (datasets.open_labelled(name, str(place), "train", 3) for name, place in both)
    assert shards.classes == folder.classes == ("class0", "class1")
    assert len(shards) == len(folder) - 1 == 160
    expected = sorted((int(label), folder.source.read(i)) for i, label in enumerate(folder.labels))
    found = sorted((int(label), shards.source.read(i)) for i, label in enumerate(shards.labels))
    same = [pair for pair in found if pair in expected]
    assert len(same) == 159  # byte for byte, but the PNG
    pairs = []
    for images in (datasets.open_labelled(name, str(place), "val", 3) for name, place in both):
        pairs.append(sorted((int(label), images.source.read(i)) for i, label in enumerate(images.labels)))
    assert len(pairs[0]) == 160
    assert pairs[0] == pairs[1]
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


def save(path, level=100, size=(30, 40)):
    """A grey picture of one level; its average tells it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)


def prepared(*arguments):
    """Run the script on one process."""
    prepare_data.main([*map(str, arguments), "--workers", "1"])


def refused(capsys, *arguments) -> str:
    """The sentence with which the script refuses, with exit status 2."""
    with pytest.raises(SystemExit) as error:
        prepared(*arguments)
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def seen(images) -> set[tuple[str, int]]:
    """(class, level) of all pictures."""
    levels = [round(np.asarray(images.picture(i)).mean() / 10) * 10 for i in range(len(images))]
    return {
        (images.classes[label] if label >= 0 else "none", level)
        for label, level in zip(images.labels, levels, strict=True)
    }


def test_validation_pictures_keep_their_classes_in_shards(tmp_path, capsys):
    source, target = tmp_path / "pictures", tmp_path / "shards"
    classes = {"ant": 10, "bee": 120, "cat": 240}
    for name, level in classes.items():
        save(source / "train" / name / "0.png", level)
        if name != "ant":
            save(source / "val" / name / "0.png", level)
    prepared(source, target, "--shards")
    assert seen(datasets.open_labelled("wds", str(target), "train", 3)) == set(classes.items())
    assert seen(datasets.open_labelled("wds", str(target), "val", 3)) == {("bee", 120), ("cat", 240)}
    save(source / "val" / "dog" / "0.png")
    assert "classes of the validation pictures that train has not: ['dog']" in refused(capsys, source, tmp_path / "x")


def test_pictures_without_classes_are_said(tmp_path, capsys):
    save(tmp_path / "flat" / "0.png")
    prepared(tmp_path / "flat", tmp_path / "flat shards", "--shards")
    assert "has no folder train, so the pictures are prepared without classes" in capsys.readouterr().out
    save(tmp_path / "bare" / "train" / "0.png")
    prepared(tmp_path / "bare", tmp_path / "bare shards", "--shards")
    assert "1 of 1 training pictures are prepared without a class (" in capsys.readouterr().out
    for folder in ("flat shards", "bare shards"):
        assert list(datasets.open_unlabelled("wds", str(tmp_path / folder), 3).labels) == [-1]


@pytest.mark.parametrize("dataset", ["wds/part-*.tar", "wds"])
def test_shards_keep_the_classes_that_there_are(tmp_path, capsys, dataset):
    pictures = {}
    for number, level in enumerate((10, 120, 240)):
        save(tmp_path / "a.jpg", level)
        pictures |= {f"{number}.jpg": (tmp_path / "a.jpg").read_bytes(), f"{number}.cls": str(5 - number).encode()}
    if dataset == "wds":
        del pictures["1.cls"]
    data_files.write_tar(tmp_path / "source" / "part-0.tar", pictures)
    prepared(tmp_path / "source", tmp_path / "shards", "--dataset", dataset, "--shards")
    said = capsys.readouterr().out
    assert ("1 of 3 training pictures are prepared without a class" in said) == (dataset == "wds")
    images = datasets.open_unlabelled("wds", str(tmp_path / "shards"), 3)
    found = {(int(label), int(np.asarray(images.picture(i)).mean())) for i, label in enumerate(images.labels)}
    assert found == {(5, 10), (-1 if dataset == "wds" else 4, 120), (3, 240)}
    prepared(tmp_path / "source", tmp_path / "folder", "--dataset", dataset)
    places = {path.parent.name for path in (tmp_path / "folder" / "train").rglob("*.jpg")}
    assert places == {"5", "train" if dataset == "wds" else "4", "3"}


def test_shards_are_not_continued_with_other_pictures(tmp_path, capsys):
    source = tmp_path / "pictures"
    for number in range(6):
        save(source / "train" / "ab"[number % 2] / f"{number}.png", 40 * number)
    shards = [source, tmp_path / "shards", "--shards", "--per_shard", "2"]
    folder = [source, tmp_path / "folder"]
    prepared(*shards)
    prepared(*folder)
    before = content(tmp_path / "shards")
    save(source / "train" / "a" / "new.png")
    assert "was begun with other pictures or classes" in refused(capsys, *shards)
    prepared(*folder)
    assert len(datasets.open_labelled("folder", str(tmp_path / "folder"), "train", 3)) == 7
    (source / "train" / "a" / "new.png").unlink()
    (source / "train" / "b").rename(source / "train" / "c")
    assert "was begun with other pictures or classes" in refused(capsys, *shards)
    (source / "train" / "c").rename(source / "train" / "b")
    prepared(f"{source}/", *shards[1:])
    assert content(tmp_path / "shards") == before


def test_numbered_files_are_not_continued_with_other_pictures(tmp_path, capsys):
    source = data_files.write_shards(write_pictures(tmp_path / "pictures"), tmp_path / "source", shards=2)
    folder = [source, tmp_path / "folder", "--dataset", "wds"]
    prepared(*folder)
    prepared(*folder)
    (source / "train-000.tar").unlink()
    assert "was begun with other pictures or classes" in refused(capsys, *folder)


def test_classes_of_one_name_stay_apart(tmp_path):
    for folder in ("n02012849", "n03126707", "n01440764"):
        for split in ("train", "val"):
            save(tmp_path / "imagenet" / split / folder / f"{folder}_0.JPEG", int(folder[-2:]))
    names = {"n02012849": ("crane",), "n03126707": ("crane", "lifting"), "n01440764": ("tench", "Tinca tinca")}
    torch.save((names, []), tmp_path / "imagenet" / "meta.bin")
    prepared(tmp_path / "imagenet", tmp_path / "small", "--dataset", "torch/imagenet")
    found = [path.parent.name for path in sorted((tmp_path / "small" / "train").rglob("*.jpg"))]
    assert found == ["0000_tench", "0001_crane", "0002_crane"]


def test_nothing_is_overwritten_or_dropped_in_silence(tmp_path, capsys):
    for name in ("a.png", "a.png.jpg", "b.png"):
        save(tmp_path / "twice" / name)
    said = refused(capsys, tmp_path / "twice", tmp_path / "small")
    assert "a.png and a.png.jpg would both become a.png.jpg; rename one of them" in said
    assert not (tmp_path / "small").exists()
    prepared(tmp_path / "twice", tmp_path / "shards", "--shards")  # where names are numbers
    for name in ("class/0.png", "1.png", "2.png"):
        save(tmp_path / "loose" / "train" / name)
    prepared(tmp_path / "loose", tmp_path / "small")
    assert "train: 2 pictures beside the folders of the classes are left out" in capsys.readouterr().out
    said = refused(capsys, tmp_path / "twice", tmp_path / "twice" / "small")
    assert "small: is the source" in said
    assert "or inside it; name another folder to write" in said


@pytest.mark.parametrize("more", [[], ["--shards", "--per_shard", "2"]], ids=["folder", "shards"])
def test_bad_pictures_with_names_in_latin_1(tmp_path, capsys, more):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        save(tmp_path / "pictures" / f"{number}.png")
    name = b"caf\xe9\xe2\x80\xa8.jpg"  # with a line separator
    Path(os.fsdecode(bytes(tmp_path / "pictures") + b"/" + name)).write_bytes(b"")
    for _ in range(2):
        prepared(tmp_path / "pictures", tmp_path / "small", *more)
        assert r"caf\udce9" in capsys.readouterr().out
        (line,) = (tmp_path / "small" / "bad_pictures.txt").read_bytes().splitlines()
        assert b"caf\xe9" in line


def test_a_shard_of_which_no_picture_is_good(tmp_path, capsys):
    for number in range(11):
        save(tmp_path / "pictures" / f"{number:03}.png")
    last = seeding.permutation(0, 0, 11)[10]
    (tmp_path / "pictures" / f"{last:03}.png").write_bytes(b"")
    before = None
    for _ in range(2):
        prepared(tmp_path / "pictures", tmp_path / "shards", "--shards", "--per_shard", "5")
        assert "10 pictures are in" in capsys.readouterr().out
        assert len(datasets.open_unlabelled("wds", str(tmp_path / "shards"), 3)) == 10
        before = before or content(tmp_path / "shards")
        assert content(tmp_path / "shards") == before
    assert "train-000002.tar" not in before


@pytest.mark.parametrize("more", [[], ["--shards"]], ids=["folder", "shards"])
def test_a_full_disk_is_no_bad_picture(tmp_path, more):
    """A limit on the size of files, which is what a full disk is to the script: an error of writing."""
    write_pictures(tmp_path / "pictures", per_class=2, size=(150, 150))
    flags = [tmp_path / "pictures", tmp_path / "small", *more, "--workers", 2]
    command = " ".join(map(str, [sys.executable, ROOT / "scripts" / "prepare_data.py", *flags]))
    limited, whole = (
        subprocess.run(["bash", "-c", limit + command], capture_output=True, text=True, env=environment())
        for limit in ("ulimit -f 8; ", "")
    )
    assert limited.returncode == 1
    assert "Traceback" not in limited.stderr
    said = limited.stderr.splitlines()[-1]
    assert "small: cannot be written ([Errno 27] File too large" in said
    assert "run the same again: it goes on" in said
    assert whole.returncode == 0, whole.stderr
    assert "8 pictures are in" in whole.stdout
    dataset = "wds" if more else "folder"
    assert len(datasets.open_labelled(dataset, str(tmp_path / "small"), "train", 3)) == 4


def test_a_destination_that_cannot_be_is_said(tmp_path, capsys):
    save(tmp_path / "pictures" / "0.png")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "small"):
        assert f"{place}: cannot be made (" in refused(capsys, tmp_path / "pictures", place)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "prepare_data.json").write_text('{"source": "/da')
    said = refused(capsys, tmp_path / "pictures", tmp_path / "cut")
    assert "prepare_data.json: is not whole; name another folder to write, or remove this one" in said


def test_a_system_that_does_not_say_which_cores_may_be_used(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert prepare_data.parse(["a", "b"]).workers == world.usable_cores() == os.cpu_count()


def test_statistics_read_with_the_loader_below_classes_too(tmp_path, capsys):
    for name in "ab":
        data_files.write_npy(tmp_path / name, 4, "float32", count=3)
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "train" / name)
    Image.new("RGB", (30, 40)).save(tmp_path / "train" / "a" / "beside.png")
    prepared(tmp_path, "--stats", "--in_chans", 4, "--loader", "util.loaders:npy")
    words = capsys.readouterr().out.split()
    values = np.stack([np.load(path) for path in tmp_path.rglob("*.npy")])
    np.testing.assert_allclose([float(word) for word in words[1:5]], values.mean((0, 1, 2)), atol=1e-4)


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
    assert resize.resized(data, long_side=max(width, height)) is data
    assert resize.crop_psnr(data, data, 0, 32) == float("inf")
    smaller = resize.resized(data, short_side=min(width, height) // 2)
    assert decode.to_picture(smaller, "RGB").size[0] in (width // 2, width // 2 + 1)
    assert 15 < resize.crop_psnr(data, smaller, 0, 32) < 60
