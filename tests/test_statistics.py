"""Mean and deviation of a data set's channels, as scripts/prepare_data.py --stats prints them."""

from __future__ import annotations

import multiprocessing
import os
import signal

import data_files
import numpy as np
import pytest
from PIL import Image

from scripts import prepare_data


def run(*arguments):
    """Run the script with one worker."""
    prepare_data.main([*map(str, arguments), "--stats", "--workers", "1"])


def test_statistics(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "grey").mkdir()
    values = rng.integers(0, 256, (5, 30, 40), dtype=np.uint8)
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / "grey" / f"{number}.png")
    run(tmp_path / "grey", "--in_chans", 1)
    expected = f"--mean {values.mean() / 255:.4f} --std {values.std() / 255:.4f}"
    assert capsys.readouterr().out.strip() == expected
    place = data_files.write_npy(tmp_path / "deep", 4, "uint16")
    run(place, "--in_chans", 4, "--loader", "util.loaders:npy")
    words = capsys.readouterr().out.split()
    deep = np.stack([np.load(path) for path in place.glob("*.npy")]) / 65535
    assert words[:1] + words[5:6] == ["--mean", "--std"]
    np.testing.assert_allclose([float(word) for word in words[1:5]], deep.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose([float(word) for word in words[6:]], deep.std((0, 1, 2)), atol=1e-4)


def test_statistics_read_with_the_loader_below_classes_too(tmp_path, capsys):
    for name in "ab":
        data_files.write_npy(tmp_path / name, 4, "float32", count=3)
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "train" / name)
    Image.new("RGB", (30, 40)).save(tmp_path / "train" / "a" / "beside.png")
    run(tmp_path, "--in_chans", 4, "--loader", "util.loaders:npy")
    words = capsys.readouterr().out.split()
    values = np.stack([np.load(path) for path in tmp_path.rglob("*.npy")])
    np.testing.assert_allclose([float(word) for word in words[1:5]], values.mean((0, 1, 2)), atol=1e-4)


def dies_in_a_worker(path):
    """Load nothing; for --loader."""
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.zeros((2, 2, 3), dtype=np.uint8)


def test_a_killed_worker_is_one_sentence(tmp_path):
    Image.new("RGB", (30, 40)).save(tmp_path / "0.png")
    with pytest.raises(SystemExit, match="a worker was killed, perhaps for the memory that it took; choose fewer"):
        run(tmp_path, "--loader", f"{__name__}:dies_in_a_worker")
