"""Several processes: one is killed, stands still, meets NaN, is alone; two runs in one folder."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from faults import injected
from helpers import environment, log_lines, write_pictures
from runs import assert_same_run, content, flags, pretrain, stopped, torchrun

from util.data import datasets
from util.training import lock


def test_twenty_in_a_row_on_one_of_two_processes_end_both(pictures, tmp_path, monkeypatch):
    """Only the first one is shown at W&B."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    faults = [{"kind": "nan", "forward": list(range(3, 23)), "rank": 1}]
    result = torchrun(pictures, tmp_path, faults, "--batch_size", 2, "--epochs", 4, "--wandb", "p")
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert result.returncode == 1
    assert "error: 11 steps in a row were skipped, more than --max_skipped_steps 10" in result.stderr
    assert "the loss of rank 1 was not finite on" in result.stderr
    assert "the loss of rank 0" not in result.stderr
    found = content(tmp_path)
    assert found["step"] == 14
    assert all(value.isfinite().all() for value in found["model"].values())
    assert int(found["optimizer"]["state"][0]["step"]) == 3


def test_processes_that_find_different_checkpoints_do_not_train(pictures, tmp_path):
    pretrain(pictures, tmp_path / "0", "--effective_batch_size", 4, "--epochs", 1)
    script = tmp_path / "local_folders.py"
    script.write_text(
        "import os, sys, main_pretrain\n"
        f"main_pretrain.main([*sys.argv[1:], '--output_dir', r'{tmp_path}/' + os.environ['RANK']])\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    given = flags(pictures, tmp_path / "1", "--effective_batch_size", 4, "--batch_size", 2)
    result = subprocess.run([*map(str, launcher), *given], capture_output=True, text=True, env=environment())
    assert result.returncode != 0
    assert "the processes found different checkpoints there, of step 0 and of step 7" in result.stderr
    assert content(tmp_path / "0")["step"] == 7


def test_processes_that_find_different_images_do_not_train(tmp_path):
    """Each machine reads a copy of its own, as from a local disk. One lacks a picture to validate on."""
    for rank in range(2):
        write_pictures(tmp_path / str(rank) / "images")
    (tmp_path / "1/images/val/class0/0.jpg").unlink()
    script = tmp_path / "local_folders.py"
    script.write_text(
        "import os, sys, main_finetune\n"
        f"os.chdir(r'{tmp_path}/' + os.environ['RANK'])\n"
        "main_finetune.main(sys.argv[1:])\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    given = ["--data_path", "images", "--model", "vit_mini_patch4", "--batch_size", 2, "--output_dir", tmp_path / "run"]
    result = subprocess.run([*map(str, [*launcher, *given])], capture_output=True, text=True, env=environment())
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1, result.stderr
    said = f"error: --data_path images: {socket.gethostname()} has 11 validation images and another process 12;"
    assert said in result.stderr
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.parametrize("others", ["train/class1/6.jpg", "train/class0/9.jpg"])
def test_images_of_other_labels_or_names_are_different_images(tmp_path, others):
    write_pictures(tmp_path)
    before = datasets.open_labelled("folder", str(tmp_path), "train", 3)
    (tmp_path / "train/class0/0.jpg").rename(tmp_path / others)
    after = datasets.open_labelled("folder", str(tmp_path), "train", 3)
    assert len(after) == len(before)
    assert after.fingerprint != before.fingerprint


def test_a_killed_launcher_a_killed_worker_and_nan_on_one_rank_change_nothing(pictures, tmp_path):
    """Two processes. Workers whose launcher is killed write their checkpoint; a killed one is restarted by torchrun.

    Rank 1 sees NaN in one step, which is everyone's.
    """
    more = ["--masking", "sbam_amr", "--batch_size", 2]
    nan = {"kind": "nan", "forward": 1, "rank": 1}
    # Python sends SIGTERM to loader workers when it ends, and waits; they ignore it while their process trains.
    whole = torchrun(pictures, tmp_path / "whole", [nan], *more, "--num_workers", 2)
    assert whole.returncode == 0, whole.stderr
    orphan = {"kind": "orphan", "forward": 5, "rank": 1}
    assert torchrun(pictures, tmp_path / "parts", [nan, orphan], *more).returncode == -signal.SIGKILL
    # The same command at once waits for the workers that write their checkpoint.
    kill = {"kind": "SIGKILL", "forward": 3, "rank": 1, "once": str(tmp_path / "killed")}
    more += ["--save_every_minutes", 0]
    again = torchrun(pictures, tmp_path / "parts", [kill], *more, launcher=["--max-restarts=3"])
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "killed").exists()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert log_lines(tmp_path / "whole")[0]["train_skipped_steps"] == 1
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "parts") not in listed


def test_two_runs_do_not_write_to_one_folder(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WAIT_S", 0.5)
    script = "import sys, time; from pathlib import Path; from util.training import lock; "
    script += "file = lock.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path)
    assert stop.value.code == 2
    assert f"--output_dir {tmp_path}: process {other.pid} on" in capsys.readouterr().err
    assert not (tmp_path / "log.txt").exists()
    other.kill()
    other.wait()
    assert len(pretrain(pictures, tmp_path)) == 2


def test_the_number_of_processes_may_change(pictures, tmp_path):
    """1, then 2 after an epoch, then 1 within one: the same global batches and masks, so the same losses."""
    more, parts = ["--masking", "sbam_amr", "--effective_batch_size", 4, "--epochs", 3], tmp_path / "parts"
    whole = pretrain(pictures, tmp_path / "whole", *more)
    with injected([{"kind": "SIGTERM", "forward": 6}]):
        stopped(pictures, parts, *more)
    assert content(parts)["step"] == 7
    stop = [{"kind": "SIGTERM", "forward": 4, "rank": 1}]
    assert torchrun(pictures, parts, stop, *more, "--batch_size", 2).returncode != 0
    assert content(parts)["step"] == 12
    found = pretrain(pictures, parts, *more)
    for name in ("loss", "kept_tokens_min", "kept_tokens_max"):
        values = [[line[f"train_{name}"] for line in lines] for lines in (whole, found)]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-6, err_msg=name)
    assert len(list(parts.glob("events*"))) == 3  # one for each run, not for each process


def test_a_process_that_stands_still_is_named(pictures, tmp_path):
    """And killed by the other: torchrun need not wait 30 seconds for it to obey SIGTERM.

    In the next test rank 0 names another.
    """
    faults = [{"kind": "SIGSTOP", "forward": 2, "rank": 0, "once": str(tmp_path / "struck")}]
    result = torchrun(pictures, tmp_path, faults, "--batch_size", 2, "--dist_timeout", 10)
    assert result.returncode != 0
    said = "rank 1 could not reach all other processes within --dist_timeout: rank 0 did not answer"
    assert said in result.stderr
    assert "forcefully exiting" not in result.stderr


def test_one_that_is_late_is_not_taken_for_one_that_stands_still(tmp_path):
    """Rank 1 comes 8 seconds after rank 0, whose --dist_timeout is over first; only rank 2 never comes."""
    script = tmp_path / "late.py"
    script.write_text(
        "import os, signal, time\n"
        "from util.distributed import agreement, world\n"
        "world.init('cpu', 12)\n"
        "agreed = agreement.Agreement(12)\n"
        "assert agreed.maximum(world.rank()) == [2]\n"
        "if world.rank() == 1: time.sleep(8)\n"
        "if world.rank() == 2: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "try: agreed.maximum(0)\n"
        "except RuntimeError as error: agreed.explain(error)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert result.returncode != 0
    assert "rank 0 could not reach all other processes within --dist_timeout: rank 2 did not answer (" in result.stderr
    assert "forcefully exiting" not in result.stderr
