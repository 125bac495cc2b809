"""Open and check what the settings of fine-tuning and linear probing name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from util.config import SupervisedSettings
from util.data import transforms
from util.data.datasets import ImageSet, open_labelled
from util.kinds import check_kinds
from util.training import checkpoint, resume, run
from util.training.following import follow


@dataclass
class Inputs:
    """What the settings name, opened and checked."""

    train: ImageSet | None  # None with --eval
    val: ImageSet
    num_classes: int
    resumed: dict | None  # checkpoint to continue
    weights: dict[str, torch.Tensor] | None  # part of a checkpoint to start from; with --eval all of it
    notes: list[str] = field(default_factory=list)  # for the log


def open_inputs(
    settings: SupervisedSettings, build: Callable[[int, bool], VisionTransformer], multiple: int = 1
) -> Inputs:
    """Open what the settings name.

    Args:
        settings: of the task.
        build: (number of classes, with the task's own head) -> the model.
        multiple: of which the micro-batches must be.

    Raises:
        ValueError: for anything that cannot work, before anything expensive.
    """
    transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)
    start, content = _start(settings)
    notes = follow(settings, content, start)
    train = None if settings.eval else _open(settings, "train")
    val = _open(settings, "val")
    classes = train.classes if train is not None else tuple(content.get("classes", ())) or val.classes
    val = _number_classes(settings, val, classes)
    if settings.nb_classes is not None and settings.nb_classes < len(classes):
        raise ValueError(f"--nb_classes {settings.nb_classes}: the pictures have {len(classes)} classes")
    num_classes = settings.nb_classes or len(classes)
    with torch.device("meta"):
        bare, model = build(num_classes, False), build(num_classes, True)
    if train is not None:
        plan = run.step_plan(settings, len(train), multiple)
        run.check_output_dir(settings)
    if content is None:
        return Inputs(train, val, num_classes, None, None, notes)
    if settings.eval:
        state = checkpoint.model_state(content, start)
        _check_classifier(start, state)
        checkpoint.check_state(start, model, state)
        return Inputs(train, val, num_classes, None, state, notes)
    if start == settings.finetune and not settings.resume:
        return Inputs(train, val, num_classes, None, _fit(start, content, bare), notes)
    return Inputs(train, val, num_classes, resume.check(start, content, model, plan), None, notes)


def _start(settings: SupervisedSettings) -> tuple[str | Path | None, dict | None]:
    """Path and content of: own last checkpoint, --resume, --finetune, nothing; with --eval own last comes last."""
    named = settings.resume or settings.finetune
    own = None if settings.eval and named else checkpoint.find_own(settings.output_dir)
    if own is None and not named:
        if settings.eval:
            raise ValueError("--eval: name the checkpoint to evaluate with --resume or --finetune")
        return None, None
    path, content = own or (named, checkpoint.load(named))
    check_kinds(path, content, {"classes": list[str], "grid": list[int]})
    return path, content


def _check_classifier(path: str | Path, state: dict[str, torch.Tensor]) -> None:
    if not any(name.startswith("head.") for name in state):
        raise ValueError(
            f"{path}: an encoder without a classifier's head, which --eval cannot evaluate; train a head on it with "
            f"--finetune {path} and without --eval, or measure its features with scripts/evaluate.py {path}"
        )


def _number_classes(settings: SupervisedSettings, val: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    extra = sorted(set(val.classes) - set(classes))
    if extra:
        raise ValueError(f"--data_path {settings.data_path}: classes of val/ that train/ has not: {extra[:5]}")
    return val if val.classes == classes else val.relabelled(classes)


def _fit(path: str, content: dict, bare: VisionTransformer) -> dict[str, torch.Tensor]:
    grid, state = content.get("grid"), checkpoint.model_state(content, f"--finetune {path}")
    try:
        state = checkpoint.fit_state(bare, state, tuple(grid) if grid else None)
    except ValueError as error:
        raise ValueError(f"--finetune {path}: {error}") from error
    checkpoint.check_finite(f"--finetune {path}", state)
    return state


def _open(settings: SupervisedSettings, split: str) -> ImageSet:
    return open_labelled(settings.dataset, settings.data_path, split, settings.in_chans)
