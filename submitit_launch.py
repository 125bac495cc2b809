#!/usr/bin/env python3
"""Submit a main to SLURM: `submitit_launch.py pretrain --nodes 2 --ngpus 8 ... <the task's own flags>`.

Everything that is not a launcher flag goes to the task. The flags are checked here, before anything is queued. A job
that reaches its time limit or is preempted is queued again and continues from `checkpoint-last.pth`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from util import cli
from util.config import FinetuneSettings, LinprobeSettings, PretrainSettings

TASKS = {"pretrain": PretrainSettings, "finetune": FinetuneSettings, "linprobe": LinprobeSettings}
ROOT = Path(__file__).resolve().parent


class Job:
    """What every process of the job runs: a main, with the process group that SLURM describes."""

    def __init__(self, task: str, argv: list[str]):
        self.task, self.argv, self.root = task, argv, str(ROOT)

    def __call__(self) -> None:
        import submitit

        sys.path.insert(0, self.root)
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        os.environ["LOCAL_WORLD_SIZE"] = str(submitit.JobEnvironment().num_tasks // submitit.JobEnvironment().num_nodes)
        importlib.import_module(f"main_{self.task}").main(self.argv)

    def checkpoint(self):
        """Called by submitit before the time limit and on preemption: the same job again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def main(argv: list[str] | None = None) -> None:
    """Check, submit, print the job's number and where its logs are."""
    given, task_argv = make_parser().parse_known_args(argv)
    try:
        import submitit
    except ImportError:
        print("submitit_launch.py: error: submitit is missing; pip install submitit", file=sys.stderr)
        sys.exit(2)

    os.environ["WORLD_SIZE"] = str(given.nodes * given.ngpus)  # the checks depend on it
    try:
        settings = cli.parse(TASKS[given.task], task_argv)
    finally:
        del os.environ["WORLD_SIZE"]
    folder = Path(given.job_dir or settings.output_dir).resolve()
    if settings.output_dir == TASKS[given.task]().output_dir:  # neither a flag nor the file names one
        task_argv += ["--output_dir", str(folder)]
    # submitit gives up after 3 time limits by default; pre-training takes as many as it takes.
    executor = submitit.AutoExecutor(folder / "submitit", cluster=given.cluster, slurm_max_num_timeout=100_000)
    executor.update_parameters(**parameters(given))
    job = executor.submit(Job(given.task, task_argv))
    print(f"submitted job {job.job_id}; logs in {folder / 'submitit'}")
    if given.cluster == "local":
        job.results()  # there is no queue to leave it in


def make_parser() -> argparse.ArgumentParser:
    """The launcher's own flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--ngpus", type=int, default=8, help="GPUs, and processes, per machine")
    parser.add_argument("--timeout", type=int, default=4320, help="minutes until the job is queued again")
    parser.add_argument("--mem", type=int, help="GB per machine; default: the partition's")
    parser.add_argument("--cpus_per_task", type=int, default=10, help="cores per process")
    parser.add_argument("--job_dir", help="folder for SLURM's logs and the default --output_dir")
    parser.add_argument("--job_name", default="mae", help="name in the queue")
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm", help="local runs without SLURM")
    for name in ("partition", "account", "qos", "constraint", "comment"):
        parser.add_argument(f"--{name}", help=f"SLURM's --{name}")
    return parser


def parameters(given: argparse.Namespace) -> dict:
    """The launcher's flags in submitit's words."""
    values = {
        "name": given.job_name,
        "nodes": given.nodes,
        "tasks_per_node": given.ngpus,
        "cpus_per_task": given.cpus_per_task,
        "timeout_min": given.timeout,
        "gpus_per_node": given.ngpus,
    }
    if given.mem:
        values["mem_gb"] = given.mem
    if given.cluster == "local":
        return values
    for name in ("partition", "account", "qos", "constraint", "comment"):
        if getattr(given, name):
            values[f"slurm_{name}"] = getattr(given, name)
    return values


if __name__ == "__main__":
    main()
