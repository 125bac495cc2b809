"""What fine-tuning and linear probing share: opening their inputs, and the epochs with evaluation after each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import engine_finetune
import models_vit
from util import checkpoint, dist, precision, resume, run, transforms
from util.batches import evaluation_loader
from util.config import SupervisedSettings
from util.datasets import ImageSet, SeededImages, open_labelled
from util.log import Averages
from util.step import GradientStep


@dataclass
class Inputs:
    """What the settings name, opened and checked."""

    train: ImageSet | None  # None with --eval
    val: ImageSet
    num_classes: int
    resumed: dict | None  # checkpoint to continue
    weights: dict[str, torch.Tensor] | None  # part of a checkpoint to start from; with --eval all of it


def check(settings: SupervisedSettings, build: Callable[[int, bool], VisionTransformer], multiple: int = 1) -> Inputs:
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
        return Inputs(train, val, num_classes, None, None)
    if settings.eval:
        state = checkpoint.model_state(content, start)
        checkpoint.check_state(start, model, state)
        return Inputs(train, val, num_classes, None, state)
    if start == settings.finetune and not settings.resume:
        return Inputs(train, val, num_classes, None, _fit(start, content, bare))
    return Inputs(train, val, num_classes, resume.check(start, content, model, plan), None)


def _start(settings: SupervisedSettings) -> tuple[str | Path | None, dict | None]:
    """Path and content of: own last checkpoint, --resume, --finetune, nothing; with --eval own last comes last."""
    named = settings.resume or settings.finetune
    own = None if settings.eval and named else checkpoint.find_own(settings.output_dir)
    if own is not None:
        return own
    if named:
        return named, checkpoint.load(named)
    if settings.eval:
        raise ValueError("--eval: name the checkpoint to evaluate with --resume or --finetune")
    return None, None


def _number_classes(settings: SupervisedSettings, val: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    extra = sorted(set(val.classes) - set(classes))
    if extra:
        raise ValueError(f"--data_path {settings.data_path}: classes of val/ that train/ has not: {extra[:5]}")
    return val if val.classes == classes else val.relabelled(classes)


def _fit(path: str, content: dict, bare: VisionTransformer) -> dict[str, torch.Tensor]:
    grid = content.get("grid")
    try:
        return models_vit.fit_state(bare, checkpoint.model_state(content, path), tuple(grid) if grid else None)
    except ValueError as error:
        raise ValueError(f"--finetune {path}: {error}") from error


def _open(settings: SupervisedSettings, split: str) -> ImageSet:
    return open_labelled(settings.dataset, settings.data_path, split, settings.in_chans)


def build_model(settings: SupervisedSettings, num_classes: int, drop_path: float = 0.0) -> VisionTransformer:
    """The classifier that the settings name, with a plain linear head."""
    return models_vit.create_model(
        settings.model,
        num_classes=num_classes,
        img_size=settings.size("input_size"),
        patch_size=settings.size("patch_size"),
        in_chans=settings.in_chans,
        global_pool=settings.pools,
        drop_path=drop_path,
    )


@dataclass
class Task:
    """Everything the epochs need that differs between fine-tuning and probing.

    Attributes:
        model: the classifier, on the device, bare.
        optimizer: over its trained parameters.
        transform: PIL image -> uint8 tensor, for training.
        prepare: batch -> images and targets on the device, for training.
        smoothing: label smoothing of the loss.
        multiple: of which the micro-batches must be.
    """

    model: VisionTransformer
    optimizer: torch.optim.Optimizer
    transform: Callable
    prepare: engine_finetune.Prepare
    smoothing: float = 0.0
    multiple: int = 1


def fit(job: run.Run, inputs: Inputs, task: Task) -> None:
    """Train and evaluate for the epochs that are left; save and log after each."""
    settings, bare = job.settings, task.model
    job.classes = inputs.train.classes
    evaluate = evaluator(job, inputs, bare)
    scaler = precision.grad_scaler(job.amp, job.device)
    loader = job.step_loader(inputs.train, task.transform, task.multiple)
    job.restore(bare, task.optimizer, scaler, len(loader))
    if settings.compile:
        bare.compile()
    model: nn.Module = dist.wrap(bare, job.device, loader.plan.accumulates)
    nominal_images = settings.batch_size * loader.plan.accum_iter
    update = GradientStep(model, task.optimizer, scaler, nominal_images, settings.clip_grad)
    loop = job.loop(loader, task.optimizer)
    for epoch in job.epochs():
        train = engine_finetune.train_one_epoch(
            model, loop, update, epoch, prepare=task.prepare, smoothing=task.smoothing, amp=job.amp
        )
        dist.average_buffers(bare)
        test = evaluate(epoch, loop.averages)
        job.best = max(job.best, test["acc1"])
        job.log.say(_describe(f"epoch {epoch}", test, job.best))
        job.log.scalars({f"test/{name}": value for name, value in test.items()}, (epoch + 1) * len(loader))
        line = {f"train_{name}": value for name, value in train.items()}
        line |= {f"test_{name}": value for name, value in test.items()}
        job.log.epoch(line | {"test_acc1_best_epoch": job.best, "epoch": epoch})
        job.save_epoch(epoch)
    if job.start_epoch >= settings.epochs:
        job.signals.leave_at_once()
        job.log.say(_describe("finished before", evaluate(), job.best))
    job.finish()


def evaluate_only(job: run.Run, inputs: Inputs, model: VisionTransformer) -> None:
    """`--eval`: accuracy of a checkpoint, nothing else."""
    model.load_state_dict(inputs.weights)
    job.signals.leave_at_once()
    test = evaluator(job, inputs, model)()
    job.log.say(_describe("evaluated", test, test["acc1"]))
    job.finish()


def evaluator(job: run.Run, inputs: Inputs, model: VisionTransformer) -> Callable[..., dict[str, float]]:
    """A function that evaluates `model` as it is now on all validation images, each counted once.

    After an epoch of training it takes the epoch and its averages, so that a run that is stopped in the middle of the
    evaluation continues with it.
    """
    settings = job.settings
    transform = transforms.evaluation_transform(model.patch_embed.img_size, settings.crop_pct)
    normalize = transforms.Normalize(*statistics(settings)).to(job.device)
    indices = range(dist.rank(), len(inputs.val), dist.world_size())
    if not settings.dist_eval:  # the first process counts all images, the others none
        indices = range(len(inputs.val) if dist.is_main() else 0)
    images = SeededImages(inputs.val, transform, settings.seed, settings.max_bad_images)
    batches = evaluation_loader(
        images,
        indices,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        pin_memory=job.pin_memory,
    )

    def prepare(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = (tensor.to(job.device, non_blocking=True) for tensor in batch)
        return normalize(images), targets

    rounds = job.agreement.maximum(len(batches))[0]

    def evaluate(epoch: int | None = None, averages: Averages | None = None) -> dict[str, float]:
        shown = batches if epoch is None else job.checked(batches, rounds, epoch, averages)
        result = engine_finetune.evaluate(model, shown, prepare, job.device, job.amp)
        return result | {"bad_images": images.bad.collect(job.device)}

    return evaluate


def statistics(settings: SupervisedSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation for normalisation."""
    return transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)


def _describe(when: str, test: dict[str, float], best: float) -> str:
    return (
        f"{when}: accuracy on {test['images']} validation images: {test['acc1']:.2f}% (top 5 {test['acc5']:.2f}%, "
        f"loss {test['loss']:.4f}); best epoch so far, chosen on these images: {best:.2f}%"
    )
