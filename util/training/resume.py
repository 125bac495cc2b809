"""What a run may continue from: a checkpoint of the same architecture, effective batch and images."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.config import Settings, names_of_kind
from util.data.datasets import ImageSet
from util.data.step_loader import StepPlan
from util.distributed import world
from util.training import checkpoint, training_state

# Settings that change the result, but not that of a run that continues: what it starts from is not read again, and the
# effective batch is compared as a whole.
_NOT_COMPARED = {"resume", "finetune", "batch_size", "accum_iter", "effective_batch_size"}


def check(path: str | Path, content: dict, model: nn.Module, plan: StepPlan, images: ImageSet, maps=None) -> dict:
    """Return `content` of the checkpoint to continue, with its `path`, and `notes` that the run must say.

    Args:
        path: of the checkpoint.
        content: of it.
        model: of this run; the meta device will do.
        plan: of this run's steps.
        images: to train on.
        maps: `methods.attention_maps.AttentionMaps` of a method that needs them, which are of images by number.

    Raises:
        ValueError: it is of another architecture, without an optimizer, of another effective batch size, of other
            classes, or of other images and stopped within an epoch or before one that needs maps of them.
    """
    checkpoint.check_state(path, model, checkpoint.model_state(content, path))
    training_state.check(path, content)
    before, now = content.get("effective_batch_size"), plan.effective_batch_size
    if before is not None and before != now:
        raise ValueError(
            f"{path}: its run had an effective batch of {before} images, this one has {now}; "
            f"continue it with --effective_batch_size {before}, or start a new --output_dir"
        )
    _check_classes(path, content, images.classes)
    change = _changed_images(content, images)
    if change and steps_into_epoch(content, plan.steps_per_epoch):
        raise ValueError(
            f"{path}: it was written within an epoch of {change}; "
            f"continue with the images it had, or start a new --output_dir with --finetune {path}"
        )
    if change and maps is not None and maps.made_after(content["epoch"] + 1) is not None:
        raise ValueError(
            f"{path}: it is of {change}; the attention maps that the next epoch needs are of the former: continue with "
            f"the images it had, or start a new --output_dir with --finetune {path}"
        )
    return content | {"path": str(path), "notes": [f"the checkpoint is of {change}"] if change else []}


def _check_classes(path: str | Path, content: dict, classes: tuple[str, ...]) -> None:
    """Raise ValueError if the classes have changed: the head's outputs would mean others."""
    before = tuple(content.get("classes") or ())
    if not before or before == classes:
        return
    old, new = next(((a, b) for a, b in itertools.zip_longest(before, classes) if a != b))
    raise ValueError(
        f"{path}: it was trained on {len(before)} classes and --data_path has {len(classes)}, of which the first that "
        f"differs was {old!r} and is {new!r}; give the folders their old names, or start a new --output_dir with "
        f"--finetune {path}"
    )


def _changed_images(content: dict, images: ImageSet) -> str:
    """Return how the images of a checkpoint differ from `images`; empty if nothing is known to."""
    before, names = content.get("num_images", len(images)), content.get("names_digest")
    if before != len(images):
        return f"{before} images, and --data_path has {len(images)}"
    if names and images.digest and names != images.digest:
        return f"{before} images, and the {len(images)} of --data_path have other names"
    return ""


def steps_into_epoch(content: dict, steps_per_epoch: int) -> int:
    """Return how many steps of the epoch after `epoch` a checkpoint has done."""
    done = content["epoch"] + 1
    return max(0, content.get("step", 0) - done * content.get("steps_per_epoch", steps_per_epoch))


def load_side_state(method: nn.Module, content: dict, name: str) -> None:
    """Restore what a method keeps outside its model: teacher, centres, heads. ValueError: it does not fit.

    Args:
        method: a `methods.Method`.
        content: of the checkpoint.
        name: the method's, as given.
    """
    saved = content.get("method") or {}
    if not isinstance(saved, dict) or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise ValueError(f"{content['path']}: the state of its method must be a dictionary of tensors")
    difference = checkpoint.describe_difference(method.side_state(), saved)
    if difference:
        before = checkpoint.arguments(content).get("method", "mae")
        raise ValueError(
            f"{content['path']}: trained with --method {before}, whose state is not that of --method {name}: "
            f"{difference}; use the method it was trained with, or start from its weights with --finetune and another "
            "--output_dir"
        )
    method.load_side_state(saved)


def changed_settings(content: dict, settings: Settings) -> list[str]:
    """Return what a continued run does otherwise than before: `--name old -> new`, of what changes the result."""
    before, now = checkpoint.arguments(content), settings.as_dict()
    compared = names_of_kind(type(settings), "result") & before.keys() - _NOT_COMPARED
    names = [name for name in now if name in compared and not _same(name, before[name], now[name], settings)]
    return [f"--{name} {before[name]} -> {now[name]}" for name in names]


def _same(name: str, before: Any, now: Any, settings: Settings) -> bool:
    """Return whether two values mean the same: MAE's files have one size for a list, and what follows from others."""
    if not _listed(now) and before is not None:  # what is not given follows from others
        follows = {"lr": settings.resolved_lr(world.world_size()), "global_pool": getattr(settings, "pools", None)}
        follows |= dict.fromkeys(("nb_classes", "input_size", "patch_size"), before)  # another architecture is refused
        now = follows.get(name, now)
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now)
    return _listed(before) == _listed(now)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
