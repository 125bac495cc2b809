"""A grid of runs: what a sweep file asks for.

A sweep file is YAML:

    output: output/digits_ratios            # one folder for each run in it
    pretrain: {config: configs/pretrain/digits.yaml, epochs: 30}    # flags of main_pretrain.py for all runs
    grid: {masking: [random, sbam], mask_ratio: [0.5, 0.7], seed: [0, 1]}   # one run for each combination
    adjust:                                  # more flags for the runs that match all of `when`; `measure` likewise
      - {when: {masking: sbam_amr, mask_ratio: 0.9}, set: {masking_args: {delta_r: 0.05}}}
    skip:                                    # combinations to leave out
      - {masking: random, seed: 1}
    checkpoints: [last]                      # or epochs that are kept, as in checkpoint-{epoch}.pth
    measure:                                 # what is done with each checkpoint
      evaluate: {metrics: [knn, linear]}     # flags of scripts/evaluate.py
      linprobe: {config: configs/linprobe/digits.yaml}     # flags of main_linprobe.py; finetune likewise
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studies.trial import LAST, Step, SweepRun, text_of
from util import yaml_files
from util.files import expand_home
from util.suggest import check_known

REQUIRED = ("output", "pretrain", "grid", "measure")
KEYS = dict.fromkeys(REQUIRED, dict) | {"output": str} | dict.fromkeys(("adjust", "skip", "checkpoints"), list)
MEASURES = ("evaluate", "linprobe", "finetune")
MOST_RUNS = 10_000
_KINDS = {str: "text", dict: "a mapping, such as {name: value}", list: "a list, such as [last] or [{seed: 1}]"}


def load(path: str | Path) -> dict[str, Any]:
    """Read and check a sweep file. ValueError, in one sentence, for anything that cannot be one."""
    content = yaml_files.load(path)
    try:
        _check_form(content)
        _check_grid(content)
        content["output"] = expand_home(str(content["output"]))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('--key ')}") from error
    return content


def _check_form(content: Any) -> None:
    _must(isinstance(content, dict), f"a sweep file needs the keys {', '.join(REQUIRED)}")
    for key, value in content.items():
        check_known("key", str(key), KEYS)
        if value is not None or key not in REQUIRED:
            _check_kind(key, value, KEYS[key])
    for key in REQUIRED:
        _must(bool(content.get(key)), f"the key {key} is missing")
    _check_measure("measure", content["measure"])
    epochs = "epochs" in content["pretrain"] or "epochs" in content["grid"]
    _must(epochs, "pretrain.epochs is missing; a run is done when its last epoch is")
    for label in content.get("checkpoints", []):
        _must(label == LAST or type(label) is int, f"checkpoints: {label} must be last, or an epoch such as 99")


def _check_measure(where: str, measure: Any) -> None:
    _check_kind(where, measure, dict)
    for task, given in measure.items():
        check_known("key", task, MEASURES)
        if given is not None:
            _check_kind(f"{where}.{task}", given, dict)


def _check_grid(content: dict[str, Any]) -> None:
    grid, conditions = content["grid"], [("skip: a rule", rule) for rule in content.get("skip", [])]
    for name, values in grid.items():
        _must(isinstance(values, list) and bool(values), f"grid.{name} must be a list of values")
        twice = [text_of(value) for place, value in enumerate(values) if value in values[:place]]
        _must(not twice, f"grid.{name} has {', '.join(map(str, twice))} twice")
    number = math.prod(map(len, grid.values()))
    _must(number <= MOST_RUNS, f"grid: asks for {number} runs; at most {MOST_RUNS} are possible, so take values out")
    for rule in content.get("adjust", []):
        right = isinstance(rule, dict) and {"when"} < rule.keys() <= {"when", "set", "measure"}
        example = "{when: {seed: 1}, set: {lr: 0.1}}"
        _must(right, f"adjust: {rule} must have the keys when and set (or measure), as {example}")
        _check_kind("adjust: set", rule.get("set", {}), dict)
        _check_measure("adjust: measure", rule.get("measure", {}))
        conditions.append(("adjust: when", rule["when"]))
    for key, condition in conditions:
        _check_kind(key, condition, dict)
        for name in condition:
            check_known("key", name, grid)


def _check_kind(key: str, value: Any, kind: type) -> None:
    _must(isinstance(value, kind), f"{key} must be {_KINDS[kind]}, not {value}")
    for name in value if kind is dict else ():
        _must(isinstance(name, str), f"{key}: the name {name} must be text; put it in quotation marks")


def _must(right: bool, message: str) -> None:
    if not right:
        raise ValueError(message)


def expand(content: dict[str, Any], output: str | Path | None = None, ngpus: int | None = None) -> list[SweepRun]:
    """Return the runs of a sweep. ValueError: none is left, or names collide.

    Args:
        content: of the file.
        output: replaces the file's own.
        ngpus: processes of a training; None where only what is there is wanted.
    """
    folder = Path(content["output"] if output is None else output).expanduser()
    runs: dict[str, SweepRun] = {}
    for values in itertools.product(*content["grid"].values()):
        point = dict(zip(content["grid"], values, strict=True))
        if any(_matches(point, condition) for condition in content.get("skip", [])):
            continue
        name = "-".join(f"{name}={text_of(value)}" for name, value in point.items()).replace("/", "_")
        _must(name not in runs, f"grid: two runs have the name {name}; write their values so that they differ in it")
        _must(
            len(name.encode()) < 256, f"grid: {name} is too long for the name of a folder; put shared values elsewhere"
        )
        runs[name] = _run(content, point, folder / name, ngpus)
    _must(bool(runs), "skip: leaves no run out of the grid's combinations; take a rule away")
    return list(runs.values())


def check(runs: Iterable[SweepRun]) -> None:
    """Check every training's command with its own parser, its checkpoints, and what the folders hold.

    Raises:
        ValueError: a run could not work, or its folder holds another one.
    """
    for run in runs:
        for step in run.steps:
            _ = step.settings
        settings = run.steps[0].settings
        every, last = settings.save_every_epochs, settings.last_epoch
        kept = [e for e in range(last + 1) if every is not None and (e % every == 0 or e == last)]
        kept = kept[-settings.keep_last :] if settings.keep_last else kept
        for label in {step.label for step in run.steps} - {None, LAST, *map(str, kept)}:
            raise ValueError(
                f"checkpoints: {label}: {run.folder.name} keeps none of this epoch, with epoch {last} the last, "
                f"--save_every_epochs {every} --keep_last {settings.keep_last}; choose one of {[LAST, *kept]}"
            )
        run.check()


def flags(options: dict[str, Any]) -> list[str]:
    """Write `{"epochs": 3, "metrics": ["knn"], "masking_args": {"delta": 0.1}}` as command-line flags.

    `--config` comes first: a flag before it would yield to it.
    """
    argv = []
    for name, value in sorted(options.items(), key=lambda option: option[0] != "config"):
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
            continue
        if isinstance(value, dict):
            value = [f"{key}={'null' if item is None else item}" for key, item in value.items()]
        values = value if isinstance(value, list) else ["null" if value is None else value]
        argv += [f"--{name}", *map(str, values)]
    return argv


def _run(content: dict[str, Any], point: dict[str, Any], folder: Path, ngpus: int | None) -> SweepRun:
    options, measure = _merged(content["pretrain"], point), content["measure"]
    for rule in content.get("adjust", []):
        if _matches(point, rule["when"]):
            options, measure = _merged(options, rule.get("set", {})), _merged(measure, rule.get("measure", {}))
    pretrain = folder / "pretrain"
    steps = [Step("pretrain", (*flags(options), "--output_dir", str(pretrain)), options, pretrain, ngpus=ngpus)]
    for label in map(str, content.get("checkpoints", [LAST])):
        source = pretrain / f"checkpoint-{label}.pth"
        for task, given in measure.items():
            target, given = folder / f"{task}-{label}", given or {}
            argv = (*flags(given), "--finetune", str(source), "--output_dir", str(target))
            if task == "evaluate":
                argv = (str(source), *flags(given), "--output", str(target / "result.json"))
            steps.append(Step(task, argv, given, target, source, label, ngpus))
    return SweepRun(point, folder, tuple(steps))


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Update `first` with `second`; keys with a dot reach into a mapping: `masking_args.delta_r`."""
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in first.items()}
    for name, value in second.items():
        outer, dot, inner = name.partition(".")
        if not dot and not isinstance(value, dict):
            merged[name] = value
            continue
        before = merged.get(outer) or {}
        if not isinstance(before, dict):
            raise ValueError(f"{outer}: {before} must be a mapping, such as {{name: value}}, to take {name}: {value}")
        merged[outer] = {**before, **({inner: value} if dot else value)}
    return merged


def _matches(point: dict[str, Any], condition: dict[str, Any]) -> bool:
    """Return whether the point has the condition's values; a list means any of them."""
    return all(point[name] in (value if isinstance(value, list) else [value]) for name, value in condition.items())
