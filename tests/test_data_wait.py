"""The advice about a slow loader: given where the loader is slow, and not because the workers had to start."""

from __future__ import annotations

import os
import time

import data_files
import numpy as np
import pytest

import main_pretrain
from util import loaders

_started: set[int] = set()  # processes


def quick(path: str) -> np.ndarray:
    """An array, after the second that a worker takes to start."""
    if os.getpid() not in _started:
        _started.add(os.getpid())
        time.sleep(1)
    return loaders.npy(path)


def slow(path: str) -> np.ndarray:
    """An array, from a slow disk."""
    time.sleep(0.3)
    return loaders.npy(path)


quick.extensions = slow.extensions = (".npy",)


@pytest.mark.parametrize(("loader", "advised"), [("quick", False), ("slow", True)])
def test_who_is_told_that_the_loader_is_the_bottleneck(tmp_path, loader, advised, capfd):
    place = data_files.write_npy(tmp_path / "arrays", 3, "uint8", count=24)
    flags = ["--data_path", place, "--loader", f"test_data_wait:{loader}", "--output_dir", tmp_path / "run"]
    flags += ["--model", "mae_vit_mini_patch4", "--input_size", 64, "--batch_size", 4, "--epochs", 1, "--device", "cpu"]
    flags += ["--num_workers", 1, "--print_freq", 2, "--warmup_epochs", 0]
    main_pretrain.main([str(flag) for flag in flags])
    said = "".join(capfd.readouterr())
    assert ("the loader is the bottleneck" in said) == advised, said
