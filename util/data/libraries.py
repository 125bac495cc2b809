"""Data sets of other libraries: `torch/...` (torchvision, opened by timm), `hfds/...` (Hugging Face datasets)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from timm.data import create_dataset

from util.data.decode import Content
from util.data.sources import Arrays, Files, Source


class Opened(NamedTuple):
    """Images, their classes (-1: none), the names of the classes, and why there may be none."""

    source: Source
    labels: np.ndarray
    classes: tuple[str, ...]
    why_unlabelled: str = ""


_LABELS = ("label", "labels", "fine_label", "cls")


def open_torchvision(name: str, data_path: str | None, split: str) -> Opened:
    """Open `torch/cifar10` and the like. ValueError if torchvision does not know it or does not find its files."""
    title, root = name.partition("/")[2], Path(data_path or "").absolute()
    try:
        data = create_dataset(name, root=str(root), split="train" if split == "train" else "validation")
    except (RuntimeError, AssertionError, FileNotFoundError) as error:
        raise ValueError(
            f"--dataset {name}: torchvision does not open it from --data_path {data_path} ({_sentence(error)}); "
            "its classes take download=True"
        ) from error
    samples = getattr(data, "samples", None) or getattr(data, "imgs", None)
    if samples:
        paths, labels = zip(*samples, strict=True)
        source: Source = Files(paths)
    elif hasattr(data, "data"):
        source, labels = Arrays(np.asarray(data.data), f"{title} {split}"), np.asarray(data.targets).tolist()
    else:
        raise ValueError(f"--dataset {name}: torchvision keeps it neither as files nor as an array")
    if np.ndim(labels) != 1:
        raise ValueError(
            f"--dataset {name}: has {np.shape(labels)[1]} labels for each picture, not one class; take another data set"
        )
    classes = [entry if isinstance(entry, str) else entry[0] for entry in getattr(data, "classes", ())]
    return Opened(source, np.asarray(labels, dtype=np.int64), tuple(classes))


class _Rows:
    """A column of images in a Hugging Face data set."""

    def __init__(self, data, key: str, title: str):
        self.data, self.key, self.title = data.select_columns([key]), key, title

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> Content:
        item = self.data[index][self.key]
        if item is None:
            raise OSError("the row is empty")
        return item["bytes"] if item["bytes"] else Path(item["path"]).read_bytes()

    def name(self, index: int) -> str:
        item = self.data[index][self.key]
        return f"{self.title}, row {index}" + (f" ({item['path']})" if item and item["path"] else "")


def open_hugging_face(name: str, data_path: str | None, split: str) -> Opened:
    """Open `hfds/...`: a name on the hub, or a folder of Parquet or Arrow files; for `hfds` alone, `data_path`.

    Raises:
        ValueError: it cannot be opened, or has no such split or no column of images.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"--dataset {name}: needs another package: pip install datasets") from error
    place = name.partition("/")[2] or data_path
    if not place:
        raise ValueError(f"--dataset {name}: name the folder with --data_path, or the data set as hfds/NAME")
    cache = data_path if name.partition("/")[2] else None
    problems = []
    for part in ("train",) if split == "train" else ("validation", "val", "valid", "test"):
        try:
            data = _load_split(datasets, place, cache, part)
            break
        except Exception as error:  # the library raises anything where its files hold values of another type
            problems.append(_sentence(error))
    else:
        raise ValueError(f"--dataset {name}: {place} has no split to take for {split} ({problems[0]})")
    key = next((key for key in ("image", "img", "jpg", "png") if key in data.column_names), None)
    if key is None:
        raise ValueError(
            f"--dataset {name}: no column named image, img, jpg or png in {place}, only {data.column_names}; rename it"
        )
    try:
        data = data.cast_column(key, datasets.Image(decode=False))
    except Exception as error:  # the library raises many
        raise ValueError(
            f"--dataset {name}: the column {key} of {place} holds {data.features[key]!r:.80}, not one picture in each "
            "row; give it another name, and the column of the pictures this one"
        ) from error
    labels, classes, why = _labels_of(data)
    return Opened(_Rows(data, key, f"{place} {part}"), labels, classes, why)


def _labels_of(data) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Return the class of each row, -1 where it has none, the names of the classes, and why some rows have none."""
    column = next((name for name in _LABELS if name in data.column_names), None)
    if column is None:
        known, found = ", ".join(_LABELS), ", ".join(data.column_names)
        why = f"no column is named {known}, only {found}; rename the one of the classes"
        return np.full(len(data), -1), (), why
    values = data[column][:]
    numbers = [value if isinstance(value, int) and 0 <= value < 2**31 else -1 for value in values]
    wrong = [value for value, number in zip(values, numbers, strict=True) if number < 0][:1]
    why = f"the column {column} holds {wrong[0]!r:.50}, which is no class number" if wrong else ""
    if wrong and isinstance(wrong[0], str):
        why += f"; make it one with class_encode_column({column!r}) of the library datasets"
    names = getattr(data.features[column], "names", None) or ()
    return np.array(numbers, dtype=np.int64), tuple(names), why


def _load_split(datasets, place: str, cache: str | None, split: str):
    """Load the split as a table of plain values. Folders that save_to_disk wrote are not for load_dataset.

    timm is not asked: where its column is missing, it adds one without images.
    """
    if (Path(place) / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(place)[split]
    elif (Path(place) / "state.json").is_file():
        if split != "train":
            raise ValueError("it is a single data set, which is the split train; save a DatasetDict with more")
        data = datasets.load_from_disk(place)
    else:
        data = datasets.load_dataset(place, split=split, cache_dir=cache)
    return data.with_format(None)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
