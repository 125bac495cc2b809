"""main_pretrain.py with faults: `FAULTS='[{"kind": "SIGKILL", "forward": 5, "rank": 1}]' faults.py FLAGS`.

A fault strikes in the given forward passes (counted from 0 in this process) of the given rank, every rank if none is
given; with `once`, only while FILE does not exist. A signal may strike in a `look` instead, two seconds after the
monitors begin to take features (counted likewise), which then takes a minute. Kinds: a signal's name, sent to the
process itself; `crash`; `nan`; `orphan`, which kills the launcher; `fill`, which fills the disk of PATH with a file of
this name, and `free`, which removes it; `unmount`, which takes the file system at PATH away; `kill_worker`, which
kills a worker of the loader; `few_files`, after which the process can open hardly any more; `overflow`, after which a
weight is infinite.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn

from evaluation import features
from methods import Loss, Method
from util.distributed import world


@contextmanager
def injected(faults: list[dict]) -> Iterator[None]:
    """Let these faults strike in a method's forward passes, or in the monitors."""
    look = [fault for fault in faults if "look" in fault]
    faults = [fault for fault in faults if "look" not in fault]
    count = 0

    def call(self, inputs, plan, at):
        nonlocal count
        number, count, factor = count, count + 1, 1.0
        for fault in faults:
            if (
                number in _as_list(fault["forward"])
                and fault.get("rank", world.rank()) == world.rank()
                and _first(fault)
            ):
                if fault["kind"] == "nan":
                    factor = float("nan")
                elif fault["kind"] == "crash":
                    raise RuntimeError("struck")
                elif fault["kind"] == "orphan":
                    os.kill(os.getppid(), signal.SIGKILL)
                elif fault["kind"] == "fill":
                    fill(Path(fault["path"]))
                elif fault["kind"] == "unmount":
                    subprocess.run(["umount", "--lazy", fault["path"]], check=True)
                elif fault["kind"] == "kill_worker":
                    multiprocessing.active_children()[0].kill()
                elif fault["kind"] == "few_files":
                    in_use = max(map(int, os.listdir("/proc/self/fd")))
                    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 1, in_use + 1))
                    with suppress(OSError):
                        while True:  # numbers in between may be free
                            os.open(os.devnull, os.O_RDONLY)
                elif fault["kind"] == "overflow":
                    next(self.parameters()).data.fill_(float("inf"))
                elif fault["kind"] == "free":
                    Path(fault["path"]).unlink()
                else:
                    os.kill(os.getpid(), getattr(signal, fault["kind"]))
        losses = nn.Module.__call__(self, inputs, plan, at)
        return {name: Loss(loss.sum * factor, loss.count) for name, loss in losses.items()}

    extract, numbers = features.extract_features, itertools.count()

    def extract_slowly(*args, **options):
        number = next(numbers)
        for fault in look:
            if number in _as_list(fault["look"]) and _first(fault):
                time.sleep(2)
                os.kill(os.getpid(), getattr(signal, fault["kind"]))
                time.sleep(60)
        return extract(*args, **options)

    Method.__call__, features.extract_features = call, extract_slowly
    try:
        yield
    finally:
        del Method.__call__
        features.extract_features = extract


def fill(path: Path) -> None:
    """Leave no room on the disk of `path`."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)):
            pass


def _as_list(value) -> list[int]:
    return value if isinstance(value, list) else [value]


def _first(fault: dict) -> bool:
    if "once" not in fault:
        return True
    path = Path(fault["once"])
    if path.exists():
        return False
    path.write_text("struck")
    return True


if __name__ == "__main__":
    import main_pretrain

    sys.argv[0] = "main_pretrain.py"
    with injected(json.loads(os.environ["FAULTS"])):
        main_pretrain.main()
