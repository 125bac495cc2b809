"""The launcher, without SLURM: submitit's local executor starts real processes."""

from __future__ import annotations

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
