"""Data sets of other libraries: columns, splits and labels as they were written, or a sentence that says why not."""

from __future__ import annotations

import hashlib
import struct

import data_files
import numpy as np
import pytest
from helpers import write_pictures
from torchvision.datasets import Places365

from util.data import datasets


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return data_files.jpegs(write_pictures(tmp_path_factory.mktemp("pictures"), per_class=3))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def table(samples, column="image", **labels):
    """A Hugging Face table of the pictures, in a column of this name."""
    import datasets as hugging_face

    rows = {column: [{"bytes": data, "path": None} for data, _ in samples]} | labels
    return hugging_face.Dataset.from_dict(rows).cast_column(column, hugging_face.Image(decode=False))


def parquet(folder, **splits):
    folder.mkdir()
    for name, rows in splits.items():
        rows.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
    return f"hfds/{folder}", str(folder.parent / "cache")


@pytest.mark.parametrize("column", ["image", "img", "jpg", "png"])
def test_the_column_of_the_pictures(samples, tmp_path, column):
    name, cache = parquet(tmp_path / "rows", train=table(samples, column, label=[label for _, label in samples]))
    images = datasets.open_labelled(name, cache, "train", 3)
    assert [images.source.read(index) for index in range(6)] == [data for data, _ in samples]
    assert list(images.labels) == [0, 0, 0, 1, 1, 1]


def test_without_such_a_column_the_columns_are_named(samples, tmp_path):
    name, cache = parquet(tmp_path / "rows", train=table(samples, "photo"))
    with pytest.raises(ValueError, match=r"no column named image, img, jpg or png in .*, only \['photo'\]"):
        datasets.open_unlabelled(name, cache, 3)


@pytest.mark.parametrize(("values", "held"), [([1] * 6, r"Value\('int64'\)"), ([], r"\w+\(.*Image\(")])
def test_a_column_that_holds_no_pictures_is_named(samples, tmp_path, values, held):
    import datasets as hugging_face

    rows = table(samples)
    if values:
        rows = hugging_face.Dataset.from_dict({"image": values})
    else:
        pairs = {"image": [[row["image"]] * 2 for row in rows]}
        features = hugging_face.Features(image=hugging_face.Sequence(hugging_face.Image()))
        rows = hugging_face.Dataset.from_dict(pairs, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=rf"the column image of .*saved holds {held}.*, not one picture in each row"):
        datasets.open_unlabelled("hfds", str(tmp_path / "saved"), 3)


def test_a_single_saved_table_is_no_validation_set(samples, tmp_path):
    table(samples, label=[0, 1] * 3).save_to_disk(str(tmp_path / "saved"))
    assert len(datasets.open_labelled("hfds", str(tmp_path / "saved"), "train", 3)) == 6
    with pytest.raises(ValueError, match=r"has no split to take for val .it is a single data set, which is the split"):
        datasets.open_labelled("hfds", str(tmp_path / "saved"), "val", 3)


def test_a_table_saved_for_another_library_is_read_alike(samples, tmp_path):
    rows = table(samples, label=[label for _, label in samples]).with_format("numpy")
    rows.save_to_disk(str(tmp_path / "saved"))
    images = datasets.open_labelled("hfds", str(tmp_path / "saved"), "train", 3)
    assert list(images.labels) == [0, 0, 0, 1, 1, 1]
    assert images.source.read(3) == samples[3][0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            ["cat", "dog"] * 3,
            "'cat', which is no class number; make it one with class_encode_column('label') of the lib",
        ),
        ([0, None] * 3, "None, which is no class number"),
        ([[0, 1]] * 6, "[0, 1], which is no class number"),
        ([0.0] * 6, "0.0, which is no class number"),
        ([0, -1] * 3, "-1, which is no class number"),
        ([0, 2**33] * 3, "8589934592, which is no class number"),
        ([0, 2**31 - 1] * 3, "a class is a number from 0 to 999999"),
    ],
    ids=str,
)
def test_labels_that_are_no_class_numbers_do_not_keep_from_pretraining(samples, tmp_path, values, said):
    name, cache = parquet(tmp_path / "rows", train=table(samples, label=values))
    images = datasets.open_unlabelled(name, cache, 3)
    assert list(images.labels) == [value if isinstance(value, int) and value < 2**31 else -1 for value in values]
    with pytest.raises(ValueError, match=r"train, row [01]: this picture has no class") as error:
        datasets.open_labelled(name, cache, "train", 3)
    assert said in str(error.value)


def test_another_name_of_the_labels_column_is_asked_for(samples, tmp_path):
    name, cache = parquet(tmp_path / "rows", train=table(samples, category=[0, 1] * 3))
    assert list(datasets.open_unlabelled(name, cache, 3).labels) == [-1] * 6
    known = "label, labels, fine_label, cls"
    with pytest.raises(
        ValueError, match=rf"no column is named {known}, only image, category; rename the one of the cla"
    ):
        datasets.open_labelled(name, cache, "train", 3)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "[]"),
        ("state.json", '{"_data_files": 7}'),
        ("state.json", '{"_data_files": [{"filename": 3}]}'),
        ("dataset_info.json", "[1]"),
        ("dataset_info.json", '{"features": {"label": 3}}'),
        ("dataset_info.json", '{"features": {"label": {"_type": "os:system", "names": ["trap"]}}}'),
        ("dataset_info.json", "[" * 100000),
    ],
)
def test_hugging_face_metadata_of_a_wrong_type_is_named(samples, tmp_path, file, content):
    table(samples, label=[0, 1] * 3).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / file).write_text(content)
    with pytest.raises(ValueError, match=r"--dataset hfds: .*saved has no split to take for train"):
        datasets.open_labelled("hfds", str(tmp_path / "saved"), "train", 3)


def test_places365_is_a_list_of_files(samples, tmp_path, monkeypatch):
    lists = {"_CATEGORIES_META": ("categories.txt", "/a/abbey 0\n/b/barn 1\n"), "train": ("train.txt", "")}
    for number, (data, label) in enumerate(samples):
        path = tmp_path / "data_large_standard" / "ab"[label] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        lists["train"] = ("train.txt", lists["train"][1] + f"/{'ab'[label]}/{number}.jpg {label}\n")
    known = {}  # torchvision compares with the checksums of the published lists
    for kind, (name, text) in lists.items():
        (tmp_path / name).write_text(text)
        known[kind] = (name, hashlib.md5(text.encode()).hexdigest())
    monkeypatch.setattr(Places365, "_CATEGORIES_META", known["_CATEGORIES_META"])
    monkeypatch.setitem(Places365._FILE_LIST_META, "train-standard", known["train"])
    images = datasets.open_labelled("torch/places365", str(tmp_path), "train", 3)
    assert images.classes == ("/a/abbey", "/b/barn")
    assert list(images.labels) == [label for _, label in samples]
    assert [images.source.read(index) for index in range(6)] == [data for data, _ in samples]


def test_several_labels_for_each_picture_are_refused(tmp_path):
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    pictures = np.zeros((5, 28, 28), dtype=np.uint8)
    (raw / "qmnist-train-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 5, 28, 28) + pictures.tobytes())
    labels = np.zeros((5, 8), dtype=">i4")
    (raw / "qmnist-train-labels-idx2-int").write_bytes(struct.pack(">3i", 3074, 5, 8) + labels.tobytes())
    with pytest.raises(ValueError, match="torch/qmnist: has 8 labels for each picture, not one class"):
        datasets.open_unlabelled("torch/qmnist", str(tmp_path), 1)
