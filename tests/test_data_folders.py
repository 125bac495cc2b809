"""Folders of images: which files are taken, what is said of the others, and which folders are refused."""

from __future__ import annotations

import io
import os

import data_files
import numpy as np
import pytest
from helpers import refusal, write_pictures
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from util import loaders
from util.data import datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_an_image_folder_has_labels_and_pretraining_takes_its_train_part(folder):
    train = datasets.open_labelled("folder", str(folder), "train", 3)
    assert train.classes == ("class0", "class1")
    assert list(train.labels) == [0] * 6 + [1] * 6
    assert len(datasets.open_unlabelled("folder", str(folder), 3)) == 12
    assert train.picture(0).size == (40, 48)


def test_pretraining_takes_any_folder_of_pictures(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for place in ("a.png", "deep/b.JPG", "deep/er/c.webp"):
        Image.new("RGB", (20, 20)).save(tmp_path / place)
    (tmp_path / "notes.txt").write_text("no picture")
    assert len(datasets.open_unlabelled("folder", str(tmp_path), 3)) == 3


def test_capitals_are_small_letters_in_the_endings_of_a_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders.npy, "extensions", (".NPY", ".arr"))
    for name in ("a.NPY", "b.npy", "c.Arr", "d.txt"):
        with open(tmp_path / name, "wb") as file:
            np.save(file, np.zeros((4, 4), dtype=np.uint8))
    images = datasets.open_unlabelled("folder", str(tmp_path), 1, "util.loaders:npy")
    assert names_of(images) == [str(tmp_path / name) for name in ("a.NPY", "b.npy", "c.Arr")]
    monkeypatch.setattr(loaders.npy, "extensions", ".arr")  # one needs no tuple
    assert names_of(datasets.open_unlabelled("folder", str(tmp_path), 1, "util.loaders:npy")) == [
        str(tmp_path / "c.Arr")
    ]


def names_of(images):
    return [images.source.name(index) for index in range(len(images))]


@pytest.mark.parametrize("loader", [None, "util.loaders:tiff"])
def test_the_walk_through_folders(tmp_path, loader):
    """Links are followed, none in a circle; hidden files are no pictures; the order is that of the paths."""
    for place in ("data", "elsewhere", "data/.cache", "data/b"):
        (tmp_path / place).mkdir()
    shown = ["a1\u00b22.tif", "b/x01.tif", "b/x1.tif", "b/x10.tif", "b/x2.tif", "linked/y.tif"]
    hidden = ["._a.tif", ".cache/z.tif"]
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "latest").symlink_to(".")
    for name in [*hidden, *shown[::-1]]:
        Image.new("L", (8, 8)).save(tmp_path / "data" / name)
    images = datasets.open_unlabelled("folder", str(tmp_path / "data"), 1, loader)
    assert names_of(images) == [str(tmp_path / "data" / name) for name in shown]


def test_a_class_may_have_no_picture_and_what_is_hidden_is_no_class(tmp_path):
    write_pictures(tmp_path, per_class=2)
    (tmp_path / "train" / "class00").mkdir()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "class0" / "._0.jpg").write_bytes(b"macOS")
    images = datasets.open_labelled("folder", str(tmp_path), "train", 3)
    assert images.classes == ("class0", "class00", "class1")
    assert list(images.labels) == [0, 0, 2, 2]


ENDINGS = (".gif", ".AVIF", ".jfif", ".jp2", ".jpe", ".jpg", ".Png", ".webp", ".tif", ".bmp", ".ppm", ".tga")


def test_every_ending_that_pillow_decodes_is_taken(tmp_path):
    members = {"0.txt": b"a caption", "0.json": b"{}"}
    for number, ending in enumerate(ENDINGS):
        buffer = io.BytesIO()
        buffer.name = f"{number}{ending}".lower()  # says the format
        Image.new("RGB", (20, 16), "red").save(buffer)
        members[f"{number}{ending}"] = buffer.getvalue()
    data_files.write_tar(tmp_path / "train-0.tar", members)
    (tmp_path / "train").mkdir()
    for name, content in members.items():
        (tmp_path / "train" / name).write_bytes(content)
    for dataset in ("folder", "wds"):
        images = datasets.open_unlabelled(dataset, str(tmp_path), 3)
        assert len(images) == len(ENDINGS)
        assert {tuple(images.pixels(index).shape) for index in range(len(images))} == {(16, 20, 3)}


def test_what_is_found_and_what_is_passed_over_is_said(tmp_path, capsys):
    write_pictures(tmp_path, per_class=3)
    beside = ["list.txt", "loose.jpg"]
    for name in ["class0/a.txt", "class0/b.TXT", "class0/.x", "class1/c.heic", "class1/README", *beside]:
        (tmp_path / "train" / name).write_bytes(b"")
    (tmp_path / "val" / "flat.jpg").write_bytes(b"")
    found = datasets.open_labelled("folder", str(tmp_path), "train", 3).summary("training")
    assert found == (
        "training: found 6 images of 2 classes; passed over 6 files (.txt 2, .heic 1, .jpg beside the class folders 1, "
        ".txt beside the class folders 1, no ending 1)"
    )
    flags = [*("--data_path", tmp_path, "--device", "cpu", "--num_workers", 0, "--input_size", 16, "--batch_size", 2)]
    flags += ["--epochs", 0, "--warmup_epochs", 0]
    main_pretrain.main(
        [str(f) for f in [*flags, "--model", "mae_vit_mini_patch4", "--output_dir", tmp_path / "pretrain"]]
    )
    assert "training: found 7 images; passed over 5 files (.txt 3, .heic 1, no ending 1)\n" in capsys.readouterr().out
    main_linprobe.main([str(f) for f in [*flags, "--model", "vit_mini_patch4", "--output_dir", tmp_path / "probe"]])
    said = capsys.readouterr().out
    assert found in said
    assert "validation: found 6 images of 2 classes; passed over 1 files (.jpg beside the class folders 1)\n" in said


@pytest.mark.parametrize("kind", ["circle", "nowhere", "locked"])
@pytest.mark.parametrize("place", ["train/class2", "train/class1/deeper", "train"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, kind, place):
    write_pictures(tmp_path, per_class=2)
    folder = tmp_path / place
    if place == "train":
        folder.rename(tmp_path / "moved")
    if kind == "locked":
        folder.mkdir(mode=0)
        if os.access(folder, os.R_OK):
            pytest.skip("nothing is locked for root")
    else:
        folder.symlink_to(folder.name if kind == "circle" else "gone")
    with pytest.raises(ValueError, match=rf"--data_path: .*{place} cannot be read \(.*; mend its permissions or link"):
        datasets.open_unlabelled("folder", str(tmp_path), 3)
    with pytest.raises(ValueError, match=r"cannot be read|no picture in .*train"):
        datasets.open_labelled("folder", str(tmp_path), "train", 3)


@pytest.mark.parametrize("names", ["Train Validation", "training test", "Train VAL", "images valid"])
def test_a_held_out_split_is_never_trained_on(tmp_path, names):
    for name in names.split():
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / "a.png")
    first, second = names.split()
    with pytest.raises(
        ValueError, match=f"holds the folder {second}, which is not to be trained on, but none named tr"
    ):
        datasets.open_unlabelled("folder", str(tmp_path), 3)
    assert len(datasets.open_unlabelled("folder", str(tmp_path / first), 3)) == 1
    (tmp_path / second).rename(tmp_path / "validity")
    assert len(datasets.open_unlabelled("folder", str(tmp_path), 3)) == 2


@pytest.mark.parametrize("main", [main_finetune.main, main_linprobe.main])
def test_one_class_is_refused_with_the_likely_reason(tmp_path, main, capsys):
    write_pictures(tmp_path / "data", per_class=2)
    for split in ("train", "val"):
        (tmp_path / "level" / split).mkdir(parents=True)
        (tmp_path / "data" / split).rename(tmp_path / "level" / split / "imagenet")
    (tmp_path / "level" / "train" / "logs").mkdir()  # a class without pictures is none
    flags = ["--data_path", tmp_path / "level", "--output_dir", tmp_path / "run", "--device", "cpu"]
    said = refusal(main, flags, capsys)
    assert "every picture to train on is of the class imagenet" in said
    assert "is there one level too many" in said
    data_files.write_tar(tmp_path / "s" / "train-0.tar", {"a.jpg": b"", "a.cls": b"3", "b.jpg": b"", "b.cls": b"3"})
    with pytest.raises(ValueError, match=r"0\.tar:a\.jpg: every picture to train on is of the class 3"):
        datasets.check_several_classes(datasets.open_labelled("wds", str(tmp_path / "s"), "train", 3))
