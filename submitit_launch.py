#!/usr/bin/env python3
"""Submit a main to SLURM: `submitit_launch.py pretrain --nodes 2 --ngpus 8 ... <the task's own flags>`.

Everything that is not a launcher flag goes to the task. The flags are checked here, before anything is queued. A job
that reaches its time limit or is preempted writes a checkpoint, is queued again, and continues from it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from util import cli
from util.config import FinetuneSettings, LinprobeSettings, PretrainSettings, Settings
from util.distributed import submission

TASKS = {"pretrain": PretrainSettings, "finetune": FinetuneSettings, "linprobe": LinprobeSettings}
ROOT = Path(__file__).resolve().parent
AT_LEAST_ONE = ("nodes", "ngpus", *submission.NUMBERS)


class Job:
    """What every process of the job runs: a main. Pickled by submitit, and the same whenever the job starts again."""

    def __init__(self, task: str, argv: list[str]):
        self.task, self.argv, self.root = task, argv, str(ROOT)

    def __call__(self) -> None:
        sys.path.insert(0, self.root)
        from util.distributed import slurm

        slurm.describe_rank()
        argv = [word.replace("%j", os.environ["SLURM_JOB_ID"]) for word in self.argv]
        with slurm.requeued():
            importlib.import_module(f"main_{self.task}").main(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, then submit, print or run."""
    given, task_argv = make_parser().parse_known_args(argv)
    with cli.exit_on_user_error():
        check(given)
    settings = check_task(given, task_argv)
    folder = Path(given.job_dir or settings.output_dir).resolve()
    with cli.exit_on_user_error():
        cli.check_printable("job_dir" if given.job_dir else "output_dir", str(folder))
    if settings.output_dir == TASKS[given.task]().output_dir:  # neither a flag nor the file names one
        task_argv += ["--output_dir", str(folder)]
    if given.cluster == "local":
        with cli.exit_on_user_error():
            check_has_number(folder)
        run_here(given, task_argv)
        return
    with cli.exit_on_user_error():
        job = Job(given.task, task_argv)
        for number in submission.submit([job], folder / "submitit", parameters(given), given.dry_run):
            print(f"submitted job {number}; logs in {folder / 'submitit'}")


def check(given: argparse.Namespace) -> None:
    """Raise ValueError for launcher flags that cannot work."""
    for name in AT_LEAST_ONE:
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if given.cluster == "local" and given.nodes > 1:
        raise ValueError(f"--nodes {given.nodes}: --cluster local is this machine alone; leave it out")
    for name in ("job_name", *submission.TEXTS):
        cli.check_printable(name, getattr(given, name) or "")


def check_has_number(folder: Path) -> None:
    """Raise ValueError if a folder is named after the number of a SLURM job, and there is none."""
    if "%j" in str(folder):
        raise ValueError(f"--job_dir {folder}: %j is a SLURM job's number, which --cluster local has not; leave it out")


def check_task(given: argparse.Namespace, task_argv: list[str]) -> Settings:
    """Return the task's settings, checked for all processes of the job."""
    os.environ["WORLD_SIZE"] = str(given.nodes * given.ngpus)
    try:
        return cli.parse(TASKS[given.task], task_argv)
    finally:
        del os.environ["WORLD_SIZE"]


def run_here(given: argparse.Namespace, task_argv: list[str]) -> None:
    """Become torchrun, or the main itself where there is one process: signals and exit status are theirs."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={given.ngpus}"]
    command = [sys.executable, *(torchrun if given.ngpus > 1 else []), str(ROOT / f"main_{given.task}.py"), *task_argv]
    if given.dry_run:
        print(shlex.join(command))
        return
    sys.stdout.flush()
    os.execv(sys.executable, command)


def parameters(given: argparse.Namespace) -> dict:
    """Return the launcher's flags in the words of submitit's SlurmExecutor."""
    meet = f"cd {shlex.quote(str(ROOT))} && {shlex.quote(sys.executable)} -m util.distributed.slurm"
    setup = [f"meet=$({meet}) || exit 1", "export $meet"]
    asked = submission.parameters(given, given.job_name, tasks=given.ngpus, cores=given.cpus_per_task)
    return asked | {"nodes": given.nodes, "setup": setup}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}; --help lists the launcher's flags", file=sys.stderr)
        sys.exit(2)


def make_parser() -> argparse.ArgumentParser:
    """Return the launcher's own flags."""
    parser = _Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--ngpus", type=int, default=8, help="GPUs, and processes, per machine")
    parser.add_argument(
        "--job_dir", type=cli.path_text, help="for SLURM's logs, and the default --output_dir; %%j: job"
    )
    parser.add_argument("--job_name", default="mae", help="name in the queue")
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm", help="local runs here, without SLURM")
    parser.add_argument("--dry_run", action="store_true", help="print what would be submitted, and stop")
    submission.add_flags(parser)
    volta = {"dest": "constraint", "action": "store_const", "const": "volta32gb"}
    parser.add_argument("--use_volta32", **volta, help="MAE's name for --constraint volta32gb")
    return parser


if __name__ == "__main__":
    main()
