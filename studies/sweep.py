"""A grid of runs: what a sweep file asks for.

A sweep file is YAML:

    output: output/digits_ratios            # one folder for each run in it
    pretrain: {config: configs/pretrain/digits.yaml, epochs: 30}    # flags of main_pretrain.py for all runs
    grid: {masking: [random, sbam], mask_ratio: [0.5, 0.7], seed: [0, 1]}   # one run for each combination
    adjust:                                  # more flags for the runs that match all of `when`
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studies.trial import LAST, Step, SweepRun, text_of
from util import yaml_files
from util.files import expand_home
from util.suggest import check_known

KEYS = ("output", "pretrain", "grid", "adjust", "skip", "checkpoints", "measure")
MEASURES = ("evaluate", "linprobe", "finetune")
_LISTS = {
    "adjust": "[{when: {masking: sbam_amr}, set: {mask_ratio: 0.6}}]",
    "skip": "[{masking: random, seed: 1}]",
    "checkpoints": "[last]",
}


def load(path: str | Path) -> dict[str, Any]:
    """A sweep file, checked. ValueError, in one sentence, for anything that cannot be one."""
    content = yaml_files.load(path)
    if not isinstance(content.get("grid"), dict):
        raise ValueError(f"{path}: a sweep file needs the keys output, pretrain, grid and measure")
    try:
        _check_form(content)
        _check_grid(content)
        content["output"] = expand_home(str(content["output"]))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('--key ')}") from error
    return content


def _check_form(content: dict[str, Any]) -> None:
    for key in content:
        check_known("key", key, KEYS)
    for key in ("output", "pretrain", "grid", "measure"):
        if not content.get(key):
            raise ValueError(f"the key {key} is missing")
    for key in ("pretrain", "measure"):
        _check_mapping(key, content[key])
    for task, given in content["measure"].items():
        check_known("key", task, MEASURES)
        if given is not None:
            _check_mapping(f"measure.{task}", given)
    for key in ("adjust", "skip", "checkpoints"):
        if not isinstance(content.get(key, []), list):
            raise ValueError(f"{key} must be a list, such as {_LISTS[key]}")
    if "epochs" not in content["pretrain"] and "epochs" not in content["grid"]:
        raise ValueError("pretrain.epochs is missing; a run is done when its last epoch is")
    for label in content.get("checkpoints", []):
        if label != LAST and type(label) is not int:
            raise ValueError(f"checkpoints: {label} must be last, or an epoch such as 99")


def _check_grid(content: dict[str, Any]) -> None:
    for name, values in content["grid"].items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{name} must be a list of values")
        twice = [value for place, value in enumerate(values) if value in values[:place]]
        if twice:
            raise ValueError(f"grid.{name} has {text_of(twice[0])} twice")
    for rule in content.get("adjust", []):
        if not isinstance(rule, dict) or rule.keys() != {"when", "set"}:
            raise ValueError(f"adjust: {rule} must have the keys when and set, as in {_LISTS['adjust']}")
        _check_mapping("adjust: set", rule["set"])
    conditions = [("adjust: when", rule["when"]) for rule in content.get("adjust", [])]
    for key, condition in conditions + [("skip: a rule", rule) for rule in content.get("skip", [])]:
        _check_mapping(key, condition)
        for name in condition:
            check_known("key", name, content["grid"])


def _check_mapping(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, such as {{name: value}}, not {value}")


def expand(content: dict[str, Any], output: str | Path | None = None) -> list[SweepRun]:
    """The runs of a sweep; `output` replaces the file's own. ValueError: all are skipped, or two have one name."""
    folder = Path(output or content["output"])
    names = list(content["grid"])
    runs: dict[str, SweepRun] = {}
    for values in itertools.product(*content["grid"].values()):
        point = dict(zip(names, values, strict=True))
        if any(_matches(point, condition) for condition in content.get("skip", [])):
            continue
        name = "-".join(f"{name}={text_of(value)}" for name, value in point.items()).replace("/", "_")
        if name in runs:
            raise ValueError(f"grid: two runs have the name {name}; write their values so that they differ in it")
        runs[name] = _run(content, point, folder / name)
    if not runs:
        raise ValueError("skip: leaves no run out of the grid's combinations; take a rule away")
    return list(runs.values())


def check(runs: Iterable[SweepRun]) -> None:
    """Every command of a training as its own parser sees it, its checkpoints, and what the folders hold.

    Raises:
        ValueError: a run could not work, or its folder holds another one.
    """
    for run in runs:
        for step in run.steps:
            _ = step.settings
        settings = run.steps[0].settings
        every, last = settings.save_every_epochs, settings.epochs - 1
        kept = [e for e in range(settings.epochs) if every is not None and (e % every == 0 or e == last)]
        kept = kept[-settings.keep_last :] if settings.keep_last else kept
        for label in run.labels:
            if label not in (None, LAST) and int(label) not in kept:
                raise ValueError(
                    f"checkpoints: {label}: {run.folder.name} keeps none of this epoch, with --epochs "
                    f"{settings.epochs} --save_every_epochs {every} --keep_last {settings.keep_last}; "
                    f"choose one of {[LAST, *kept]}"
                )
        run.check()


def flags(options: dict[str, Any]) -> list[str]:
    """`{"epochs": 3, "metrics": ["knn"], "masking_args": {"delta": 0.1}}` as command-line flags.

    `--config` comes first: a flag before it would yield to it.
    """
    argv = []
    for name, value in sorted(options.items(), key=lambda option: option[0] != "config"):
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
    steps = [Step("pretrain", (*flags(options), "--output_dir", str(pretrain)), options, pretrain)]
    labels: list[str | None] = [None]
    for label in map(str, content.get("checkpoints", [LAST])):
        source = pretrain / f"checkpoint-{label}.pth"
        for task, given in content["measure"].items():
            target, given = folder / f"{task}-{label}", given or {}
            if task == "evaluate":
                argv = (str(source), *flags(given), "--output", str(target / "result.json"))
            else:
                argv = (*flags(given), "--finetune", str(source), "--output_dir", str(target))
            steps.append(Step(task, argv, given, target, source))
            labels.append(label)
    return SweepRun(point, folder, tuple(steps), tuple(labels))


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """`first` updated with `second`; keys with a dot reach into a mapping: `masking_args.delta_r`."""
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
    """True if the point has the condition's values; a list means any of them."""
    return all(point[name] in (value if isinstance(value, list) else [value]) for name, value in condition.items())
