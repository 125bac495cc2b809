"""Open and check what the settings of fine-tuning and linear probing name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from util.config import SupervisedSettings
from util.data import transforms
from util.data.datasets import ImageSet, check_several_classes, open_labelled
from util.kinds import check_kinds
from util.training import checkpoint, fitting, foreign, resume
from util.training.context import step_plan
from util.training.following import follow


@dataclass
class Inputs:
    """What the settings name, opened and checked."""

    train: ImageSet | None  # None with --eval
    val: ImageSet
    num_classes: int
    weights: dict[str, torch.Tensor] | None = None  # part of a checkpoint to start from; with --eval all of it
    notes: list[str] = field(default_factory=list)  # for the log

    @property
    def images(self) -> dict[str, ImageSet]:
        """Return the images, by what they are for."""
        named = {"training": self.train, "validation": self.val}
        return {title: images for title, images in named.items() if images is not None}


Build = Callable[[int, bool], VisionTransformer]


def open_inputs(settings: SupervisedSettings, build: Build, multiple: int = 1) -> Inputs:
    """Open what the settings name; of checkpoints only the one that `--eval` evaluates.

    Args:
        settings: of the task.
        build: (number of classes, with the task's own head) -> the model.
        multiple: of which the micro-batches must be.

    Raises:
        ValueError: for anything that cannot work, before anything expensive.
    """
    transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)
    start, content = _start(settings) if settings.eval else (None, {})
    notes = follow(settings, content, start) if settings.eval else []
    train = None if settings.eval else _open(settings, "train")
    if train is not None:
        check_several_classes(train)
    val = _open(settings, "val")
    if train is not None:
        val = val.relabelled(train.classes, f"--data_path {settings.data_path}")
    elif content.get("classes"):
        val, unlike = _numbered_as(tuple(content["classes"]), val, start, settings)
        notes += unlike
    elif val.classes != _in_order(val.classes):
        notes.append(
            f"{start}: names no classes; those of --data_path {settings.data_path} are taken in the order of "
            f"their names as text: {', '.join(val.classes[:3])}, ..."
        )
    if settings.nb_classes is not None and settings.nb_classes < len(val.classes):
        raise ValueError(f"--nb_classes {settings.nb_classes}: the pictures have {len(val.classes)} classes")
    num_classes = settings.nb_classes or len(val.classes)
    with torch.device("meta"):
        model = build(num_classes, True)
    if train is not None:
        step_plan(settings, len(train), multiple)
        return Inputs(train, val, num_classes)
    state = checkpoint.model_state(content, start)
    _check_classifier(start, state)
    checkpoint.check_state(start, model, state)
    return Inputs(train, val, num_classes, state, notes)


def find_start(settings: SupervisedSettings, inputs: Inputs, build: Build, multiple: int = 1) -> dict | None:
    """Return the checkpoint to continue, or None, with `inputs.weights` if there are some to start from.

    Raises:
        ValueError: what there is does not fit.
    """
    if inputs.train is None:
        return None
    start, content = _start(settings)
    if content is None:
        inputs.notes = follow(settings, None, None)
        return None
    inputs.notes = follow(settings, content, start)
    with torch.device("meta"):
        bare, model = build(inputs.num_classes, False), build(inputs.num_classes, True)
    if start == settings.finetune and not settings.resume:
        inputs.weights, notes = fitting.start_from(start, content, bare, fitting.fit_classifier)
        inputs.notes += notes
        return None
    plan = step_plan(settings, len(inputs.train), multiple)
    return resume.check(start, content, model, plan, inputs.train)


def _start(settings: SupervisedSettings) -> tuple[str | Path | None, dict | None]:
    """Find path and content of: own last checkpoint, --resume, --finetune, nothing; with --eval own last comes last."""
    named = settings.resume or settings.finetune
    own = None if settings.eval and named else checkpoint.find_own(settings.output_dir)
    if own is None and not named:
        if settings.eval:
            raise ValueError("--eval: name the checkpoint to evaluate with --resume or --finetune")
        return None, None
    path, content = own or (named, checkpoint.load(named) if settings.resume else foreign.read(named))
    check_kinds(path, content, {"classes": list[str], "grid": list[int]})
    return path, content


def _numbered_as(
    classes: tuple[str, ...], val: ImageSet, start: str | Path, settings: SupervisedSettings
) -> tuple[ImageSet, list[str]]:
    """Return `val` with its classes numbered as those of the checkpoint `start`, and what is to be said about it.

    Files of other libraries often have other names than the folders (`tench`, `LABEL_0` or `0` for `n01440764`).

    Raises:
        ValueError: `val` has a class that the checkpoint has not, and that is not because all names differ.
    """
    extra = sorted(set(val.classes) - set(classes))
    if not extra:
        return val.relabelled(classes, ""), []
    where = f"--data_path {settings.data_path}"
    if len(extra) == len(val.classes) == len(classes):
        order = _in_order(val.classes)
        return val.relabelled(order, where), [
            f"{start}: names its classes otherwise than {where}; they are taken in the same order: {classes[0]!r} is "
            f"{order[0]!r}, ..., {classes[-1]!r} is {order[-1]!r}"
        ]
    raise ValueError(
        f"{start}: has {len(classes)} classes ({', '.join(classes[:3])}, ...) without {extra[:5]}, which val/ of "
        f"{where} has; name the {len(val.classes)} classes there as in the checkpoint, or take images of those it was "
        "trained on"
    )


def _in_order(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return names in order, numbers in theirs: as text, 10 comes before 2."""
    return tuple(sorted(classes, key=int)) if all(name.isdecimal() for name in classes) else classes


def _check_classifier(path: str | Path, state: dict[str, torch.Tensor]) -> None:
    if not any(name.startswith("head.") for name in state):
        raise ValueError(
            f"{path}: an encoder without a classifier's head, which --eval cannot evaluate; train a head on it with "
            f"--finetune {path} and without --eval, or measure its features with scripts/evaluate.py {path}"
        )


def _open(settings: SupervisedSettings, split: str) -> ImageSet:
    images = open_labelled(settings.dataset, settings.data_path, split, settings.in_chans)
    images.check_pictures(f"--dataset {settings.dataset}", "convert them to uint8")
    return images
