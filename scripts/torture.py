#!/usr/bin/env python3
"""Kill pre-training runs at random moments, restart them, and compare their end with that of a run left in peace.

scripts/torture.py --kills 50 --seed 0 --report report.json
scripts/torture.py --method bootmae --kills 20
scripts/torture.py --masking amt --kills 10

Real processes, real signals, the built-in digits. Three strategies, attention maps, methods with a teacher, 0, 1 and 3
loader workers, one process and two under torchrun. At least a fifth of the SIGKILLs wait until a checkpoint is being
written. The weights, the optimizer and the teacher must be the same bit for bit; the exit status is 1 if they are not.
About 20 minutes on 2 cores for 50 kills.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sklearn.datasets  # noqa: E402, F401 (imported once, for all runs)
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402

import main_pretrain  # noqa: E402
from util import cli  # noqa: E402
from util.training import checkpoint  # noqa: E402

TEACHER = "my_method:Distilled"  # the method with a teacher of docs/METHODS.md
MASKING_ARGS = {"amt": ["refresh_epochs=1"]}  # maps of all images after the second and the third of four epochs
CASES = [  # (strategy, workers, processes, method)
    ("random", 0, 1, "mae"),
    ("sbam", 1, 1, "mae"),
    ("sbam_amr", 3, 1, "mae"),
    ("sbam_amr", 0, 1, TEACHER),
    ("random", 1, 2, "mae"),
    ("sbam_amr", 1, 2, TEACHER),
    ("hpm", 1, 1, "hpm"),
    ("amt", 0, 2, "mae"),
    ("sbam_amr", 0, 1, "simmim"),
    ("block", 1, 1, "bootmae"),
    ("sbam_amr", 1, 2, "bootmae"),
    ("attmask_hint", 0, 1, "ibot"),
    ("sbam_amr", 1, 2, "ibot"),
]
MODELS = {name: f"{name}_vit_mini_patch4" for name in ("simmim", "bootmae", "ibot")}
METHOD_ARGS = {  # small heads and few views; the prototypes are frozen in the first of four epochs
    "ibot": ["out_dim=64", "hidden_dim=64", "bottleneck_dim=32", "local_size=8", "local_crops_number=2"],
}


@dataclass
class Tally:
    """What happened in one case."""

    case: tuple
    signal: str
    kills: int = 0
    within_a_write: int = 0
    runs: int = 0
    differing: int = 0
    without_checkpoint: int = 0
    crashed: int = 0
    seconds: float = 0.0
    reference_s: float = field(default=0.0, repr=False)


def main(argv: list[str]) -> int:
    """Run the campaign; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs, and half as many SIGTERMs, over all cases")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    names = sorted({case[3] for case in CASES})
    parser.add_argument("--method", choices=names, help="only the cases of this method")
    masks = sorted({case[0] for case in CASES})
    parser.add_argument("--masking", choices=masks, help="only the cases with this strategy")
    parser.add_argument("--report", type=cli.path_text, help="JSON file for the tallies")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if arguments.method in (None, case[3]) and arguments.masking in (None, case[0])]
    if not cases:
        parser.error(f"--method {arguments.method} --masking {arguments.masking}: no case has both; leave out one")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "METHODS.md").read_text(), re.DOTALL)[0]
        (Path(folder) / "my_method.py").write_text(code)
        sys.path.insert(0, folder)
        return campaign(arguments, cases)


def campaign(arguments: argparse.Namespace, cases: list[tuple]) -> int:
    """Run `cases`; return 1 if anything differed."""
    rng, tallies = random.Random(arguments.seed), []
    for name, total in (("SIGKILL", arguments.kills), ("SIGTERM", arguments.kills // 2)):
        shares = [total // len(cases) + (i < total % len(cases)) for i in range(len(cases))]
        for case, share in zip(cases, shares, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                tallies.append(torture(case, share, name, rng, Path(folder)))
            print(tallies[-1], flush=True)
            if arguments.report:
                content = {"seed": arguments.seed, "cases": [vars(tally) for tally in tallies]}
                Path(arguments.report).write_text(json.dumps(content, indent=2) + "\n")
    bad = sum(tally.differing + tally.without_checkpoint + tally.crashed for tally in tallies)
    print(
        f"{sum(t.kills for t in tallies)} signals, {sum(t.within_a_write for t in tallies)} of them within a write, "
        f"{sum(t.runs for t in tallies)} runs completed, {bad} wrong"
    )
    return int(bad > 0)


def torture(case: tuple, kills: int, name: str, rng: random.Random, folder: Path) -> Tally:
    """Send `kills` signals to runs of one case; compare each run that ends, and begin another."""
    tally, start = Tally(case, name), time.monotonic()
    wait(launch(case, folder / "reference"), 600)
    expected, tally.reference_s = final(folder / "reference"), time.monotonic() - start
    while tally.kills < kills:
        output = folder / f"run{tally.runs}"
        while True:
            said = size(output / "out.txt")
            process = launch(case, output)
            if tally.kills < kills:
                within_a_write = name == "SIGKILL" and tally.kills % 4 == 3
                strike(process, output, name, within_a_write, rng.uniform(0, 0.7) * tally.reference_s, tally)
            status = wait(process, 600)
            tally.crashed += crashed(output / "out.txt", said)
            if status == 0:
                break
        tally.runs += 1
        tally.differing += not same(expected, final(output))
    tally.seconds = time.monotonic() - start
    return tally


def launch(case: tuple, output: Path) -> int:
    """Start a run in a process group of its own; return its number."""
    strategy, workers, processes, method = case
    flags = ["--dataset", "digits", "--in_chans", 3 if method == "ibot" else 1, "--epochs", 4]
    flags += [
        "--model",
        MODELS.get(method, "mae_vit_mini_patch4"),
        *([] if method in ("simmim", "ibot") else ["--norm_pix_loss"]),
    ]
    flags += ["--method", method, "--method_args", *METHOD_ARGS.get(method, []), "--masking", strategy]
    flags += ["--masking_args", *MASKING_ARGS.get(strategy, [])]
    flags += ["--mask_ratio", 0.85 if strategy == "amt" else 0.75, "--num_workers", workers]
    flags += ["--effective_batch_size", 64, "--lr", 1e-3]
    flags += ["--batch_size", 64 // processes, "--warmup_epochs", 0, "--print_freq", 50, "--output_dir", output]
    flags = [str(flag) for flag in [*flags, "--save_every_minutes", 0.002]]
    output.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        return fork(flags, output)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with open(output / "out.txt", "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": sys.path[0]}
        return subprocess.Popen(
            [*command, str(ROOT / "main_pretrain.py"), *flags],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        ).pid


def fork(flags: list[str], output: Path) -> int:
    """Start a run without the seconds that importing takes."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setsid()
        file = os.open(output / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv[0] = "main_pretrain.py"
        main_pretrain.main(flags)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(status)


def strike(process: int, output: Path, name: str, within_a_write: bool, delay: float, tally: Tally) -> None:
    """Wait, then until a checkpoint is being written if asked to, and send the signal to all its processes."""
    end = time.monotonic() + delay
    temporary = output / "checkpoint-new.pth.tmp"
    while time.monotonic() < end or (within_a_write and not temporary.exists()):
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return  # it ended before
        time.sleep(0.0003)
    for group in (process, *(children(process) if name == "SIGKILL" else ())):  # SIGTERM torchrun passes on itself
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, getattr(signal, name))
    tally.kills += 1
    tally.within_a_write += temporary.exists() and name == "SIGKILL"
    wait(process, 600, reap=False)
    if (output / checkpoint.LAST).exists() or (output / checkpoint.PREVIOUS).exists():
        tally.without_checkpoint += checkpoint.find_own(output) is None


def children(process: int) -> list[int]:
    """Return torchrun's workers, each of which leads a process group."""
    path = Path(f"/proc/{process}/task/{process}/children")
    return [child for child in map(int, path.read_text().split()) if os.getpgid(child) == child]


def size(path: Path) -> int:
    """Return the bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def crashed(output: Path, start: int) -> bool:
    """Return whether a run's output from byte `start` on has an error: a traceback through the main, or a sentence."""
    said = output.read_bytes()[start:].decode(errors="replace")
    return 'main_pretrain.py", line' in said or "error: " in said


def wait(process: int, limit: float, reap: bool = True) -> int:
    """Wait for the exit status, negative for a signal. TimeoutError after `limit` seconds, which nothing takes here."""
    options, end = os.WEXITED | os.WNOHANG | (0 if reap else os.WNOWAIT), time.monotonic() + limit
    while (result := os.waitid(os.P_PID, process, options)) is None:
        if time.monotonic() > end:
            os.killpg(process, signal.SIGKILL)
            raise TimeoutError(f"process {process} did not end within {limit:.0f} s")
        time.sleep(0.002)
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def final(output: Path) -> dict:
    """Return the last checkpoint."""
    return checkpoint.load(output / checkpoint.LAST)


def same(one: dict, other: dict) -> bool:
    """Return whether steps, weights, side state and the optimizer's state are equal bit for bit."""
    first, second = (flatten({k: c[k] for k in ("step", "model", "method", "optimizer")}) for c in (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(first[k], second[k]) if torch.is_tensor(first[k]) else first[k] == second[k] for k in first
    )


def flatten(value, prefix: str = "") -> dict:
    """Flatten nested containers -> {path: leaf}."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {k: v for name, item in items for k, v in flatten(item, f"{prefix}/{name}").items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
