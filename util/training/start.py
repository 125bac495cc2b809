"""The start of a run: lock the folder, join the other processes, and only then look for what to continue from."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn, TypeVar

from util.config import Settings
from util.data.datasets import ImageSet
from util.distributed import world
from util.distributed.agreement import Agreement
from util.training import lock

T = TypeVar("T")


def take_folder(settings: Settings) -> IO | None:
    """Create the run's folders and lock `--output_dir`, in the first process. ValueError if that cannot be."""
    for flag in ("output_dir", "log_dir"):
        folder = getattr(settings, flag)
        if not folder:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))  # a full disk lets files begin
        except OSError as error:
            raise ValueError(f"--{flag} {folder}: cannot be written ({error.strerror})") from error
    cores = os.cpu_count() or 1
    if settings.num_workers > cores:
        warnings.warn(f"--num_workers {settings.num_workers}: this machine has {cores} cores", stacklevel=2)
    return lock.hold(Path(settings.output_dir)) if os.environ.get("RANK", "0") == "0" else None


def together(agreement: Agreement, action: Callable[[], T]) -> T:
    """Return what `action` returns in this process; a ValueError in any process ends all of them, with status 2.

    The first process that has one prints it, so that one sentence appears whatever the others see.
    """
    error = result = None
    try:
        result = action()
    except ValueError as found:
        error = found
    first = -agreement.maximum(-world.rank() if error is not None else -world.world_size())[0]
    if first == world.world_size():
        return result
    _refuse(agreement, str(error) if world.rank() == first else "")


def check_same(settings: Settings, content: dict | None, agreement: Agreement) -> None:
    """End all processes if they did not find the same checkpoint: they would train on, each from another step."""
    step = content.get("step", 0) if content is not None else -1
    last, first = agreement.maximum(step, -step)
    if last != -first:
        sentence = (
            f"--output_dir {settings.output_dir}: the processes found different checkpoints there, of step "
            f"{max(-first, 0)} and of step {last}; name a folder that all machines share"
        )
        _refuse(agreement, sentence if world.is_main() else "")


def check_same_images(settings: Settings, images: ImageSet, title: str, agreement: Agreement) -> None:
    """End all processes if they did not find the same images: each would draw its share from another list."""
    count, number = len(images), images.fingerprint
    most, fewest, last, first = agreement.maximum(count, -count, number, -number)
    if last == -first:
        return
    teller = -agreement.maximum(-world.rank() if count == -fewest else -world.world_size())[0]
    where = f"--data_path {settings.data_path}" if settings.data_path else f"--dataset {settings.dataset}"
    others = f"another process {most}" if most > count else "another process as many of other names, labels or classes"
    sentence = (
        f"{where}: {socket.gethostname()} has {count} {title} images and {others}; give all machines the same copy, or "
        "a folder that they share"
    )
    _refuse(agreement, sentence if world.rank() == teller else "")


def _refuse(agreement: Agreement, sentence: str) -> NoReturn:
    if sentence:
        name = os.path.basename(sys.argv[0])
        print(f"{name}: error: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    agreement.maximum(0)  # the first process to leave makes the launcher end the others
    world.finish()
    raise SystemExit(2)
