"""Jobs on a real SLURM are interrupted in every way a cluster has, and end as the uninterrupted run does."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, environment, log_lines
from slurm_lab import Cluster
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
import submitit_launch

EPOCHS, STEPS = 2, 6
TASK = ["--config", str(ROOT / "configs/pretrain/digits.yaml"), "--epochs", str(EPOCHS), "--warmup_epochs", "0"]
TASK += ["--effective_batch_size", "240", "--batch_size", "120", "--num_workers", "0", "--print_freq", "1"]
TASK += ["--masking", "slow_masking:Slow"]
TWO = ["--ngpus", "2", "--cpus_per_task", "1"]


@dataclass
class Submitted:
    """A job: its number, its cluster, its output folder, and what is to be done once it has trained a little."""

    number: str
    cluster: Cluster
    folder: Path
    trigger: Callable[[], object] | None = None

    @property
    def log(self) -> str:
        """What rank 0 printed, in all its starts."""
        (path,) = [*self.folder.glob(f"submitit/{self.number}_0_log.out"), *self.folder.glob("sbatch.out")] or [None]
        return path.read_text() if path else ""

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(epoch, step) of every line of the log."""
        return [
            (int(epoch), int(step)) for epoch, step in re.findall(r"^epoch (\d+) \[ *(\d+)/", self.log, re.MULTILINE)
        ]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Of the last checkpoint."""
        return torch.load(self.folder / "checkpoint-last.pth", weights_only=True)["model"]


def submit(cluster: Cluster, folder: Path, *flags: str, seconds: float = 0) -> Submitted:
    """Submit a job; every step of its first run takes `seconds` longer."""
    command = [*TWO, "--job_dir", str(folder), *TASK, "--masking_args", f"seconds={seconds}", *flags]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        for name, value in environment(SLURM_CONF=str(cluster.conf)).items():
            patch.setenv(name, value)
        submitit_launch.main(["pretrain", *command])
    return Submitted(re.search(r"job (\d+)", printed.getvalue())[1], cluster, folder)


def submit_as_users_do(cluster: Cluster, folder: Path, *flags: str) -> Submitted:
    """The same by MAE's script, where the project cannot be imported but from its own folder."""
    command = [sys.executable, ROOT / "submitit_pretrain.py", *TWO, "--job_dir", folder, *TASK, *flags]
    variables = environment(PYTHONPATH=str(ROOT / "tests"))  # for slow_masking
    said = cluster.run(*command, **variables)
    return Submitted(re.search(r"job (\d+)", said)[1], cluster, folder)


def submit_torchrun(cluster: Cluster, folder: Path, seconds: float) -> Submitted:
    """The same by scripts/slurm.sbatch."""
    folder.mkdir()
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    flags = ["-c2", "-t60", f"--chdir={ROOT}", "--constraint=calm", f"--output={folder / 'sbatch.out'}"]
    task = [*TASK, "--masking_args", f"seconds={seconds}", "--output_dir", folder]
    script = [ROOT / "scripts/slurm.sbatch", "main_pretrain.py", *task]
    return Submitted(cluster.sbatch(*flags, *script, **environment(PATH=path, PROCESSES="2")), cluster, folder)


def outrank(cluster: Cluster) -> str:
    """A job of a higher partition that wants the last node for itself."""
    return cluster.sbatch("-phigh", "--constraint=away", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


@pytest.fixture(scope="module")
def clusters() -> Iterator[tuple[Cluster, Cluster]]:
    """One that sends the user signal before it preempts, with nodes of 16 GPUs, and one that sends SIGTERM only."""
    started: list[Cluster] = []
    try:
        started.append(Cluster(SLURM_NODES="3", SLURM_FAKE="256 1000000 16"))
        started.append(Cluster(SLURM_NODES="1", SLURM_FAKE="4 16000 2", PREEMPT_USR="0"))
        yield tuple(started)
    finally:
        for cluster in started:
            cluster.stop()


@pytest.fixture(scope="module")
def jobs(clusters, tmp_path_factory) -> dict[str, Submitted]:
    """All jobs of two processes, started together and interrupted as soon as they train."""
    kind, rude = clusters
    folder = tmp_path_factory.mktemp("jobs")
    found = {
        "whole": submit_as_users_do(kind, folder / "whole", "--constraint", "calm"),
        "limit": submit(kind, folder / "limit", "--constraint", "calm", "--timeout", "2", seconds=10),
        "preempted": submit(kind, folder / "preempted", "--constraint", "away", seconds=3),
        "terminated": submit(rude, folder / "terminated", seconds=3),
        "cancelled": submit(kind, folder / "cancelled", "--constraint", "calm", seconds=3),
        "torchrun": submit_torchrun(kind, folder / "torchrun", seconds=3),
    }
    found["preempted"].trigger = lambda: outrank(kind)
    found["terminated"].trigger = lambda: outrank(rude)
    found["cancelled"].trigger = lambda: kind.run("scancel", found["cancelled"].number)
    found["torchrun"].trigger = lambda: kind.run("scancel", "--signal=USR2", found["torchrun"].number)
    end = time.monotonic() + 240
    while waiting := [job for job in found.values() if job.trigger]:
        for job in waiting:
            if len(job.steps) >= 2:
                job.trigger()
                job.trigger = None
        assert time.monotonic() < end, {job.folder.name: job.log[-2000:] for job in waiting}
        time.sleep(0.3)
    return found


def check_same_as_whole(job: Submitted, whole: Submitted) -> None:
    """No step twice, none left out, and bit-identical weights."""
    everything = [(epoch, step) for epoch in range(EPOCHS) for step in range(1, STEPS + 1)]
    assert job.steps == everything, job.log
    assert [line["epoch"] for line in log_lines(job.folder)] == list(range(EPOCHS))
    events = EventAccumulator(str(job.folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, EPOCHS * STEPS + 1))
    expected, found = whole.weights, job.weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def check_queued_again_once(job: Submitted, whole: Submitted, signal: str) -> None:
    """Stopped by `signal`, started again once, and the same in the end."""
    ended = job.cluster.wait(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log
    assert job.log.count(f"stopped by {signal}") == 1
    check_same_as_whole(job, whole)


def pretrain_here(folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    """The weights of the same training in one process, without SLURM."""
    main_pretrain.main([*TASK, *flags, "--output_dir", str(folder)])
    return torch.load(folder / "checkpoint-last.pth", weights_only=True)["model"]


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for the order of sums over processes."""
    for name in expected:
        parts = 3 if name.endswith("qkv.bias") else 1
        one, other = (state[name].flatten().unflatten(0, (parts, -1)) for state in (found, expected))
        for part in (0, -1):  # the keys' bias changes nothing: its gradient is rounding, which Adam enlarges
            torch.testing.assert_close(one[part], other[part], rtol=1e-3, atol=1e-4, msg=name)


def test_a_job_of_two_processes(jobs, tmp_path):
    job = jobs["whole"]
    assert job.cluster.wait(job.number)["Restarts"] == "0"
    assert "processes 2" in job.log
    check_same_as_whole(job, job)
    check_close(job.weights, pretrain_here(tmp_path, "--batch_size", "240"))


def test_preempted_with_the_user_signal(jobs):
    check_queued_again_once(jobs["preempted"], jobs["whole"], "SIGUSR2")


def test_preempted_with_sigterm_only(jobs):
    check_queued_again_once(jobs["terminated"], jobs["whole"], "SIGTERM")


def test_torchrun_passes_the_signal_and_leaves_no_orphan(jobs):
    job = jobs["torchrun"]
    check_queued_again_once(job, jobs["whole"], "SIGUSR2")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(job.folder) not in listed


def test_cancelled_stays_cancelled_and_continues_when_submitted_again(jobs):
    job, whole = jobs["cancelled"], jobs["whole"]
    ended = job.cluster.wait(job.number)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.log
    assert "stopped by SIGTERM" in job.log
    assert "queued again" not in job.log
    again = submit(job.cluster, job.folder, "--constraint", "calm")
    assert again.cluster.wait(again.number)["JobState"] == "COMPLETED"
    assert job.steps + again.steps == whole.steps
    assert len(job.steps) > 1
    assert all(torch.equal(again.weights[name], value) for name, value in whole.weights.items())


def test_the_runs_of_a_sweep_are_queued_again_each_by_itself(jobs, clusters, tmp_path):
    """The last of an array, which has the number of the whole, is preempted by SIGTERM only. The other has ended."""
    rude, output = clusters[1], tmp_path / "o"
    rude.wait(jobs["terminated"].number)
    settings = {"config": str(ROOT / "configs/pretrain/digits.yaml"), "epochs": EPOCHS, "warmup_epochs": 0}
    settings |= {"effective_batch_size": 240, "batch_size": 240, "num_workers": 0, "print_freq": 1}
    content = {"output": str(output), "pretrain": settings | {"masking": "slow_masking:Slow"}, "grid": {"seed": [0, 1]}}
    content |= {"adjust": [{"when": {"seed": 1}, "set": {"masking_args": {"seconds": 3}}}]}
    content |= {"measure": {"evaluate": {"metrics": ["rank_me"], "val_images": 50}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, ROOT / "scripts/sweep.py", tmp_path / "sweep.yaml"]
    variables = environment(PYTHONPATH=str(ROOT / "tests"))  # for slow_masking
    assert "submitted 2 jobs" in rude.run(*command, "--cluster", "slurm", "--cpus_per_task", 1, **variables)
    number = next((output / "submitit").glob("*_0_submitted.pkl")).name.split("_")[0]

    def text(path: str) -> str:
        return (output / path).read_text() if (output / path).exists() else ""

    end = time.monotonic() + 240
    while not text("seed=0/evaluate-last/result.json") or text("seed=1/pretrain/output.txt").count("epoch 0 [") < 2:
        assert time.monotonic() < end, text("seed=1/pretrain/output.txt")
        time.sleep(0.3)
    outrank(rude)
    ended = [rude.wait(f"{number}_{task}") for task in range(2)]
    assert [(job["JobState"], job["Restarts"]) for job in ended] == [("COMPLETED", "0"), ("COMPLETED", "1")]
    assert text("seed=1/pretrain/output.txt").count("stopped by SIGTERM") == 1
    rude.run(*command, "--gather", **variables)
    assert len(text("results.csv").splitlines()) == 3


def test_a_request_of_maes_size(clusters, tmp_path):
    kind, _ = clusters
    size = ["--nodes", "2", "--ngpus", "8", "--cpus_per_task", "10", "--timeout", "4320", "--mem", "500"]
    two_steps = ["--epochs", "1", "--effective_batch_size", "720", "--batch_size", "45"]
    job = submit(kind, tmp_path / "slurm", "--constraint", "calm", *size, *two_steps)
    asked = kind.job(job.number)
    nodes = asked["NumNodes"].split("-")[0]  # 2-2 while it is pending
    assert (nodes, asked["NumTasks"], asked["TimeLimit"]) == ("2", "16", "3-00:00:00")
    assert kind.wait(job.number)["JobState"] == "COMPLETED"
    assert "processes 16" in job.log
    assert job.steps == [(0, 1), (0, 2)]
    check_close(job.weights, pretrain_here(tmp_path / "here", *two_steps))


def test_the_time_limit(jobs):
    job = jobs["limit"]
    ended = job.cluster.wait(job.number)
    assert ended["JobState"] == "COMPLETED", job.log
    assert int(ended["Restarts"]) >= 1  # more where a slow machine has not begun to train when the notice comes
    assert job.log.count("is queued again") == int(ended["Restarts"])
    check_same_as_whole(job, jobs["whole"])
