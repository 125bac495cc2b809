"""Train and evaluate classifiers: what fine-tuning and linear probing share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from util import precision
from util.config import SupervisedSettings
from util.data import transforms
from util.data.datasets import SeededImages
from util.data.step_loader import MicroBatch, evaluation_loader
from util.distributed import world
from util.training.averages import Averages
from util.training.epoch import EpochLoop
from util.training.inputs import Inputs
from util.training.run import Run
from util.training.step import GradientStep, StepOutcome

Prepare = Callable[[list], tuple[torch.Tensor, torch.Tensor]]  # batch -> images, targets, on the device


def train_one_epoch(
    model: nn.Module,
    loop: EpochLoop,
    update: GradientStep,
    epoch: int,
    *,
    prepare: Prepare,
    smoothing: float = 0.0,
    amp: str = "none",
) -> dict[str, float]:
    """Train a classifier for one epoch.

    Args:
        model: images (N, C, H, W) -> logits (N, classes).
        loop: data, learning rates, log.
        update: collects gradients and steps.
        epoch: 0-based.
        prepare: batch -> images and targets; targets are classes (N,) or probabilities (N, classes).
        smoothing: label smoothing; with mixup it is in the targets and must be 0 here.
        amp: bf16, fp16 or none.

    Returns:
        Means over the epoch and all processes: loss, lr, grad_norm.
    """
    model.train()
    return loop.run(
        epoch, update, lambda batches, averages: train_step(model, batches, update, averages, prepare, smoothing, amp)
    )


def train_step(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    update: GradientStep,
    averages: Averages,
    prepare: Prepare,
    smoothing: float = 0.0,
    amp: str = "none",
) -> StepOutcome:
    """One optimizer step: cross entropy, mean over the whole effective batch."""
    num_images, loss_sum = 0, torch.zeros((), device=averages.device)
    for micro_batch in micro_batches:
        images, targets = prepare(micro_batch.batch)
        with update.sync(micro_batch.last):
            with precision.autocast(amp, averages.device):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing, reduction="sum")
            update.backward(loss)
        num_images += len(images)
        loss_sum = loss_sum + loss.detach()
    count = torch.full((), float(num_images), device=averages.device)
    outcome = update.apply(count, loss_sum, num_images)
    averages.add("loss", outcome.counted(loss_sum), outcome.counted(count))
    return outcome


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable, prepare: Prepare, device: torch.device, amp: str = "none"
) -> dict[str, float]:
    """Accuracy over all processes, each image counted once.

    Args:
        model: the bare module, not in DistributedDataParallel: processes may have different numbers of batches.
        batches: this process's share of the images, without padding.
        prepare: batch -> images and classes (N,) on the device.
        device, amp: where and in which format.

    Returns:
        loss (mean cross entropy), acc1 and acc5 (percent), images (counted, over all processes).
    """
    model.eval()
    averages, counted = Averages(device), torch.zeros((), device=device)
    # Every process needs every name, also one without images.
    for name in ("loss", "acc1", "acc5"):
        averages.add(name, 0.0, 0.0)
    for batch in batches:
        images, targets = prepare(batch)
        with precision.autocast(amp, device):
            logits = model(images)
        top5 = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
        hits = top5 == targets[:, None]  # (N, 5)
        averages.add("loss", F.cross_entropy(logits.float(), targets, reduction="sum"), len(images))
        averages.add("acc1", 100.0 * hits[:, :1].sum(), len(images))
        averages.add("acc5", 100.0 * hits.sum(), len(images))
        counted += len(images)
    return averages.read() | {"images": int(world.all_reduce(counted))}


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
    prepare: Prepare
    smoothing: float = 0.0
    multiple: int = 1


def fit(job: Run, inputs: Inputs, task: Task) -> None:
    """Train and evaluate for the epochs that are left; save and log after each."""
    settings, bare = job.settings, task.model
    job.classes = inputs.train.classes
    evaluate = evaluator(job, inputs, bare)
    scaler = precision.grad_scaler(job.amp, job.device)
    loader = job.step_loader(inputs.train, task.transform, task.multiple)
    job.restore(bare, task.optimizer, scaler, len(loader))
    if settings.compile:
        bare.compile()
    model: nn.Module = world.wrap(bare, job.device, loader.plan.accumulates)
    nominal_images = settings.batch_size * loader.plan.accum_iter
    update = GradientStep(model, task.optimizer, scaler, nominal_images, settings.clip_grad)
    loop = job.loop(loader, task.optimizer)
    for epoch in job.epochs():
        train = train_one_epoch(model, loop, update, epoch, prepare=task.prepare, smoothing=task.smoothing, amp=job.amp)
        world.average_buffers(bare)
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


def evaluate_only(job: Run, inputs: Inputs, model: VisionTransformer) -> None:
    """`--eval`: accuracy of a checkpoint, nothing else."""
    model.load_state_dict(inputs.weights)
    job.signals.leave_at_once()
    test = evaluator(job, inputs, model)()
    job.log.say(_describe("evaluated", test, test["acc1"]))
    job.finish()


def evaluator(job: Run, inputs: Inputs, model: VisionTransformer) -> Callable[..., dict[str, float]]:
    """A function that evaluates `model` as it is now on all validation images, each counted once.

    After an epoch of training it takes the epoch and its averages, so that a run that is stopped in the middle of the
    evaluation continues with it.
    """
    settings = job.settings
    for note in inputs.notes:
        job.log.say(note)
    transform = transforms.evaluation_transform(model.patch_embed.img_size, settings.crop_pct)
    normalize = transforms.Normalize(*statistics(settings)).to(job.device)
    indices = range(world.rank(), len(inputs.val), world.world_size())
    if not settings.dist_eval:  # the first process counts all images, the others none
        indices = range(len(inputs.val) if world.is_main() else 0)
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

    def evaluate_now(epoch: int | None = None, averages: Averages | None = None) -> dict[str, float]:
        shown = batches if epoch is None else job.checked(batches, rounds, epoch, averages)
        result = evaluate(model, shown, prepare, job.device, job.amp)
        return result | {"bad_images": images.bad.collect(job.device)}

    return evaluate_now


def statistics(settings: SupervisedSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation for normalisation."""
    return transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)


def _describe(when: str, test: dict[str, float], best: float) -> str:
    return (
        f"{when}: accuracy on {test['images']} validation images: {test['acc1']:.2f}% (top 5 {test['acc5']:.2f}%, "
        f"loss {test['loss']:.4f}); best epoch so far, chosen on these images: {best:.2f}%"
    )
