"""Submit jobs to SLURM through submitit: their flags, what they ask for, and what is said where SLURM refuses them."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from util.distributed import slurm

NUMBERS = ("timeout", "mem", "cpus_per_task")
TEXTS = ("partition", "account", "qos", "constraint", "comment")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of SLURM."""
    parser.add_argument("--timeout", type=int, default=4320, help="SLURM: minutes until a job is queued again")
    parser.add_argument("--mem", type=int, help="SLURM: GB per machine; default: the partition's")
    parser.add_argument("--cpus_per_task", type=int, default=10, help="SLURM: cores per process of the training")
    for name in TEXTS:
        parser.add_argument(f"--{name}", help=f"SLURM's --{name}")


def check_machine() -> None:
    """Raise ValueError if this machine cannot submit jobs."""
    missing = [command for command in ("sbatch", "srun") if shutil.which(command) is None]
    if missing:
        raise ValueError(
            f"--cluster slurm: {' and '.join(missing)} not found on this machine; use one of a SLURM cluster's, "
            "--dry_run, or --cluster local"
        )


def parameters(given: argparse.Namespace, name: str, tasks: int, cores: int) -> dict:
    """Return what a job asks for, in the words of submitit's SlurmExecutor.

    Args:
        given: the flags; `ngpus` too.
        name: in the queue.
        tasks: processes that SLURM starts on each machine.
        cores: of each of them.
    """
    values = {
        "job_name": name,
        "ntasks_per_node": tasks,
        "gpus_per_node": given.ngpus,
        "cpus_per_task": cores,
        "time": given.timeout,
        "signal_delay_s": slurm.warning_seconds(given.timeout),
        "additional_parameters": {"requeue": True},
        # A crash of one process ends all, the end of one does not. Since 22.05 srun does not take over sbatch's cores.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={cores}"],
        "wckey": None,  # submitit's own would be refused where such keys are enforced
    }
    if given.mem is not None:
        values["mem"] = f"{given.mem}GB"
    return values | {flag: getattr(given, flag) for flag in TEXTS if getattr(given, flag)}


class Command:
    """A job that runs a command in one process, and is queued again where SLURM stops it.

    Attributes:
        command: saves and leaves with status `slurm.PREEMPTED` when told to stop, and continues when it is started
            again. SLURM's signals go to all processes of a job, so it gets them, too.
        root: the project's folder.
        saving_s: how long the command may take to save.
    """

    def __init__(self, command: list[str], root: str, saving_s: float):
        self.command, self.root, self.saving_s = command, root, saving_s

    def __call__(self) -> None:
        """Run it. Leave with its exit status if it failed."""
        sys.path.insert(0, self.root)
        from util.distributed import slurm  # where the job starts, the one above is not there

        told: list[float] = []
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: told.append(time.monotonic()))
        process = subprocess.Popen(self.command)
        while (status := process.poll()) is None and not (told and time.monotonic() > told[0] + self.saving_s):
            time.sleep(0.2)
        stopped = status == slurm.PREEMPTED or (told and status != 0)  # one that still imports ends by the signal
        if status != 0 and not (stopped and slurm.requeue(slurm.own_number())):
            sys.exit(status or slurm.PREEMPTED)


def submit(jobs: list[Callable], folder: Path, values: dict, dry_run: bool = False) -> list[str]:
    """Submit `jobs`, several as an array, whose scripts, pickles and logs go to `folder`. Return their numbers.

    Args:
        jobs: pickled by value, with the module that defines them: it need not be there where they start.
        folder: made if it is missing.
        values: of `parameters`.
        dry_run: print the script instead.

    Raises:
        ValueError: SLURM or submitit is missing, or SLURM refuses.
    """
    try:
        import cloudpickle  # of submitit
        import submitit
    except ImportError as error:
        raise ValueError("submitit is missing; pip install submitit") from error

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # a script can be printed where there is no SLURM

    cloudpickle.register_pickle_by_value(sys.modules[type(jobs[0]).__module__])
    executor = Executor(folder)
    executor.update_parameters(**values)
    if dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, "dry_run"))
        return []
    check_machine()
    try:
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():  # submitit repeats there what it raises
            submitted = [executor.submit(job) for job in jobs]
    except submitit.core.utils.FailedJobError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"SLURM refuses the job: {reason.removeprefix('sbatch: error: ')}") from error
    return [job.job_id for job in submitted]
