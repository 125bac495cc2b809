"""A loader worker is killed, shared memory is full, file descriptors run out: a checkpoint, one sentence, status 1."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
from faults import injected
from helpers import ROOT, environment
from runs import assert_same_run, content, flags, pretrain, torchrun

import engine_finetune
import main_linprobe
from util.training import checkpoint


def errors(said: str) -> list[str]:
    """The sentences on stderr, which holds no traceback."""
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


def broken(fault: dict, pictures, output, *launcher) -> str:
    """Pre-train with workers and a fault in the second step; return the one sentence."""
    given = flags(pictures, output, "--num_workers", 2)
    command = [*launcher, sys.executable, str(ROOT / "tests" / "faults.py"), *given]
    variables = environment(FAULTS=json.dumps([fault]))
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert result.returncode == 1, result.stderr
    (sentence,) = errors(result.stderr)
    assert 2 <= content(output)["step"] < 14
    return sentence


def test_a_run_that_loses_its_batches_can_continue(pictures, tmp_path):
    sentence = broken({"kind": "few_files", "forward": 1}, pictures, tmp_path / "parts")
    assert "too few file descriptors" in sentence
    assert "--num_workers" in sentence
    pretrain(pictures, tmp_path / "whole")
    pretrain(pictures, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_full_shared_memory(pictures, tmp_path):
    own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        (pytest.fail if os.environ.get("REQUIRE_TMPFS") else pytest.skip)("no file system of its own for /dev/shm")
    sentence = broken({"kind": "fill", "forward": 1, "path": "/dev/shm/filler"}, pictures, tmp_path, *own)
    assert "/dev/shm" in sentence or "a loader worker" in sentence


def test_a_worker_of_one_of_two_processes_is_lost(pictures, tmp_path):
    faults = [{"kind": "kill_worker", "forward": 1, "rank": 1}]
    result = torchrun(pictures, tmp_path, faults, "--num_workers", 1, "--batch_size", 2)
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, result.stderr
    assert said[0].startswith("error: rank 1 in epoch 0, step ")
    assert "a loader worker was killed" in said[0]
    assert "--num_workers" in said[0]
    assert content(tmp_path)["step"] >= 2


def test_a_worker_is_lost_during_evaluation(pictures, tmp_path, capsys, monkeypatch):
    """After an epoch, which is saved, and with --eval, which has nothing to save."""
    task = ["--data_path", pictures, "--model", "vit_tiny_patch4", "--input_size", 16, "--batch_size", 2, "--epochs", 1]
    task = [str(value) for value in [*task, "--warmup_epochs", 0, "--num_workers", 1, "--output_dir", tmp_path]]
    evaluate = engine_finetune.evaluate

    def evaluate_and_lose(model, batches, *arguments):
        def losing():
            for batch in batches:
                for worker in multiprocessing.active_children():
                    worker.kill()
                yield batch

        return evaluate(model, losing(), *arguments)

    monkeypatch.setattr(engine_finetune, "evaluate", evaluate_and_lose)
    for more in ([], ["--eval", "--resume", str(tmp_path / checkpoint.LAST)]):
        with pytest.raises(SystemExit) as stop:
            main_linprobe.main([*task, *more])
        assert stop.value.code == 1
        (sentence,) = errors(capsys.readouterr().err)
        assert "a loader worker was killed" in sentence
        found = content(tmp_path)
        assert (found["epoch"], found["step"]) == (-1, found["steps_per_epoch"])


def test_weights_that_overflow_are_not_saved(pictures, tmp_path, capsys):
    pretrain(pictures, tmp_path, "--epochs", 1)
    before = (tmp_path / checkpoint.LAST).read_bytes()
    with injected([{"kind": "overflow", "forward": 6}]), pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path)
    assert stop.value.code == 1
    (sentence,) = errors(capsys.readouterr().err)
    assert "is not finite; the checkpoint before it stays" in sentence
    assert (tmp_path / checkpoint.LAST).read_bytes() == before
