#!/usr/bin/env python3
"""Run a grid of pre-trainings and what measures them, skip what is done, gather one table.

scripts/sweep.py configs/sweeps/digits_ratios.yaml --parallel 2
scripts/sweep.py configs/sweeps/fig3_mask_ratios.yaml --cluster slurm --ngpus 8 --partition gpu
scripts/sweep.py SWEEP.yaml --dry_run        # print the commands and what they cost; --gather: only the table
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import runpy
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch

from studies import cost, sweep, tables, trial
from util import cli, terminal
from util.distributed import signals, slurm, submission, world
from util.files import write_whole
from util.training import lock

ROOT = Path(__file__).resolve().parent.parent
SAVING_S = 3600  # how long torchrun waits for its workers' checkpoints


def main(argv: list[str] | None = None) -> None:
    """Expand, run what is left, gather. Exit status 1 if a run failed, 75 if the sweep was stopped."""
    terminal.protect()  # a reader that goes away, as `| head` does, ends neither the runs nor what waits for them
    given = make_parser().parse_args(argv)
    with cli.exit_on_user_error():
        runs = open_sweep(given)
        if given.dry_run:
            for step in (step for run in runs for step in run.left()):
                print(shlex.join(["python", step.script, *step.argv]))
            with processes(given.ngpus):
                print("".join(f"# {line}\n" for line in cost.describe(runs)), end="")
            return
        status, output = 0, runs[0].folder.parent
        try:
            if not given.gather:
                output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output {output}: cannot be made ({error.strerror})") from error
        if given.only:
            sys.exit(do_run(runs[0], given.ngpus))
        if not given.gather:
            left = [run for run in runs if run.left()]
            print(f"{len(runs)} runs, {len(runs) - len(left)} done", flush=True)
            if given.cluster == "slurm" and left:
                submit(left, given, output / "submitit")
            else:
                status = asyncio.run(run_here(left, given))
        if status != signals.PREEMPTED:
            gather(runs, output)
    sys.exit(status)


def open_sweep(given: argparse.Namespace) -> list[trial.SweepRun]:
    """Return the runs (with `--only`: that one), every command checked. ValueError: a user's mistake."""
    check(given)
    content = sweep.load(given.sweep)
    parser = runpy.run_path(str(ROOT / "scripts/evaluate.py"), run_name="evaluate")["make_parser"]()
    try:
        with processes(given.ngpus):
            runs = sweep.expand(content, given.output, None if given.gather else given.ngpus)
            if given.only is not None:
                found = [run for run in runs if run.folder.name == given.only]
                if not found:
                    raise ValueError(f"--only {given.only}: no run has this name; one is {runs[0].folder.name}")
                runs = found
            sweep.check(runs)
            for step in (step for run in runs for step in run.steps if step.task == "evaluate"):
                trial.parsed("measure.evaluate", parser.parse_args, list(step.argv))
    except ValueError as error:
        raise ValueError(f"{given.sweep}: {error}") from error
    return runs


@contextlib.contextmanager
def processes(number: int) -> Iterator[None]:
    """Check settings in the block for trainings of so many processes."""
    os.environ["WORLD_SIZE"] = str(number)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]


def check(given: argparse.Namespace) -> None:
    """Raise ValueError for flags that cannot work, before the sweep file is read."""
    for name in ("parallel", "ngpus", *submission.NUMBERS):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ValueError(f"--{name} {getattr(given, name)}: must be at least 1")
    if given.gather and given.only is not None:
        raise ValueError(f"--gather --only {given.only}: the table is of all runs; choose one of the two")
    if given.output == "":
        raise ValueError("--output '': is empty; name a folder")
    for name in submission.TEXTS:
        cli.check_printable(name, getattr(given, name) or "")
    if given.cluster == "slurm" and not (given.dry_run or given.gather):
        submission.check_machine()


def do_run(run: trial.SweepRun, ngpus: int) -> int:
    """Do the steps of one run that are left, in order. Return the exit status of the first that fails, or 0."""
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
                status = do_step(step, ngpus, file)
            if status or not step.is_done():
                print(f"{step.task} was stopped" if status == signals.PREEMPTED else f"{step.task} failed, see {log}")
                return status or 1
    return 0


def do_step(step: trial.Step, ngpus: int, file: IO[str]) -> int:
    """Run one command, in this process if it needs no other ones: the imports are paid. Return its exit status."""
    script = str(ROOT / step.script)
    if ngpus > 1 and step.task != "evaluate":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ngpus}"]
        launcher += [f"--shutdown-timeout={SAVING_S}", script]
        with outliving() as asked:
            status = subprocess.run([*launcher, *step.argv], stdout=file, stderr=subprocess.STDOUT).returncode
        return signals.PREEMPTED if asked else status
    torch.set_float32_matmul_precision("highest")  # torch's default, which a training before it has changed
    main = runpy.run_path(script, run_name=step.task)["main"]
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            main(list(step.argv))
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 1
        except Exception:
            traceback.print_exc()
            return 1
    return 0


@contextlib.contextmanager
def outliving() -> Iterator[list[int]]:
    """Collect SIGTERM and ignore SIGUSR2 in the block: torchrun, or its workers, get them too, and save first."""
    asked: list[int] = []
    before = {
        # SIG_IGN would be inherited by workers that are still importing.
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number)),
        signal.SIGUSR2: signal.signal(signal.SIGUSR2, signal.SIG_IGN),  # torchrun, which does not know it, would die
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(given: argparse.Namespace, run: trial.SweepRun) -> list[str]:
    """Return the command that does one run."""
    output = ["--output", given.output] if given.output else []
    flags = [given.sweep, "--ngpus", str(given.ngpus), *output, "--only", run.folder.name]
    return [sys.executable, str(ROOT / "scripts/sweep.py"), *flags]


async def run_here(runs: list[trial.SweepRun], given: argparse.Namespace) -> int:
    """Do `--parallel` runs at a time, each in a process. Return 1 if one failed, 75 if a signal stopped them all."""
    groups: set[int] = set()
    stopped, done, failed = asyncio.Event(), 0, 0
    free = asyncio.Queue()
    for share in shares(given.parallel or 1, given.ngpus):
        free.put_nowait(share)

    def stop() -> None:  # the trainings write checkpoints
        stopped.set()
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)

    async def do(run: trial.SweepRun) -> None:
        nonlocal done, failed
        share = await free.get()
        if not stopped.is_set():
            process = await asyncio.create_subprocess_exec(
                *command(given, run), stdout=subprocess.PIPE, start_new_session=True, env=os.environ | share
            )
            groups.add(process.pid)
            if stopped.is_set():  # while it was started
                stop()
            said = (await process.communicate())[0].decode(errors="replace").strip()
            groups.remove(process.pid)
            done, failed = done + 1, failed + (process.returncode != 0)
            print(f"[{done}/{len(runs)}] {run.folder.name}: {said or 'done'}", flush=True)
        free.put_nowait(share)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await asyncio.gather(*map(do, runs))
    if stopped.is_set():
        print("stopped; the same command continues")
        return signals.PREEMPTED
    return int(failed > 0)


def shares(parallel: int, ngpus: int) -> list[dict[str, str]]:
    """Return the environment of each of the runs at a time: GPUs in turns, if there are enough for one; some cores."""
    here = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", here).split(",") if gpu]
    groups = [",".join(gpus[first : first + ngpus]) for first in range(0, len(gpus) - ngpus + 1, ngpus)]
    threads = str(max(1, world.usable_cores() // parallel))  # or each takes all cores, and waits for the others
    common = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if not groups:
        return [common] * parallel
    return [common | {"CUDA_VISIBLE_DEVICES": groups[place % len(groups)]} for place in range(parallel)]


def submit(runs: list[trial.SweepRun], given: argparse.Namespace, folder: Path) -> None:
    """Submit one job array; with `--parallel`, at most so many jobs at a time. ValueError: SLURM refuses it."""
    saving_s = 0.8 * slurm.warning_seconds(given.timeout)
    jobs = [submission.Command(command(given, run), str(ROOT), saving_s) for run in runs]
    values = submission.parameters(given, "sweep", tasks=1, cores=given.cpus_per_task * given.ngpus)
    submission.submit(jobs, folder.resolve(), values | {"array_parallelism": given.parallel or len(runs)})
    print(f"submitted {len(jobs)} jobs; logs in {folder}; the same command with --gather makes the table")


def gather(runs: list[trial.SweepRun], output: Path) -> None:
    """Write results.csv, results.md, epochs.csv, and print the second. ValueError: they cannot be written."""
    rows = [row for run in runs for row in run.rows()]
    if not rows:
        print("no result yet")
        return
    table, settings = pd.DataFrame(rows), [*runs[0].point, "checkpoint"]
    metrics = [name for name in table if name not in (*settings, "seconds")]
    means = tables.markdown(table, [name for name in settings if name != "seed"], metrics)
    try:
        write_whole(output / "results.csv", table.to_csv(index=False))
        write_whole(output / "results.md", means)
        if epochs := [row for run in runs for row in run.epochs()]:
            write_whole(output / "epochs.csv", pd.DataFrame(epochs).to_csv(index=False))
    except OSError as error:
        raise ValueError(f"{output}: the tables cannot be written ({error.strerror})") from error
    print(means)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=cli.path_text, help="YAML file, see studies/sweep.py and configs/sweeps/")
    parser.add_argument("--output", type=cli.path_text, help="folder for all runs; default: the file's")
    parser.add_argument("--parallel", type=int, help="runs at a time; default: 1, on SLURM all")
    parser.add_argument("--ngpus", type=int, default=1, help="GPUs, and processes, of a run")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that are left, and their cost")
    parser.add_argument("--gather", action="store_true", help="only make the table of what is there")
    parser.add_argument("--only", metavar="NAME", help="only the run of this name, without the table")
    parser.add_argument("--cluster", choices=["slurm", "local"], default="local", help="default: here, without SLURM")
    submission.add_flags(parser)
    return parser


if __name__ == "__main__":
    main()
