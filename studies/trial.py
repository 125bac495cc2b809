"""A run of a sweep: its commands, which of them are done, and the numbers that came out.

Nothing that stands in a run's files is imported or called; a file of another form than expected counts as not there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util import cli
from util.config import FinetuneSettings, LinprobeSettings, PretrainSettings, Settings, names_of_kind
from util.files import write_whole
from util.training import checkpoint

SETTINGS = {"pretrain": PretrainSettings, "linprobe": LinprobeSettings, "finetune": FinetuneSettings}
LAST = "last"  # the label of checkpoint-last.pth
RECORD = "command.json"
# What may differ between what a folder holds and what is asked for: how fast a run is, and what it shows.
_FREE = set().union(*(names_of_kind(settings, "speed", "display") for settings in SETTINGS.values()))


@dataclass(frozen=True)
class Step:
    """One command of a run.

    Attributes:
        task: pretrain, linprobe, finetune or evaluate.
        argv: its flags, and `given`, those that the sweep file has.
        folder: where its result goes.
        source: the checkpoint that it measures, and `label`, `LAST` or its epoch; None for the pre-training.
        ngpus: processes of a training; None where only what is there is wanted.
    """

    task: str
    argv: tuple[str, ...]
    given: dict[str, Any]
    folder: Path
    source: Path | None = None
    label: str | None = None
    ngpus: int | None = None

    @property
    def script(self) -> str:
        """Return the script's path, from the project's folder."""
        return "scripts/evaluate.py" if self.task == "evaluate" else f"main_{self.task}.py"

    @functools.cached_property
    def settings(self) -> Settings | None:
        """Return the settings of a training; None for an evaluation. ValueError: the flags are wrong."""
        if self.task == "evaluate":
            return None
        return parsed(f"{self.folder.parent.name}: {self.task}", cli.parse, SETTINGS[self.task], list(self.argv))

    def is_done(self) -> bool:
        """Return whether the result is there, and is that of this command and of the checkpoint that is there."""
        complete = _last_epoch(self.folder) >= self.settings.last_epoch if self.settings else bool(self._result())
        return complete and not self.differences()

    def begin(self) -> None:
        """Make the folder and its record. Put aside a measurement by other flags or of another checkpoint."""
        if self.source is not None and self.folder.exists() and self.differences():
            self.folder.rename(self.folder.with_name(f"{self.folder.name}-replaced-{time.strftime('%Y%m%d-%H%M%S')}"))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / RECORD, json.dumps(self._asked(), indent=1) + "\n")

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Return what decides the result and is different in the record and in what is asked for: both values."""
        there, asked = _read(self.folder / RECORD), self._asked()
        names = asked.keys() | there.keys()
        if self.settings and there:  # a record of another version of this project may lack some settings
            names = asked.keys() & there.keys()
        if self.source is not None and asked["checkpoint"] is None:  # it was removed since
            names -= {"checkpoint"}
        if self.ngpus is None:
            names -= {"ngpus"}
        return {
            name: (there.get(name), asked.get(name)) for name in sorted(names) if there.get(name) != asked.get(name)
        }

    def numbers(self) -> dict[str, float]:
        """Return what a measurement that is done found."""
        if not self.settings:
            return _numbers(self._result())
        line = epoch_line(self.folder, self.settings.last_epoch)
        return {f"{self.task}_acc1": line["test_acc1"]} if "test_acc1" in line else {}

    def _result(self) -> dict[str, Any]:
        return _read(self.folder / "result.json")

    def _asked(self) -> dict[str, Any]:
        """Return what decides the result: settings, the parts of a batch that is not given as a whole; weights."""
        values = self.settings.as_dict() | {"ngpus": self.ngpus} if self.settings else self.given
        free = _FREE | ({"batch_size", "accum_iter", "ngpus"} if values.get("effective_batch_size") else set())
        if self.source is not None:
            free = free | {"finetune"}  # where the checkpoint lies; what is in it is compared
        asked = {name: value for name, value in values.items() if name not in free}
        if self.source is not None:
            asked["checkpoint"] = checkpoint.fingerprint(self.source)
        return json.loads(json.dumps(asked, default=str))


@dataclass(frozen=True)
class SweepRun:
    """One combination of the grid.

    Attributes:
        point: the grid's keys and this run's values.
        folder: of everything it writes.
        steps: pre-training first.
    """

    point: dict[str, Any]
    folder: Path
    steps: tuple[Step, ...]

    def check(self) -> None:
        """Raise ValueError if the folder holds a pre-training that cannot become this one. More epochs continue it."""
        pretrain = self.steps[0]
        if not checkpoint.own_checkpoints(pretrain.folder):
            return
        epoch, last = _last_epoch(pretrain.folder), pretrain.settings.last_epoch
        if epoch > last < pretrain.settings.epochs - 1 and LAST in {step.label for step in self.steps}:
            raise ValueError(
                f"{pretrain.folder}: checkpoint-last.pth is of epoch {epoch}, after --stop_after_epoch {last}; "
                f"measure checkpoints: [{last}], or name another --output"
            )
        differences = pretrain.differences()
        told = ", ".join(f"--{name} {there} ({asked} is asked for)" for name, (there, asked) in differences.items())
        if differences.keys() == {"ngpus"}:
            raise ValueError(
                f"{pretrain.folder}: holds a pre-training with {told}, whose batch is another; give --ngpus "
                f"{differences['ngpus'][0]}, or set effective_batch_size and name another --output"
            )
        there, asked = differences.pop("epochs", (None, 0))
        if not _read(pretrain.folder / RECORD):
            told = f"no {RECORD} that can be read"
        elif not differences and (there is None or (type(there) is int and there < asked)):
            return
        raise ValueError(
            f"{pretrain.folder}: holds a pre-training with {told}; name another --output, or remove this folder"
        )

    def left(self) -> list[Step]:
        """Return the steps that are not done. While the pre-training is not, nothing of its last checkpoint is."""
        trained = self.steps[0].is_done()
        return [step for step in self.steps if not step.is_done() or (step.label == LAST and not trained)]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each checkpoint that has results: the point, the checkpoint, the numbers."""
        rows: dict[str, dict[str, Any]] = {}
        left, pretrain = self.left(), self.steps[0]
        point = {name: text_of(value) for name, value in self.point.items()}
        for step in self.steps[1:]:
            if step in left:
                continue
            if step.label not in rows:
                line = epoch_line(
                    pretrain.folder, pretrain.settings.last_epoch if step.label == LAST else int(step.label)
                )
                training = {name: line[name] for name in ("train_loss", "train_mask_ratio") if name in line}
                rows[step.label] = {**point, "checkpoint": step.label, **training}
            # --metrics salience measures a mask_ratio too, which is not that of the grid.
            rows[step.label] |= {f"{step.task}_{k}" if k in point else k: v for k, v in step.numbers().items()}
        return list(rows.values())

    def epochs(self) -> list[dict[str, Any]]:
        """Return one row for each epoch of the pre-training so far: the point, the epoch, what log.txt says."""
        point = {name: text_of(value) for name, value in self.point.items()}
        lines = _mappings(self.steps[0].folder / "log.txt", "\n")
        numbers = ({name: value for name, value in line.items() if type(value) in (int, float)} for line in lines)
        return [point | {"epoch": line.pop("epoch")} | line for line in numbers if type(line.get("epoch")) is int]


def parsed(what: str, parse: Callable, *arguments: Any) -> Any:
    """Return `parse(*arguments)`; turn the message with which a parser of flags exits into a ValueError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(*arguments)
    except SystemExit as stop:
        raise ValueError(f"{what}: {' '.join(said.getvalue().partition('error: ')[2].split())}") from stop


def text_of(value: Any) -> Any:
    """Return a value of the grid as a cell of a table and a part of a name: lists, mappings and None as text."""
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value) if value is None else value


def epoch_line(folder: Path, epoch: int) -> dict[str, float]:
    """Return the numbers of an epoch's line in log.txt; empty if there is none."""
    return next((_numbers(line) for line in _mappings(folder / "log.txt", "\n") if line.get("epoch") == epoch), {})


def _last_epoch(folder: Path) -> int:
    """Return the epoch of a training's last checkpoint: -1 if it is untrained, -2 if there is none that is whole."""
    try:
        epoch = checkpoint.peek(folder / checkpoint.LAST)["epoch"]
    except (IndexError, KeyError, TypeError, ValueError):
        return -2
    return epoch if type(epoch) is int else -2


def _numbers(content: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in content.items() if isinstance(value, float)}


def _read(path: Path) -> dict[str, Any]:
    return next(_mappings(path), {})


def _mappings(path: Path, separator: str = "\0") -> Iterator[dict[str, Any]]:
    """Yield the mappings in a file of JSON texts, without what was cut off or has another form."""
    with contextlib.suppress(OSError, ValueError):
        for text in path.read_text().split(separator):
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(content := json.loads(text), dict):
                    yield content
