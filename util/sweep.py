"""A grid of runs: what a sweep file asks for, which part of it is done, and the table of what came out.

A sweep file is YAML:

    output: output/digits_ratios            # one folder for each run in it
    pretrain: {config: configs/pretrain/digits.yaml, epochs: 30}    # flags of main_pretrain.py for all runs
    grid: {masking: [random, sbam], mask_ratio: [0.5, 0.7], seed: [0, 1]}   # one run for each combination
    adjust:                                  # more flags for the runs that match all of `when`
      - {when: {masking: sbam_amr, mask_ratio: 0.9}, set: {masking_args: {delta_r: 0.05}}}
    skip:                                    # combinations to leave out
      - {masking: random, seed: 1}
    checkpoints: [last]                      # or epochs, as in checkpoint-{epoch}.pth
    measure:                                 # what is done with each checkpoint
      evaluate: {metrics: [knn, linear]}     # flags of scripts/evaluate.py
      linprobe: {config: configs/linprobe/digits.yaml}     # flags of main_linprobe.py; finetune likewise
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from util import checkpoint
from util.suggest import check_known

KEYS = ("output", "pretrain", "grid", "adjust", "skip", "checkpoints", "measure")
MEASURES = ("evaluate", "linprobe", "finetune")
SCRIPTS = {
    "pretrain": "main_pretrain.py",
    "linprobe": "main_linprobe.py",
    "finetune": "main_finetune.py",
    "evaluate": "scripts/evaluate.py",
}


@dataclass(frozen=True)
class Step:
    """One command of a run.

    Attributes:
        task: a key of `SCRIPTS`.
        argv: its flags.
        folder: where its result goes.
        epochs: of the schedule, to know when it is done; None for an evaluation.
    """

    task: str
    argv: tuple[str, ...]
    folder: Path
    epochs: int | None = None

    @property
    def script(self) -> str:
        """Path of the script, from the project's folder."""
        return SCRIPTS[self.task]

    def is_done(self) -> bool:
        """True if the result is there, and for a training the last checkpoint too."""
        if self.task == "evaluate":
            return (self.folder / "result.json").is_file()
        last = _last_line(self.folder)
        return last is not None and last["epoch"] >= self.epochs - 1 and (self.folder / checkpoint.LAST).is_file()


@dataclass(frozen=True)
class SweepRun:
    """One combination of the grid.

    Attributes:
        point: the grid's keys and this run's values.
        folder: of everything it writes.
        steps: pre-training first.
        labels: checkpoint ("last" or an epoch) of each step; None for the pre-training.
    """

    point: dict[str, Any]
    folder: Path
    steps: tuple[Step, ...] = field(default=())
    labels: tuple[str | None, ...] = field(default=())

    def left(self) -> list[Step]:
        """The steps that are not done. What follows a pre-training that is not done is not done either."""
        return [step for step in self.steps if not step.is_done()]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each checkpoint that has results: the point, the checkpoint, the numbers."""
        rows: dict[str, dict[str, Any]] = {}
        for step, label in zip(self.steps, self.labels, strict=True):
            if label is None or not step.is_done():
                continue
            row = rows.setdefault(label, {**self.point, "checkpoint": label} | self._training(label))
            row |= _numbers(step)
        return list(rows.values())

    def _training(self, label: str) -> dict[str, float]:
        """Loss and mean mask ratio of the epoch that a checkpoint was written after."""
        lines = _lines(self.steps[0].folder)
        line = lines[-1] if label == "last" else next(x for x in lines if x["epoch"] == int(label))
        return {name: line[name] for name in ("train_loss", "train_mask_ratio")}


def load(path: str | Path) -> dict[str, Any]:
    """A sweep file, checked. ValueError, in one sentence, for anything that cannot be one."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not isinstance(content.get("grid"), dict):
        raise ValueError(f"{path}: a sweep file needs the keys output, pretrain, grid and measure")
    for key in content:
        _check_key(path, key, KEYS)
    for key in ("output", "pretrain", "grid", "measure"):
        if not content.get(key):
            raise ValueError(f"{path}: the key {key} is missing")
    for task in content["measure"]:
        _check_key(path, task, MEASURES)
    for name, values in content["grid"].items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid.{name} must be a list of values")
    for condition in [rule["when"] for rule in content.get("adjust", [])] + content.get("skip", []):
        for name in condition:
            _check_key(path, name, content["grid"])
    if "epochs" not in content["pretrain"] and "epochs" not in content["grid"]:
        raise ValueError(f"{path}: pretrain.epochs is missing; a run is done when its last epoch is")
    return content


def expand(content: dict[str, Any], output: str | Path | None = None) -> list[SweepRun]:
    """The runs of a sweep; `output` replaces the file's own."""
    folder = Path(output or content["output"])
    names = list(content["grid"])
    runs = []
    for values in itertools.product(*content["grid"].values()):
        point = dict(zip(names, values, strict=True))
        if any(_matches(point, condition) for condition in content.get("skip", [])):
            continue
        runs.append(_run(content, point, folder / "-".join(f"{name}={value}" for name, value in point.items())))
    return runs


def flags(options: dict[str, Any]) -> list[str]:
    """`{"epochs": 3, "metrics": ["knn"], "masking_args": {"delta": 0.1}}` as command-line flags."""
    argv = []
    for name, value in options.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
            continue
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items()]
        values = value if isinstance(value, list) else ["null" if value is None else value]
        argv += [f"--{name}", *map(str, values)]
    return argv


def _run(content: dict[str, Any], point: dict[str, Any], folder: Path) -> SweepRun:
    options = _merged(content["pretrain"], point)
    for rule in content.get("adjust", []):
        if _matches(point, rule["when"]):
            options = _merged(options, rule["set"])
    pretrain = folder / "pretrain"
    steps = [Step("pretrain", (*flags(options), "--output_dir", str(pretrain)), pretrain, options["epochs"])]
    labels: list[str | None] = [None]
    for label in map(str, content.get("checkpoints", ["last"])):
        path = pretrain / f"checkpoint-{label}.pth"
        for task, given in content["measure"].items():
            target, given = folder / f"{task}-{label}", given or {}
            if task == "evaluate":
                steps.append(Step(task, (str(path), *flags(given), "--output", str(target / "result.json")), target))
            else:
                argv = (*flags(given), "--finetune", str(path), "--output_dir", str(target))
                steps.append(Step(task, argv, target, given.get("epochs") or _config_epochs(given)))
            labels.append(label)
    return SweepRun(point, folder, tuple(steps), tuple(labels))


def _config_epochs(given: dict[str, Any]) -> int:
    content = yaml.safe_load(Path(given["config"]).read_text()) if "config" in given else {}
    if "epochs" not in content:
        raise ValueError("measure: a linprobe or finetune needs epochs, of its own or in its config")
    return content["epochs"]


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """`first` updated with `second`; keys with a dot reach into a mapping: `masking_args.delta_r`."""
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in first.items()}
    for name, value in second.items():
        outer, dot, inner = name.partition(".")
        if dot:
            merged[outer] = {**merged.get(outer, {}), inner: value}
        elif isinstance(value, dict):
            merged[name] = {**merged.get(name, {}), **value}
        else:
            merged[name] = value
    return merged


def _matches(point: dict[str, Any], condition: dict[str, Any]) -> bool:
    """True if the point has the condition's values; a list means any of them."""
    return all(point[name] in (value if isinstance(value, list) else [value]) for name, value in condition.items())


def _check_key(path: str | Path, key: str, known) -> None:
    try:
        check_known("key", key, known)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('--key ')}") from error


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The epochs in log.txt; none if there is no such file, or it was cut off."""
    try:
        return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _last_line(folder: Path) -> dict[str, Any] | None:
    return (_lines(folder) or [None])[-1]


def _numbers(step: Step) -> dict[str, Any]:
    if step.task != "evaluate":
        return {f"{step.task}_acc1": _last_line(step.folder)["test_acc1"]}
    found = json.loads((step.folder / "result.json").read_text())
    return {name: value for name, value in found.items() if isinstance(value, float)}
