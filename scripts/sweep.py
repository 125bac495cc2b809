#!/usr/bin/env python3
"""Run a grid of pre-trainings and what measures them, skip what is done, gather one table.

scripts/sweep.py configs/sweeps/digits_ratios.yaml --parallel 2
scripts/sweep.py configs/sweeps/fig3_mask_ratios.yaml --cluster slurm --ngpus 8 --partition gpu
scripts/sweep.py SWEEP.yaml --dry_run        # print the commands; --gather only makes the table of what is there
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import os
import runpy
import shlex
import signal
import subprocess
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import cli, control, sweep, tables

ROOT = Path(__file__).resolve().parent.parent


def do_run(run: sweep.SweepRun, ngpus: int) -> int:
    """The steps of one run that are left, in order. The exit status of the first that fails, which is told; else 0."""
    for step in run.left():
        step.folder.mkdir(parents=True, exist_ok=True)
        log = step.folder / "output.txt"
        with open(log, "a") as file:
            status = _launch(step, file, ngpus) if ngpus > 1 else _call(step, file)
        if status or not step.is_done():
            print(f"{step.task} was stopped" if status == control.PREEMPTED else f"{step.task} failed, see {log}")
            return status or 1
    return 0


def _launch(step: sweep.Step, file, ngpus: int) -> int:
    launcher = [sys.executable]
    if step.task != "evaluate":
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ngpus}"]
    command = [*launcher, str(ROOT / step.script), *step.argv]
    return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def _call(step: sweep.Step, file) -> int:
    """Run a step in this process, which has paid for the imports already."""
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            if step.task == "evaluate":
                runpy.run_path(str(ROOT / step.script), run_name="evaluate")["main"](list(step.argv))
            else:
                sys.path.insert(0, str(ROOT))
                importlib.import_module(f"main_{step.task}").main(list(step.argv))
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except Exception:
            traceback.print_exc()
            return 1
    return 0


class Processes:
    """Runs in processes of their own. A signal to this one stops them all, and their trainings write checkpoints."""

    def __init__(self):
        self.stopped = False
        self._groups: set[int] = set()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def __call__(self, command: list[str]) -> tuple[int, str]:
        """Exit status, and what was printed."""
        if self.stopped:
            return control.PREEMPTED, "not begun"
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self._groups.add(process.pid)
        if self.stopped:  # while it was started
            _end(process.pid)
        said, _ = process.communicate()
        self._groups.discard(process.pid)
        return process.returncode, said.strip()

    def _stop(self, number: int, frame) -> None:
        self.stopped = True
        for group in list(self._groups):
            _end(group)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)


class ClusterJob:
    """What submitit runs: this script again, for one run. Holds no class of this project, which it could not import."""

    def __init__(self, command: list[str]):
        self.command = command

    def __call__(self) -> int:
        """The exit status."""
        return subprocess.run(self.command, check=False).returncode

    def checkpoint(self):
        """Called by submitit before the time limit and on preemption: the same job again, which continues."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def main(argv: list[str] | None = None) -> None:
    """Expand, run what is left, gather; exit status 1 if a run failed."""
    given = make_parser().parse_args(argv)
    with cli.exit_on_user_error():
        content = sweep.load(given.sweep)
        runs = sweep.expand(content, given.output)
        if given.only and given.only not in {run.folder.name for run in runs}:
            raise ValueError(f"--only {given.only}: the sweep has no run of this name, such as {runs[0].folder.name}")
        if given.parallel < 1 or given.ngpus < 1:
            raise ValueError(f"--parallel {given.parallel} --ngpus {given.ngpus}: must be at least 1")
    if given.dry_run:
        for run in runs:
            for step in run.left():
                print(shlex.join(["python", step.script, *step.argv]))
        return
    if given.only:
        sys.exit(do_run(next(run for run in runs if run.folder.name == given.only), given.ngpus))
    failures = 0
    if not given.gather:
        left = [run for run in runs if run.left()]
        print(f"{len(runs)} runs, {len(runs) - len(left)} done", flush=True)
        failures = run_locally(left, given) if given.cluster is None else submit(left, given)
    gather(runs, Path(given.output or content["output"]), list(content["grid"]))
    sys.exit(1 if failures else 0)


def only(given: argparse.Namespace, run: sweep.SweepRun) -> list[str]:
    """The command that does one run."""
    command = [sys.executable, str(ROOT / "scripts/sweep.py"), given.sweep, "--ngpus", str(given.ngpus)]
    command += ["--output", given.output] if given.output else []
    return [*command, "--only", run.folder.name]


def run_locally(runs: list[sweep.SweepRun], given: argparse.Namespace) -> int:
    """`--parallel` runs at a time, each in a process. Returns how many failed; exit status 75 if it was stopped."""
    failures, processes = 0, Processes()
    with concurrent.futures.ThreadPoolExecutor(given.parallel) as pool:
        jobs = {pool.submit(processes, only(given, run)): run for run in runs}
        for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            status, said = job.result()
            failures += status != 0
            print(f"[{number}/{len(jobs)}] {jobs[job].folder.name}: {said or 'done'}", flush=True)
    if processes.stopped:
        print("stopped; the same command continues")
        sys.exit(control.PREEMPTED)
    return failures


def submit(runs: list[sweep.SweepRun], given: argparse.Namespace) -> int:
    """One job array, at most `--parallel` of it at a time. Waits only for jobs on this machine."""
    try:
        import submitit
    except ImportError:
        print("sweep.py: error: submitit is missing; pip install submitit", file=sys.stderr)
        sys.exit(2)
    folder = Path(given.output or sweep.load(given.sweep)["output"]).resolve() / "submitit"
    executor = submitit.AutoExecutor(folder, cluster=given.cluster, slurm_max_num_timeout=100_000)
    parameters = {"name": "sweep", "timeout_min": given.timeout, "cpus_per_task": given.cpus_per_task}
    if given.cluster == "slurm":
        parameters |= {"gpus_per_node": given.ngpus, "slurm_array_parallelism": given.parallel}
        names = ("partition", "account", "qos", "constraint")
        parameters |= {f"slurm_{name}": getattr(given, name) for name in names if getattr(given, name)}
    executor.update_parameters(**parameters)
    with executor.batch():
        jobs = [executor.submit(ClusterJob(only(given, run))) for run in runs]
    print(f"submitted {len(jobs)} jobs; logs in {folder}; the same command with --gather makes the table")
    if given.cluster == "slurm":
        return 0
    return sum(job.result() != 0 for job in jobs)


def gather(runs: list[sweep.SweepRun], output: Path, keys: list[str]) -> None:
    """Write results.csv and results.md, and print the latter."""
    rows = [row for run in runs for row in run.rows()]
    if not rows:
        print("no result yet")
        return
    output.mkdir(parents=True, exist_ok=True)
    tables.write_csv(output / "results.csv", rows)
    keys = [name for name in keys if name != "seed"]
    metrics = [name for name in rows[0] if name not in (*keys, "seed", "checkpoint", "seconds")]
    table = tables.markdown(rows, [*keys, "checkpoint"], metrics)
    (output / "results.md").write_text(table)
    print(table)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="YAML file, see util/sweep.py and configs/sweeps/")
    parser.add_argument("--output", help="folder for all runs; default: the file's")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--ngpus", type=int, default=1, help="GPUs, and processes, of a run")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that are left")
    parser.add_argument("--gather", action="store_true", help="only make the table of what is there")
    parser.add_argument("--only", metavar="NAME", help="only the run of this name, without the table")
    parser.add_argument("--cluster", choices=["slurm", "local"], help="through submitit; local: without SLURM")
    parser.add_argument("--timeout", type=int, default=4320, help="SLURM: minutes until a job is queued again")
    parser.add_argument("--cpus_per_task", type=int, default=10, help="SLURM: cores of a job")
    for name in ("partition", "account", "qos", "constraint"):
        parser.add_argument(f"--{name}", help=f"SLURM's --{name}")
    return parser


if __name__ == "__main__":
    main()
