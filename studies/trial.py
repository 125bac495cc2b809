"""A run of a sweep: its commands, which of them are done, and the numbers that came out."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from util import cli
from util.config import FinetuneSettings, LinprobeSettings, PretrainSettings, Settings, names_of_kind
from util.files import write_whole
from util.training import checkpoint

SCRIPTS = {
    "pretrain": "main_pretrain.py",
    "linprobe": "main_linprobe.py",
    "finetune": "main_finetune.py",
    "evaluate": "scripts/evaluate.py",
}
SETTINGS = {"pretrain": PretrainSettings, "linprobe": LinprobeSettings, "finetune": FinetuneSettings}
LAST = "last"  # the label of checkpoint-last.pth
# What may differ between what a folder holds and what is asked for: how fast a run is, and what it shows.
_FREE = set().union(*(names_of_kind(settings, "speed", "display") for settings in SETTINGS.values()))


@dataclass(frozen=True)
class Step:
    """One command of a run.

    Attributes:
        task: a key of `SCRIPTS`.
        argv: its flags.
        given: those of them that the sweep file has.
        folder: where its result goes.
        source: the checkpoint that it measures; None for the pre-training.
    """

    task: str
    argv: tuple[str, ...]
    given: dict[str, Any]
    folder: Path
    source: Path | None = None

    @property
    def script(self) -> str:
        """Path of the script, from the project's folder."""
        return SCRIPTS[self.task]

    @functools.cached_property
    def settings(self) -> Settings | None:
        """What the flags of a training mean; None for an evaluation. ValueError: they mean nothing."""
        if self.task == "evaluate":
            return None
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return cli.parse(SETTINGS[self.task], list(self.argv))
        except SystemExit as stop:
            message = " ".join(said.getvalue().partition("error: ")[2].split())
            raise ValueError(f"{self.folder.parent.name}: {self.task}: {message}") from stop

    @property
    def epochs(self) -> int | None:
        """Length of a training's schedule; None for an evaluation."""
        return self.settings.epochs if self.settings else None

    def is_done(self) -> bool:
        """True if the result of this command is there, and is one of the checkpoint that is there."""
        if not self._is_complete():
            return False
        return self._is_current() if self.source is not None else not self.differences()

    def is_adopted(self) -> bool:
        """True if it is done, but no record says by which command: by an earlier version."""
        return self.source is not None and self._record() is None and self.is_done()

    def begin(self) -> None:
        """Make the folder. What another command left in it, or this one with another checkpoint, is put aside."""
        if self.source is not None and self.folder.exists() and not self._is_current():
            self.folder.rename(self.folder.with_name(f"{self.folder.name}-replaced-{time.strftime('%Y%m%d-%H%M%S')}"))
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.source is not None:
            _write(self.folder / "command.json", self._wanted())

    def differences(self) -> dict[str, Any]:
        """The settings, as asked for, that the training in the folder does not have."""
        there, asked = checkpoint.arguments(self.last_checkpoint()), self.settings.as_dict()
        names = sorted(_compared(there, asked) & there.keys())
        return {name: asked[name] for name in names if there[name] != asked[name]}

    def last_checkpoint(self) -> dict[str, Any]:
        """What checkpoint-last.pth of a training holds; empty if there is none that is whole."""
        try:
            return checkpoint.peek(self.folder / checkpoint.LAST)
        except ValueError:
            return {}

    def numbers(self) -> dict[str, Any]:
        """What a measurement that is done found: columns of the table."""
        if self.task == "evaluate":
            return {name: value for name, value in _read(self._result).items() if isinstance(value, float)}
        line = epoch_line(self.folder, self.epochs - 1)
        return {f"{self.task}_acc1": line["test_acc1"]} if line else {}

    @property
    def _result(self) -> Path:
        return self.folder / ("result.json" if self.task == "evaluate" else checkpoint.LAST)

    def _is_complete(self) -> bool:
        if self.task == "evaluate":
            return _read(self._result) is not None
        return self.last_checkpoint().get("epoch", -2) >= self.epochs - 1  # -1: untrained

    def _is_current(self) -> bool:
        """Whether what is in a measurement's folder is of this command and checkpoint, or nothing yet."""
        record, wanted = self._record(), self._wanted()
        if record is None:  # of an earlier version, which wrote none
            return not (self._result.exists() and self.source.exists()) or _age(self._result) >= _age(self.source)
        if wanted["checkpoint"] is None:  # removed since
            wanted["checkpoint"] = record["checkpoint"]
        return record == wanted

    def _record(self) -> dict[str, Any] | None:
        return _read(self.folder / "command.json")

    def _wanted(self) -> dict[str, Any]:
        flags = self.given
        if self.settings:
            values = self.settings.as_dict()
            flags = {name: values[name] for name in sorted(_compared(values, values))}
        return json.loads(json.dumps({"flags": flags, "checkpoint": checkpoint.fingerprint(self.source)}))


@dataclass(frozen=True)
class SweepRun:
    """One combination of the grid.

    Attributes:
        point: the grid's keys and this run's values.
        folder: of everything it writes.
        steps: pre-training first.
        labels: checkpoint (`LAST` or an epoch) of each step; None for the pre-training.
    """

    point: dict[str, Any]
    folder: Path
    steps: tuple[Step, ...] = field(default=())
    labels: tuple[str | None, ...] = field(default=())

    def check(self) -> None:
        """ValueError if the folder holds a pre-training that cannot become this one. More epochs continue it."""
        pretrain = self.steps[0]
        there = checkpoint.arguments(pretrain.last_checkpoint())
        differences = pretrain.differences()
        if there.get("epochs", 0) < pretrain.epochs:
            differences.pop("epochs", None)
        if differences:
            told = ", ".join(f"--{name} {there[name]} ({asked} is asked for)" for name, asked in differences.items())
            raise ValueError(
                f"{pretrain.folder}: holds a pre-training with {told}; name another --output, or remove this folder"
            )

    def left(self) -> list[Step]:
        """The steps that are not done. After a pre-training that is not done, nothing of its last checkpoint is."""
        trained = self.steps[0].is_done()
        named = zip(self.steps, self.labels, strict=True)
        return [step for step, label in named if not step.is_done() or (label == LAST and not trained)]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each checkpoint that has results: the point, the checkpoint, the numbers."""
        rows: dict[str, dict[str, Any]] = {}
        left = self.left()
        for step, label in zip(self.steps, self.labels, strict=True):
            if label is None or step in left:
                continue
            point = {name: text_of(value) for name, value in self.point.items()}
            row = rows.setdefault(label, {**point, "checkpoint": label} | self._training(label))
            row |= step.numbers()
        return list(rows.values())

    def _training(self, label: str) -> dict[str, float]:
        """Loss and mean mask ratio of the epoch that a checkpoint was written after."""
        pretrain = self.steps[0]
        line = epoch_line(pretrain.folder, pretrain.epochs - 1 if label == LAST else int(label))
        return {name: line[name] for name in ("train_loss", "train_mask_ratio") if name in line}


def text_of(value: Any) -> Any:
    """A value of the grid as a cell of a table and a part of a name: lists, mappings and None as text."""
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value) if value is None else value


def epoch_line(folder: Path, epoch: int) -> dict[str, Any]:
    """An epoch's line in log.txt; empty if there is none."""
    try:
        lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    except (OSError, ValueError):
        return {}
    return next((line for line in lines if line["epoch"] == epoch), {})


def _compared(there: dict[str, Any], asked: dict[str, Any]) -> set[str]:
    """Names of the settings that decide what comes out; of a batch that is given as a whole, not its parts."""
    parts = (
        {"batch_size", "accum_iter"} if there.get("effective_batch_size") and asked["effective_batch_size"] else set()
    )
    return asked.keys() - _FREE - parts


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None if there is none, or it was cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _age(path: Path) -> float:
    return path.stat().st_mtime
