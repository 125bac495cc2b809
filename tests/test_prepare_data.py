"""Images resized once: whole, the same after an interruption, usable for training."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import data_files
import numpy as np
import pytest
import torch
from helpers import ROOT, environment, refusal, write_pictures
from PIL import Image

from scripts import prepare_data
from util import seeding
from util.data import datasets, decode
from util.data.resize import resize_image
from util.distributed import world
from util.training import lock

SCRIPT = [sys.executable, str(ROOT / "scripts" / "prepare_data.py")]


def content(folder) -> dict[str, bytes]:
    """Return the files that are not hidden."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def save(path, level=100, size=(30, 40)):
    """Save a grey image of one level; its mean tells the level again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)


def run(*arguments):
    """Run the script with one worker."""
    prepare_data.main([*map(str, arguments), "--workers", "1"])


def seen(images) -> set[tuple[str, int]]:
    """Return (class, level) of all images."""
    levels = [round(np.asarray(images.picture(i)).mean() / 10) * 10 for i in range(len(images))]
    return {
        (images.classes[label] if label >= 0 else "none", level)
        for label, level in zip(images.labels, levels, strict=True)
    }


@pytest.fixture
def images(tmp_path):
    folder = write_pictures(tmp_path / "images", per_class=80, size=(90, 60))
    Image.new("RGBA", (200, 100), "blue").save(folder / "train" / "class0" / "0.png")  # beside 0.jpg
    (folder / "train" / "class1" / "9.jpg").write_bytes(b"")
    return folder


def test_what_is_written_and_printed(images, tmp_path, capsys):
    target = tmp_path / "small"
    flags = [str(images), str(target), "--short_side", "32", "--workers", "2"]
    prepare_data.main(flags)
    said = capsys.readouterr().out
    assert f"320 images are in {target}; 1 cannot be decoded" in said
    assert "9.jpg" in said
    assert f"--dataset wds --data_path {target}" in said
    train, val = (datasets.open_labelled("wds", str(target), split, 3) for split in ("train", "val"))
    assert (len(train), len(val)) == (160, 160)
    assert {train.picture(index).size for index in range(len(train))} == {(48, 32), (64, 32)}
    assert "class1/9.jpg: cannot be decoded" in (target / "bad_pictures.txt").read_text()
    before = content(target)
    prepare_data.main(flags)
    assert content(target) == before
    assert "was begun with other settings" in refusal(prepare_data.main, [*flags, "--quality", "80"], capsys)


def wait_for(condition):
    """Wait until `condition()`, for two minutes at most."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_run_again(images, tmp_path, number):
    """The workers end too, before they write what the next command is writing."""

    def flags(target):
        return [str(images), str(tmp_path / target), "--long_side", "64", "--per_shard", "10", "--workers", "2"]

    prepare_data.main(flags("whole"))
    command = [*SCRIPT, *flags("killed")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: process.poll() is not None or list(tmp_path.glob("killed/*.idx")))
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]  # ends when the last worker has closed its stderr
    assert process.returncode == -number
    assert "Traceback" not in said
    assert 0 < len(list(tmp_path.glob("killed/*.idx"))) < len(list(tmp_path.glob("whole/*.idx")))
    prepare_data.main(flags("killed"))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_two_at_once_do_not_write_to_one_destination(images, tmp_path, capsys):
    target = tmp_path / "small"
    target.mkdir()
    other = multiprocessing.get_context("fork").Process(target=hold_and_wait, args=(target,))
    other.start()
    try:
        wait_for(lambda: (target / ".lock").is_file() and (target / ".lock").read_text())
        said = refusal(prepare_data.main, [images, target], capsys)
        assert f"destination {target}: process {other.pid} on " in said
        assert "is at work there; wait until it ends, or name another folder" in said
        assert not content(target)
    finally:
        other.kill()
        other.join()
    run(images, target)


def hold_and_wait(folder):
    held = lock.hold(folder)
    time.sleep(600)
    held.close()


@pytest.mark.parametrize("written", ["[]", "3", '{"source": "/da', "{}", "null", "\\xff"])
def test_what_stands_in_the_destination_is_not_trusted(tmp_path, capsys, written):
    save(tmp_path / "images" / "0.png")
    for name in ("_info.json", "prepare_data.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(written.encode("latin-1"))
    run(tmp_path / "images", tmp_path / "_info.json")  # is written anew
    assert len(datasets.open_unlabelled("wds", str(tmp_path / "_info.json"), 3)) == 1
    said = refusal(prepare_data.main, [tmp_path / "images", tmp_path / "prepare_data.json"], capsys)
    assert "was begun with other settings, other images or other classes" in said


def test_a_damaged_shard_in_the_destination_is_named(tmp_path, capsys):
    save(tmp_path / "images" / "0.png")
    run(tmp_path / "images", tmp_path / "small")
    os.truncate(tmp_path / "small" / "train-000000.tar", 512)
    os.utime(tmp_path / "small" / "train-000000.tar", (0, 0))
    said = refusal(prepare_data.main, [tmp_path / "images", tmp_path / "small"], capsys)
    assert "train-000000.tar.idx: this index does not match its shard" in said
    (tmp_path / "small" / "train-000000.tar").unlink()
    run(tmp_path / "images", tmp_path / "small")
    assert len(datasets.open_unlabelled("wds", str(tmp_path / "small"), 3)) == 1


def test_shards_of_something_else_are_not_overwritten(tmp_path, capsys):
    save(tmp_path / "images" / "0.png")
    data_files.write_tar(tmp_path / "shards" / "train-000000.tar", {"0.jpg": b"", "0.cls": b"3"})
    said = refusal(prepare_data.main, [tmp_path / "images", tmp_path / "shards"], capsys)
    assert "shards: holds tar files of something else; name another folder to write" in said


def test_shards_train_as_the_folder_does(images, tmp_path):
    target = tmp_path / "shards"
    prepare_data.main([str(images), str(target), "--per_shard", "50", "--workers", "2"])
    both = (("wds", target), ("folder", images))
    shards, folder = (datasets.open_labelled(name, str(place), "train", 3) for name, place in both)
    assert shards.classes == folder.classes == ("class0", "class1")
    assert len(shards) == len(folder) - 1 == 160
    expected = sorted((int(label), folder.source.read(i)) for i, label in enumerate(folder.labels))
    found = sorted((int(label), shards.source.read(i)) for i, label in enumerate(shards.labels))
    same = [pair for pair in found if pair in expected]
    assert len(same) == 159  # byte for byte, but the PNG
    pairs = []
    for found in (datasets.open_labelled(name, str(place), "val", 3) for name, place in both):
        pairs.append(sorted((int(label), found.source.read(i)) for i, label in enumerate(found.labels)))
    assert len(pairs[0]) == 160
    assert pairs[0] == pairs[1]
    again = tmp_path / "from shards"
    run(target, again, "--dataset", "wds", "--long_side", "40")
    back = datasets.open_labelled("wds", str(again), "train", 3)
    assert sorted(back.labels) == sorted(shards.labels)
    assert back.classes == shards.classes


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shards_of_pixels_hold_what_jpegs_would_before_they_are_encoded(images, tmp_path, channels):
    target = tmp_path / "shards"
    run(images, target, "--pixels", "--short_side", "30", "--in_chans", channels)
    folder = datasets.open_labelled("folder", str(images), "train", channels)
    shards = datasets.open_labelled("wds", str(target), "train", channels)
    assert len(shards) == 160
    for index in range(5):
        original = folder.picture(int(shards.source.name(index).split(":")[1].split(".")[0]))
        smaller = original.resize([round(length * 30 / min(original.size)) for length in original.size], Image.LANCZOS)
        expected = np.asarray(smaller).reshape(smaller.height, smaller.width, channels)
        np.testing.assert_array_equal(shards.pixels(index).numpy(), expected)
        np.testing.assert_array_equal(np.asarray(shards.picture(index)).reshape(expected.shape), expected)


def test_a_home_folder_in_the_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "images" / "0.png")
    run("~/images", "~/small")
    run("images", "./small")  # the same
    assert len(datasets.open_unlabelled("wds", str(tmp_path / "small"), 3)) == 1
    assert not (tmp_path / "~").exists()
    run("~/images", "--stats")
    assert "--mean 0.39" in capsys.readouterr().out


def test_validation_images_keep_their_classes(tmp_path, capsys):
    source, target = tmp_path / "images", tmp_path / "shards"
    classes = {"ant": 10, "bee": 120, "cat": 240}
    for name, level in classes.items():
        save(source / "train" / name / "0.png", level)
        if name != "ant":
            save(source / "val" / name / "0.png", level)
    run(source, target)
    assert seen(datasets.open_labelled("wds", str(target), "train", 3)) == set(classes.items())
    assert seen(datasets.open_labelled("wds", str(target), "val", 3)) == {("bee", 120), ("cat", 240)}
    for path in source.glob("val/*/0.png"):
        path.write_bytes(b"")
    run(source, tmp_path / "bad val")
    with pytest.raises(ValueError, match="no shards of the split val"):
        datasets.open_labelled("wds", str(tmp_path / "bad val"), "val", 3)
    save(source / "val" / "dog" / "0.png")
    said = refusal(prepare_data.main, [source, tmp_path / "x"], capsys)
    assert "classes of val/ that train/ has not: ['dog']" in said
    save(tmp_path / "loose" / "train" / "a" / "0.png")
    save(tmp_path / "loose" / "val" / "0.png")
    assert "class" in refusal(prepare_data.main, [tmp_path / "loose", tmp_path / "x"], capsys)
    assert not (tmp_path / "x").exists()


def test_images_without_classes_are_reported(tmp_path, capsys):
    save(tmp_path / "flat" / "0.png")
    save(tmp_path / "flat" / "more" / "a" / "0.png")
    run(tmp_path / "flat", tmp_path / "flat shards")
    assert "2 of 2 training images are written without a class (" in capsys.readouterr().out
    save(tmp_path / "bare" / "train" / "0.png")
    run(tmp_path / "bare", tmp_path / "bare shards")
    said = capsys.readouterr().out
    assert "1 of 1 training images are written without a class (" in said
    assert "no validation images (" in said
    for folder, count in (("flat shards", 2), ("bare shards", 1)):
        assert list(datasets.open_unlabelled("wds", str(tmp_path / folder), 3).labels) == [-1] * count


@pytest.mark.parametrize("dataset", ["wds/part-*.tar", "wds"])
def test_shards_keep_the_classes_that_there_are(tmp_path, capsys, dataset):
    members = {}
    for number, level in enumerate((10, 120, 240)):
        save(tmp_path / "a.jpg", level)
        members |= {f"{number}.jpg": (tmp_path / "a.jpg").read_bytes(), f"{number}.cls": str(5 - number).encode()}
    if dataset == "wds":
        del members["1.cls"]
    data_files.write_tar(tmp_path / "source" / "part-0.tar", members)
    run(tmp_path / "source", tmp_path / "shards", "--dataset", dataset)
    said = capsys.readouterr().out
    assert ("1 of 3 training images are written without a class" in said) == (dataset == "wds")
    images = datasets.open_unlabelled("wds", str(tmp_path / "shards"), 3)
    found = {(int(label), int(np.asarray(images.picture(i)).mean())) for i, label in enumerate(images.labels)}
    assert found == {(5, 10), (-1 if dataset == "wds" else 4, 120), (3, 240)}


def test_shards_are_not_continued_with_other_images(tmp_path, capsys):
    source = tmp_path / "images"
    for number in range(6):
        save(source / "train" / "ab"[number % 2] / f"{number}.png", 40 * number)
    flags = [source, tmp_path / "shards", "--per_shard", "2"]
    run(*flags)
    before = content(tmp_path / "shards")
    save(source / "train" / "a" / "new.png")
    assert "was begun with other settings, other images" in refusal(prepare_data.main, flags, capsys)
    (source / "train" / "a" / "new.png").unlink()
    (source / "train" / "b").rename(source / "train" / "c")
    assert "was begun with other settings, other images or other classes" in refusal(prepare_data.main, flags, capsys)
    (source / "train" / "c").rename(source / "train" / "b")
    run(f"{source}/", *flags[1:])
    assert content(tmp_path / "shards") == before


def test_shards_from_shards_are_not_continued_with_fewer(tmp_path, capsys):
    source = data_files.write_shards(write_pictures(tmp_path / "images"), tmp_path / "source", shards=2)
    flags = [source, tmp_path / "small", "--dataset", "wds"]
    run(*flags)
    run(*flags)
    (source / "train-000.tar").unlink()
    assert "was begun with other settings, other images" in refusal(prepare_data.main, flags, capsys)


def test_classes_of_one_name_stay_apart(tmp_path):
    for folder in ("n02012849", "n03126707", "n01440764"):
        for split in ("train", "val"):
            save(tmp_path / "imagenet" / split / folder / f"{folder}_0.JPEG", int(folder[-2:]))
    names = {"n02012849": ("crane",), "n03126707": ("crane", "lifting"), "n01440764": ("tench", "Tinca tinca")}
    torch.save((names, []), tmp_path / "imagenet" / "meta.bin")
    run(tmp_path / "imagenet", tmp_path / "small", "--dataset", "torch/imagenet")
    images = datasets.open_labelled("wds", str(tmp_path / "small"), "train", 3)
    levels = {int(label): round(np.asarray(images.picture(i)).mean()) for i, label in enumerate(images.labels)}
    assert levels == {0: 64, 1: 49, 2: 7}
    assert images.classes == ("tench", "crane", "crane")


def test_nothing_is_overwritten_or_dropped_in_silence(tmp_path, capsys):
    for name in ("a.png", "a.png.jpg", "b.png"):
        save(tmp_path / "twice" / name)
    run(tmp_path / "twice", tmp_path / "shards")
    assert len(datasets.open_unlabelled("wds", str(tmp_path / "shards"), 3)) == 3
    for name in ("class/0.png", "1.png", "2.gif"):
        save(tmp_path / "loose" / "train" / name)
    run(tmp_path / "loose", tmp_path / "small")
    passed_over = "2 files (.gif beside the class folders 1, .png beside the class folders 1)"
    assert f"train: found 1 images of 1 classes; passed over {passed_over}" in capsys.readouterr().out
    said = refusal(prepare_data.main, [tmp_path / "twice", tmp_path / "twice" / "small"], capsys)
    assert "small: is the source, or inside it; name another folder to write" in said


def test_bad_images_with_names_in_latin_1(tmp_path, capsys):
    for number in range(3):
        save(tmp_path / "images" / f"{number}.png")
    name = b"caf\xe9\xe2\x80\xa8.jpg"  # with a line separator
    Path(os.fsdecode(bytes(tmp_path / "images") + b"/" + name)).write_bytes(b"")
    for _ in range(2):
        run(tmp_path / "images", tmp_path / "small", "--per_shard", "2")
        assert r"caf\udce9" in capsys.readouterr().out
        (line,) = (tmp_path / "small" / "bad_pictures.txt").read_bytes().splitlines()
        assert b"caf\xe9" in line


def test_a_shard_of_which_no_image_is_good(tmp_path, capsys):
    for number in range(11):
        save(tmp_path / "images" / f"{number:03}.png")
    last = tmp_path / "images" / f"{seeding.permutation(0, 0, 11)[10]:03}.png"
    whole = last.read_bytes()
    last.write_bytes(b"")
    flags = [tmp_path / "images", tmp_path / "shards", "--per_shard", "5"]
    before = None
    for _ in range(2):
        run(*flags)
        assert "10 images are in" in capsys.readouterr().out
        assert len(datasets.open_unlabelled("wds", str(tmp_path / "shards"), 3)) == 10
        before = before or content(tmp_path / "shards")
        assert content(tmp_path / "shards") == before
    assert "train-000002.tar" not in before
    last.write_bytes(whole)
    run(*flags)
    assert "11 images are in" in capsys.readouterr().out
    assert json.loads((tmp_path / "shards" / "_info.json").read_text())["splits"]["train"]["num_samples"] == 11


def test_a_mended_image_is_added_and_all_bad_is_an_error(tmp_path, capsys):
    for number in range(4):
        save(tmp_path / "images" / f"{number}.png")
    flags, whole = [tmp_path / "images", tmp_path / "shards"], (tmp_path / "images" / "0.png").read_bytes()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"")
    said = refusal(prepare_data.main, flags, capsys)
    assert "no image can be decoded" in said
    assert len((tmp_path / "shards" / "bad_pictures.txt").read_text().splitlines()) == 4
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(whole)
        run(*flags)
        assert f"{number + 1} images are in" in capsys.readouterr().out
        assert len(datasets.open_unlabelled("wds", str(tmp_path / "shards"), 3)) == number + 1


def test_a_full_disk_is_no_bad_image(tmp_path, capsys):
    """A limit on the size of files, which is what a full disk is to the script: an error of writing."""
    write_pictures(tmp_path / "images", per_class=2, size=(150, 150))
    flags = [str(tmp_path / "images"), str(tmp_path / "small"), "--workers", "2"]
    command = ["bash", "-c", "ulimit -f 8; " + " ".join([*SCRIPT, *flags])]
    alone = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    limited = subprocess.run(command, capture_output=True, text=True, env=alone, cwd=tmp_path)
    assert limited.returncode == 1
    assert "Traceback" not in limited.stderr
    said = limited.stderr.splitlines()[-1]
    assert "small: cannot be read or written ([Errno 27] File too large" in said
    assert "run the same again: it goes on" in said
    prepare_data.main(flags)
    assert "8 images are in" in capsys.readouterr().out
    assert len(datasets.open_labelled("wds", str(tmp_path / "small"), "train", 3)) == 4


def test_a_data_set_that_is_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("", "digits", "--dataset", "digits", "--in_chans", 1)
    assert len(datasets.open_labelled("wds", "digits", "val", 1)) == 359
    said = refusal(prepare_data.main, ["", "five", "--dataset", "digits", "--in_chans", 5], capsys)
    assert "--in_chans 5: images are written with 1, 3 or 4 channels" in said


def test_a_destination_that_cannot_be_made(tmp_path, capsys):
    save(tmp_path / "images" / "0.png")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "small"):
        assert f"{place}: cannot be made (" in refusal(prepare_data.main, [tmp_path / "images", place], capsys)


def test_a_system_that_does_not_say_which_cores_may_be_used(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert prepare_data.parse(["a", "b"]).workers == world.usable_cores() == os.cpu_count()


def test_what_stays_as_it_is_and_what_becomes_smaller(images):
    data = (images / "train" / "class0" / "0.jpg").read_bytes()  # 90 x 60
    assert resize_image(data, long_side=90) is data
    assert resize_image(data, short_side=61) is data
    assert decode.to_picture(resize_image(data, short_side=30), "RGB").size == (45, 30)
    assert resize_image(data, long_side=30, pixels=True).shape == (20, 30, 3)
