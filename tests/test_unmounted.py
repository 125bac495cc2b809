"""A disk that is unmounted during a run: the run ends at the next line of the log, with a sentence and status 2."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from helpers import ROOT, environment, write_pictures


def test_an_unmounted_disk_is_not_trained_on(tmp_path):
    folder = write_pictures(tmp_path / "disk", classes=2, per_class=150)
    flags = ["--data_path", folder, "--model", "mae_vit_mini_patch4", "--input_size", 16, "--batch_size", 10]
    flags += ["--epochs", 10000, "--num_workers", 2, "--device", "cpu", "--print_freq", 5]
    flags += ["--max_bad_images", 0.01, "--output_dir", tmp_path / "run"]
    command = [sys.executable, str(ROOT / "main_pretrain.py"), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        deadline = time.time() + 120
        while not (tmp_path / "run" / "log.txt").is_file() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        os.rename(folder / "train", folder / "gone")
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, said
    assert "of 300 pictures cannot be decoded, more than --max_bad_images 0.01 allows" in said
    assert "No such file or directory" in said
    assert "Traceback" not in said
