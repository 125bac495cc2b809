"""Data that does not come: named, and no obstacle to a signal."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, environment, log_lines
from runs import assert_same_run, pretrain, stopped

import main_linprobe
from util.distributed import signals
from util.training import checkpoint


@pytest.mark.parametrize("more", [[], ["--eval"]], ids=["training", "eval"])
def test_a_signal_ends_the_waiting_for_validation_pictures(pictures, tmp_path, more):
    """A pipe that nobody writes to stands for a file server that does not answer."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    task = ["--data_path", folder, "--model", "vit_tiny_patch4", "--input_size", 16, "--batch_size", 4, "--epochs", 1]
    task = [str(value) for value in [*task, "--warmup_epochs", 0, "--num_workers", 1, "--output_dir", tmp_path / "out"]]
    if more:
        main_linprobe.main(task)
    first = folder / "val" / "class0" / "0.jpg"
    first.unlink()
    os.mkfifo(first)
    writer = os.open(first, os.O_RDWR)
    resume = ["--resume", str(tmp_path / "out" / checkpoint.LAST)] if more else []
    command = [sys.executable, str(ROOT / "main_linprobe.py"), *task, *more, *resume]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    wait_for_reader(first, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == (128 + signal.SIGTERM if more else signals.PREEMPTED)


def wait_for_reader(pipe, process) -> None:
    """Until another process than this one has opened `pipe`, and so waits for what never comes."""
    end = time.monotonic() + 120
    while not any(held_by(path, pipe) for path in Path("/proc").glob("[0-9]*/fd") if path.parts[2] != str(os.getpid())):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)


def held_by(descriptors, path) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(link) == str(path) for link in descriptors.iterdir())
    return False


def test_validation_pictures_that_never_come_end_the_run(pictures, tmp_path, capfd):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    first = folder / "val" / "class0" / "0.jpg"
    first.unlink()
    os.mkfifo(first)
    task = ["--data_path", folder, "--model", "vit_tiny_patch4", "--input_size", 16, "--batch_size", 4, "--epochs", 1]
    task += ["--warmup_epochs", 0, "--num_workers", 1, "--output_dir", tmp_path / "out", "--dist_timeout", 5]
    with pytest.raises(SystemExit) as stop:
        main_linprobe.main([str(value) for value in task])
    assert stop.value.code == 1
    assert "waited 5 s for data, for batch 0 of" in capfd.readouterr().err


def test_a_stalled_loader_is_named_and_can_be_stopped(tmp_path, capfd):
    (tmp_path / "data").mkdir()
    for index in range(8):
        np.save(tmp_path / "data" / f"{index}.npy", np.zeros((20, 24, 3), dtype=np.uint8))
    (tmp_path / "slow_loader.py").write_text(
        "import time, numpy\n"
        "def load(path):\n"
        "    time.sleep(60 if str(path).endswith('5.npy') else 0)\n"
        "    return numpy.load(path)\n"
        "load.extensions = ('.npy',)\n"
    )
    more = ["--loader", "slow_loader:load", "--num_workers", 1, "--batch_size", 2, "--dist_timeout", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        start = time.monotonic()
        with pytest.raises(SystemExit) as stop:
            pretrain(tmp_path / "data", tmp_path / "out", *more)
    assert stop.value.code == 1
    assert time.monotonic() - start < 50
    error = capfd.readouterr().err
    assert "waited 3 s for data, for worker 0, which loads" in error
    assert "5.npy" in error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_a_picture_is_read_is_no_bad_picture(tmp_path, workers):
    """Readers catch every exception of a decoder, but not this one."""
    (tmp_path / "data").mkdir()
    for index in range(8):
        np.save(tmp_path / "data" / f"{index}.npy", np.full((20, 24, 3), 9 * index, dtype=np.uint8))
    (tmp_path / f"signalling_loader_{workers}.py").write_text(
        "import os, pathlib, signal, time, numpy\n"
        "mark = pathlib.Path(__file__).with_name('struck')\n"
        "def load(path):\n"
        "    if str(path).endswith('5.npy') and not mark.exists():\n"
        "        mark.write_text('')\n"
        f"        os.kill({os.getpid()}, signal.SIGTERM)\n"
        "        time.sleep(2)\n"
        "    return numpy.load(path)\n"
        "load.extensions = ('.npy',)\n"
    )
    more = ["--loader", f"signalling_loader_{workers}:load", "--num_workers", workers, "--batch_size", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        stopped(tmp_path / "data", tmp_path / "parts", *more)
        pretrain(tmp_path / "data", tmp_path / "parts", *more)
        pretrain(tmp_path / "data", tmp_path / "whole", *more)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert log_lines(tmp_path / "parts")[0]["train_bad_images"] == 0
