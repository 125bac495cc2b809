"""The launcher, without SLURM."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
from helpers import ROOT, environment, log_lines

import submitit_launch
from util.distributed import signals, slurm, submission

TEXTS = ("job_name", *submission.TEXTS)


def test_a_local_job(pictures, tmp_path):
    flags = ["linprobe", "--cluster", "local", "--ngpus", "1", "--job_dir", tmp_path / "job", "--epochs", "1"]
    flags += ["--data_path", pictures, "--model", "vit_mini_patch4", "--batch_size", "4", "--num_workers", "0"]
    command = [sys.executable, ROOT / "submitit_launch.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
    assert log_lines(tmp_path / "job")[0]["test_images"] == 26


def test_the_files_own_output_dir_comes_before_the_job_dir(tmp_path, capsys):
    config = tmp_path / "own.yaml"
    config.write_text((ROOT / "configs/pretrain/digits.yaml").read_text() + f"output_dir: {tmp_path / 'own'}\n")
    flags = ["--cluster", "local", "--ngpus", "1", "--job_dir", str(tmp_path / "job"), "--dry_run"]
    submitit_launch.main(["pretrain", *flags, "--config", str(config)])
    command = f"{ROOT / 'main_pretrain.py'} --config {config}\n"
    assert capsys.readouterr().out == f"{sys.executable} {command}"
    submitit_launch.main(["pretrain", *flags, "--ngpus", "2", "--config", str(config)])
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    assert capsys.readouterr().out == f"{sys.executable} {torchrun} {command}"
    submitit_launch.main(["pretrain", *flags, "--dataset", "digits"])
    assert capsys.readouterr().out.endswith(f"--dataset digits --output_dir {tmp_path / 'job'}\n")


def test_a_dry_run_prints_what_sbatch_would_get(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM here
    flags = ["--nodes", "2", "--timeout", "4320", "--mem", "500", "--partition", "gpu", "--account", "a1", "--qos", "q"]
    flags += ["--constraint", "a100", "--comment", "two words", "--job_name", "vit", "--job_dir", str(tmp_path / "job")]
    submitit_launch.main(["pretrain", *flags, "--dry_run", "--dataset", "digits"])
    script = capsys.readouterr().out
    options = "nodes=2 ntasks-per-node=8 gpus-per-node=8 cpus-per-task=10 mem=500GB time=4320 partition=gpu account=a1"
    options += " qos=q constraint=a100 job-name=vit requeue open-mode=append signal=USR2@300"
    for option in [*options.split(), "comment='two words'"]:
        assert f"#SBATCH --{option}\n" in script
    assert "--kill-on-bad-exit=1 --wait=0 --cpus-per-task=10" in script
    assert "wckey" not in script
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--timeout", "soon"], "argument --timeout: invalid int value: 'soon'"),
        (["--cluster", "local", "--nodes", "2"], "--nodes 2: --cluster local is this machine alone"),
        (["--partion", "gpu"], "there is no setting 'partion'"),
        *((["--dry_run", f"--{name}", "a\nrm -r x"], f"--{name} 'a\\nrm -r x': has a control") for name in TEXTS),
        (["--dry_run", "--job_dir", "a\nb"], "has a control character, such as a line break; take it out"),
        (["--dry_run", "--comment", "a\x1b[31m"], "has a control character"),
        (["--cluster", "local", "--job_dir", "x/%j"], "%j is a SLURM job's number, which --cluster local has not"),
        (["--dataset", "digits"], "--cluster slurm: sbatch and srun not found on this machine"),
    ],
)
def test_a_mistake_is_one_sentence(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as stop:
        submitit_launch.main(["pretrain", "--job_dir", str(tmp_path / "job"), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


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


SAVING = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, save)
pathlib.Path("begun").touch()
time.sleep(60)
"""
# Runs a command as a job, and sends a signal to all its processes, as SLURM does.
AS_SLURM_DOES = """
import os, pathlib, sys, threading, time
sys.path.insert(0, sys.argv[1])
from util.distributed import submission
job = submission.Command(sys.argv[4:], sys.argv[1], float(sys.argv[3]))
def warn():
    while not pathlib.Path("begun").exists():
        time.sleep(0.05)
    os.killpg(0, int(sys.argv[2]))
threading.Thread(target=warn, daemon=True).start()
job()
"""


@pytest.mark.parametrize(
    ("number", "saving_s", "code", "again", "saved"),
    [
        (signal.SIGUSR2, 30, SAVING, ["requeue 7_1"], True),  # at the time limit
        (signal.SIGTERM, 30, SAVING, ["requeue 7_1"], True),  # preempted
        (
            signal.SIGUSR2,
            0.1,
            SAVING.replace("(1)", "(60)"),
            ["requeue 7_1"],
            False,
        ),  # a run that takes too long to save
        (signal.SIGUSR2, 30, "open('begun', 'w'); import time; time.sleep(60)", ["requeue 7_1"], False),  # it imports
        (0, 30, "import sys; sys.exit(3)", [], False),
        (0, 30, "", [], False),
    ],
)
def test_a_job_that_slurm_stops_waits_for_its_command_and_is_queued_again(
    scontrol, tmp_path, number, saving_s, code, again, saved
):
    asked = scontrol("JobState=RUNNING Reason=None")
    command = [sys.executable, "-c", AS_SLURM_DOES, str(ROOT), str(int(number)), str(saving_s)]
    variables = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    job = subprocess.Popen(
        [*command, sys.executable, "-c", code], env=os.environ | variables, cwd=tmp_path, start_new_session=True
    )
    status = job.wait(timeout=60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    assert status == (3 if "exit(3)" in code else 0)
    assert [line for line in asked.read_text().splitlines() if line.startswith("requeue")] == again
    assert (tmp_path / "saved").exists() == saved


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Let a stand-in describe a job, and note what it is asked in the file that is returned."""

    def stand_in(description):
        asked, command = tmp_path / "asked", tmp_path / "scontrol"
        asked.touch()
        command.write_text(f'#!/bin/bash\necho "$*" >>{asked}\n[[ $1 = show ]] && echo "{description}" || :\n')
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return asked

    return stand_in


@pytest.mark.parametrize(
    ("description", "ours"),
    [
        ("JobId=7 JobState=RUNNING Reason=None Restarts=0", True),  # preempted with notice, or a signal of the user's
        ("JobId=7 JobState=COMPLETING Reason=TimeLimit Restarts=0", True),  # the notice came too late
        ("JobId=7 JobState=COMPLETING Reason=None Restarts=0", False),  # scancel
        ("JobId=7 JobState=COMPLETING Reason=None Restarts=1", False),  # preempted without notice: SLURM queued it
        ("JobId=7 JobState=PENDING Reason=BeginTime Restarts=1", False),
    ],
)
def test_which_jobs_are_queued_again(description, ours, scontrol):
    """The descriptions are those of SLURM 22.05."""
    asked = scontrol(description)
    assert slurm.requeue("7")
    assert ("requeue 7" in asked.read_text().splitlines()) == ours


def test_a_port_that_is_taken_is_not_chosen():
    port = slurm.free_port("12.0")
    assert port == slurm.free_port("12.0") != slurm.free_port("12.1")
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        assert slurm.free_port("12.0") != port


def test_notice_of_the_time_limit():
    assert [slurm.warning_seconds(minutes) for minutes in (1, 10, 25, 4320)] == [12, 120, 300, 300]


def test_the_exit_status_is_that_of_a_main_that_can_continue():
    assert slurm.PREEMPTED == signals.PREEMPTED
