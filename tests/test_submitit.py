"""The launcher, without SLURM: submitit's local executor starts real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import ROOT, environment, log_lines

import submitit_launch

TASK = ["--config", str(ROOT / "configs/linprobe/digits.yaml"), "--epochs", "1", "--num_workers", "0"]


def test_a_local_job_of_two_processes(tmp_path):
    flags = ["linprobe", "--cluster", "local", "--ngpus", "2", "--cpus_per_task", "1", "--job_dir", tmp_path / "job"]
    command = [sys.executable, ROOT / "submitit_launch.py", *flags, *TASK]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
    assert log_lines(tmp_path / "job")[0]["test_images"] == 359
    assert "processes: 2" in (tmp_path / "job" / "config.yaml").read_text()


def test_the_files_own_output_dir_comes_before_the_job_dir(tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text((ROOT / "configs/pretrain/digits.yaml").read_text() + f"output_dir: {tmp_path / 'own'}\n")
    flags = ["--cluster", "local", "--ngpus", "1", "--cpus_per_task", "1", "--job_dir", str(tmp_path / "job")]
    submitit_launch.main(["pretrain", *flags, "--config", str(config), "--epochs", "0", "--num_workers", "0"])
    assert (tmp_path / "own" / "checkpoint-last.pth").exists()
    assert (tmp_path / "job" / "submitit").is_dir()


def test_a_mistake_is_found_before_anything_is_queued(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        submitit_launch.main(["pretrain", "--job_dir", str(tmp_path / "job"), "--mask_ratio", "2"])
    assert stop.value.code == 2
    assert "--mask_ratio 2.0" in capsys.readouterr().err
    assert not (tmp_path / "job").exists()


def test_the_effective_batch_is_checked_for_all_processes_of_the_job(tmp_path, capsys):
    flags = ["pretrain", "--nodes", "2", "--ngpus", "8", "--job_dir", str(tmp_path / "job")]
    with pytest.raises(SystemExit):
        submitit_launch.main([*flags, "--batch_size", "100", "--effective_batch_size", "4096"])
    assert "100 x 16 process(es)" in capsys.readouterr().err
    assert "WORLD_SIZE" not in os.environ
