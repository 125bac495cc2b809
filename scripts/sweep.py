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
import queue
import runpy
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from studies import sweep, tables, trial
from util import cli
from util.distributed import signals, world
from util.training import lock

ROOT = Path(__file__).resolve().parent.parent


def do_run(run: trial.SweepRun, ngpus: int) -> int:
    """The steps of one run that are left, in order. The exit status of the first that fails, which is told; else 0."""
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock.hold(run.folder, wait_s=0, flag="--output")
    except ValueError as error:  # of another sweep at the same time
        print(f"not done: {error}")
        return 1
    with held or contextlib.nullcontext():
        for step in run.steps:
            if step.is_done():
                continue
            step.begin()
            log = step.folder / "output.txt"
            with open(log, "a") as file:
                status = _launch(step, file, ngpus) if ngpus > 1 else _call(step, file)
            if status or not step.is_done():
                print(f"{step.task} was stopped" if status == signals.PREEMPTED else f"{step.task} failed, see {log}")
                return status or 1
    return 0


def _launch(step: trial.Step, file, ngpus: int) -> int:
    launcher = [sys.executable]
    if step.task != "evaluate":
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ngpus}"]
    command = [*launcher, str(ROOT / step.script), *step.argv]
    return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def _call(step: trial.Step, file) -> int:
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

    def __call__(self, command: list[str], **variables: str) -> tuple[int, str]:
        """Exit status, and what was printed, with these environment variables besides this process's own."""
        if self.stopped:
            return signals.PREEMPTED, "not begun"
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | variables
        )
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
        content, runs = open_sweep(given)
    if given.dry_run:
        for run in runs:
            for step in run.left():
                print(shlex.join(["python", step.script, *step.argv]))
        return
    if given.only:
        sys.exit(do_run(runs[0], given.ngpus))
    failures = 0
    if not given.gather:
        left = [run for run in runs if run.left()]
        print(f"{len(runs)} runs, {len(runs) - len(left)} done", flush=True)
        adopted = sum(step.is_adopted() for run in runs for step in run.steps)
        if adopted:
            print(f"{adopted} measurements have no command.json: taken to be those of the sweep file as it is now")
        failures = run_locally(left, given) if given.cluster is None else submit(left, given)
    gather(runs, Path(given.output or content["output"]), list(content["grid"]))
    sys.exit(1 if failures else 0)


def open_sweep(given: argparse.Namespace) -> tuple[dict[str, Any], list[trial.SweepRun]]:
    """The sweep file and its runs (with `--only`: that one), every command checked. ValueError: a user's mistake."""
    if (given.parallel is not None and given.parallel < 1) or given.ngpus < 1:
        raise ValueError(f"--parallel {given.parallel} --ngpus {given.ngpus}: must be at least 1")
    content = sweep.load(given.sweep)
    try:
        runs = sweep.expand(content, given.output)
        if given.only:
            runs = [only_run(given.only, runs)]
        with as_one_of(given.ngpus):
            sweep.check(runs)
        check_evaluations(runs)
    except ValueError as error:
        raise ValueError(f"{given.sweep}: {error}") from error
    return content, runs


def only_run(name: str, runs: list[trial.SweepRun]) -> trial.SweepRun:
    """The run of this name. ValueError: there is none."""
    found = [run for run in runs if run.folder.name == name]
    if not found:
        raise ValueError(f"--only {name}: the sweep has no run of this name, such as {runs[0].folder.name}")
    return found[0]


@contextlib.contextmanager
def as_one_of(processes: int) -> Iterator[None]:
    """Within it, settings are checked for trainings of so many processes."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def check_evaluations(runs: list[trial.SweepRun]) -> None:
    """ValueError if scripts/evaluate.py does not take the flags of an evaluation."""
    steps = [step for run in runs for step in run.steps if step.task == "evaluate"]
    if not steps:
        return
    parser = runpy.run_path(str(ROOT / steps[0].script), run_name="evaluate")["make_parser"]()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"measure.evaluate: {message}; scripts/evaluate.py --help lists the flags")

    parser.error = refuse
    for step in steps:
        parser.parse_args(list(step.argv))


def only(given: argparse.Namespace, run: trial.SweepRun) -> list[str]:
    """The command that does one run."""
    command = [sys.executable, str(ROOT / "scripts/sweep.py"), given.sweep, "--ngpus", str(given.ngpus)]
    command += ["--output", given.output] if given.output else []
    return [*command, "--only", run.folder.name]


def run_locally(runs: list[trial.SweepRun], given: argparse.Namespace) -> int:
    """`--parallel` runs at a time, each in a process. Returns how many failed; exit status 75 if it was stopped."""
    failures, processes, parallel = 0, Processes(), given.parallel or 1
    free = queue.SimpleQueue()
    for share in shares(parallel, given.ngpus):
        free.put(share)

    def do(run: trial.SweepRun) -> tuple[int, str]:
        share = free.get()
        try:
            return processes(only(given, run), **share)
        finally:
            free.put(share)

    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        jobs = {pool.submit(do, run): run for run in runs}
        for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            status, said = job.result()
            failures += status != 0
            print(f"[{number}/{len(jobs)}] {jobs[job].folder.name}: {said or 'done'}", flush=True)
    if processes.stopped:
        print("stopped; the same command continues")
        sys.exit(signals.PREEMPTED)
    return failures


def shares(parallel: int, ngpus: int) -> list[dict[str, str]]:
    """Environment of each of the runs at a time: the GPUs in turns, if there are enough for one; part of the cores."""
    here = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", here).split(",") if gpu]
    groups = [",".join(gpus[first : first + ngpus]) for first in range(0, len(gpus) - ngpus + 1, ngpus)]
    threads = str(max(1, world.usable_cores() // parallel))  # or each takes all cores, and waits for the others
    common = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if not groups:
        return [common] * parallel
    return [common | {"CUDA_VISIBLE_DEVICES": groups[place % len(groups)]} for place in range(parallel)]


def submit(runs: list[trial.SweepRun], given: argparse.Namespace) -> int:
    """One job array; with `--parallel`, at most so many jobs at a time. Waits only for jobs on this machine."""
    try:
        import submitit
    except ImportError:
        print("sweep.py: error: submitit is missing; pip install submitit", file=sys.stderr)
        sys.exit(2)
    folder = Path(given.output or sweep.load(given.sweep)["output"]).resolve() / "submitit"
    executor = submitit.AutoExecutor(folder, cluster=given.cluster, slurm_max_num_timeout=100_000)
    parameters = {"name": "sweep", "timeout_min": given.timeout, "cpus_per_task": given.cpus_per_task}
    if given.cluster == "slurm":
        parameters |= {"gpus_per_node": given.ngpus, "slurm_array_parallelism": given.parallel or len(runs)}
        names = ("partition", "account", "qos", "constraint")
        parameters |= {f"slurm_{name}": getattr(given, name) for name in names if getattr(given, name)}
    executor.update_parameters(**parameters)
    with executor.batch():
        jobs = [executor.submit(ClusterJob(only(given, run))) for run in runs]
    print(f"submitted {len(jobs)} jobs; logs in {folder}; the same command with --gather makes the table")
    if given.cluster == "slurm":
        return 0
    return sum(job.result() != 0 for job in jobs)


def gather(runs: list[trial.SweepRun], output: Path, keys: list[str]) -> None:
    """Write results.csv and results.md, and print the latter."""
    rows = [row for run in runs for row in run.rows()]
    if not rows:
        print("no result yet")
        return
    output.mkdir(parents=True, exist_ok=True)
    tables.write_csv(output / "results.csv", rows)
    keys = [name for name in keys if name != "seed"]
    columns = dict.fromkeys(name for row in rows for name in row)
    metrics = [name for name in columns if name not in (*keys, "seed", "checkpoint", "seconds")]
    table = tables.markdown(rows, [*keys, "checkpoint"], metrics)
    (output / "results.md").write_text(table)
    print(table)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=cli.path_text, help="YAML file, see studies/sweep.py and configs/sweeps/")
    parser.add_argument("--output", type=cli.path_text, help="folder for all runs; default: the file's")
    parser.add_argument("--parallel", type=int, help="runs at a time; default: 1, on SLURM all")
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
