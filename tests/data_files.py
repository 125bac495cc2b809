"""Real files of every format that pre-training reads, made by the tests: 12 pictures, 6 of each of two classes."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
from helpers import write_pictures
from PIL import Image

CLASSES = 2
PER_CLASS = 6


def jpegs(folder: Path) -> list[tuple[bytes, int]]:
    """(file's content, class) of the training pictures that `write_pictures` put below `folder`."""
    paths = sorted((folder / "train").rglob("*.jpg"))
    return [(path.read_bytes(), int(path.parent.name[-1])) for path in paths]


def write_flat(source: Path, folder: Path) -> Path:
    """All pictures in one folder, without classes."""
    folder.mkdir()
    for number, (data, _) in enumerate(jpegs(source)):
        (folder / f"{number}.jpg").write_bytes(data)
    return folder


def write_shards(source: Path, folder: Path, shards: int = 3, labels: bool = True) -> Path:
    """WebDataset shards train-000.tar and so on, and one val-000.tar, with .jpg and .cls members."""
    folder.mkdir()
    samples = jpegs(source)
    for split, count in (("train", shards), ("val", 1)):
        for shard in range(count):
            with tarfile.open(folder / f"{split}-{shard:03}.tar", "w") as tar:
                for number, (data, label) in list(enumerate(samples))[shard::count]:
                    add_member(tar, f"{number:05}.jpg", data)
                    if labels:
                        add_member(tar, f"{number:05}.cls", str(label).encode())
    return folder


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Put a file into an open tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """One shard with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in members.items():
            add_member(tar, name, data)
    return path


def write_parquet(source: Path, folder: Path) -> Path:
    """Parquet files of a Hugging Face data set, train and validation."""
    import datasets

    samples = jpegs(source)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["no", "yes"]))
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = {
            "image": [{"bytes": data, "path": f"{number}.jpg"} for number, (data, _) in enumerate(samples)],
            "label": [label for _, label in samples],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


def write_arrow(source: Path, folder: Path) -> Path:
    """What save_to_disk leaves: Arrow files."""
    import datasets

    rows = {"image": [{"bytes": data, "path": None} for data, _ in jpegs(source)]}
    features = datasets.Features(image=datasets.Image())
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(str(folder))
    return folder


def write_cifar10(folder: Path, per_batch: int = 3) -> Path:
    """CIFAR-10's pickled batches, with pictures of noise; torchvision's checksums do not hold for them."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (per_batch, 3 * 32 * 32), dtype=np.uint8)
        content = {"data": data, "labels": [n % 10 for n in range(per_batch)]}
        (base / name).write_bytes(pickle.dumps(content))
    names = {"label_names": [f"class{n}" for n in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(names))
    return folder


def write_mnist(folder: Path, count: int = 12) -> Path:
    """MNIST's four files."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        pictures = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pictures.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return folder


def write_npy(folder: Path, channels: int, dtype: str, count: int = 12) -> Path:
    """Arrays (H, W, C), not square."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.random((30, 40, channels))
        scale = {"uint8": 255, "uint16": 65535}.get(dtype, 1)
        np.save(folder / f"{number}.npy", (pixels * scale).astype(dtype))
    return folder


def write_16_bit_tiff(folder: Path, count: int = 12) -> Path:
    """Grey TIFFs of 16 bits."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16)).save(folder / f"{number}.tif")
    return folder


def with_an_empty_file(source: Path, folder: Path) -> Path:
    """A flat folder with a picture that cannot be decoded."""
    write_flat(source, folder)
    (folder / "3.jpg").write_bytes(b"")
    return folder


def all_sources(folder: Path) -> dict[str, list]:
    """Every source: its name, and the flags that pre-training takes to read it."""
    pictures = write_pictures(folder / "pictures", CLASSES, PER_CLASS)
    return {
        "folder": ["--data_path", pictures],
        "flat": ["--data_path", write_flat(pictures, folder / "flat")],
        "wds": ["--dataset", "wds", "--data_path", write_shards(pictures, folder / "shards")],
        "parquet": ["--dataset", f"hfds/{write_parquet(pictures, folder / 'parquet')}"],
        "arrow": ["--dataset", "hfds", "--data_path", write_arrow(pictures, folder / "arrow")],
        "cifar10": ["--dataset", "torch/cifar10", "--data_path", write_cifar10(folder / "cifar")],
        "mnist": ["--dataset", "torch/mnist", "--data_path", write_mnist(folder / "mnist"), "--in_chans", 1],
        "npy": [
            *("--data_path", write_npy(folder / "npy", 4, "uint16"), "--in_chans", 4),
            *("--loader", "util.loaders:npy", "--input_size", 16, 24),
        ],
        "tiff": ["--data_path", write_16_bit_tiff(folder / "tiff"), "--in_chans", 1],
        "few_bad": ["--data_path", with_an_empty_file(pictures, folder / "few_bad"), "--max_bad_images", 0.1],
        "digits": ["--dataset", "digits", "--in_chans", 1, "--batch_size", 360],
    }
