"""Train and evaluate classifiers: what fine-tuning and linear probing share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from engine_pretrain import train_one_epoch
from methods import At, Inputs, Loss, Method, Plan
from util import precision
from util.config import SupervisedSettings
from util.data import transforms
from util.data.datasets import SeededImages
from util.data.step_loader import MicroBatch, evaluation_loader
from util.distributed import world
from util.training import inputs, leaving
from util.training.averages import Averages
from util.training.context import Context
from util.training.epoch import Job
from util.training.state import TrainingState
from util.training.step import GradientStep

Prepare = Callable[[list], tuple[torch.Tensor, torch.Tensor]]  # batch -> images, targets, on the device


class Classification(Method):
    """Cross entropy of a classifier on labelled images.

    Args:
        model: images (N, C, H, W) -> logits (N, classes).
        views: PIL image -> uint8 tensor, for training.
        prepare: batch -> images, and classes (N,) or probabilities (N, classes), on the device.
        smoothing: label smoothing; with mixup it is in the targets and must be 0 here.
    """

    def __init__(self, model: nn.Module, views: Callable, prepare: Prepare, smoothing: float = 0.0):
        super().__init__(model)
        self.views, self.prepare, self.smoothing = views, prepare, smoothing

    def inputs(self, micro_batch: MicroBatch, seed: int, device: torch.device) -> Inputs:
        """Put a batch on the device, with its targets."""
        images, targets = self.prepare(micro_batch.batch)
        return Inputs([images], targets=targets)

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Count the images: nothing is masked."""
        images = inputs.views[0]
        return Plan({"cross_entropy": torch.full((), float(len(images)), device=images.device)})

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Sum the cross entropy over the images."""
        logits = self.model(inputs.views[0]).float()
        loss = F.cross_entropy(logits, inputs.targets, label_smoothing=self.smoothing, reduction="sum")
        return {"cross_entropy": Loss(loss, plan.counts["cross_entropy"])}


def fit(
    context: Context,
    given: inputs.Inputs,
    method: Classification,
    optimizer: torch.optim.Optimizer,
    multiple: int = 1,
) -> None:
    """Train and evaluate for the epochs that are left; save and log after each.

    Args:
        context: of the run.
        given: the images.
        method: the classifier's, on the device.
        optimizer: over its trained parameters.
        multiple: of which the micro-batches must be.
    """
    settings, model = context.settings, method.model
    context.log.say(given.train.summary("training"))
    loader = context.step_loader(given.train, method.views, multiple)
    state = TrainingState(context, method, optimizer, loader)
    state.restore()
    if settings.compile:
        model.compile()
    forward = world.wrap(method, context.device, loader.plan.accumulates)
    update = GradientStep(forward, optimizer, state.scaler, settings.clip_grad)
    job = Job(context, state)
    evaluate_now = evaluator(context, given, model, job)
    for epoch in job.epochs():
        train = train_one_epoch(method, job, update, epoch)
        world.average_buffers(model)
        test = evaluate_now(epoch)
        state.best = max(state.best, test["acc1"])
        context.log.say(_describe(f"epoch {epoch}", test, state.best))
        context.log.scalars({f"test/{name}": value for name, value in test.items()}, (epoch + 1) * len(loader))
        line = {f"train_{name}": value for name, value in train.items()}
        line |= {f"test_{name}": value for name, value in test.items()}
        context.log.epoch(line | {"test_acc1_best_epoch": state.best, "epoch": epoch})
        job.exits.save_epoch(epoch)
    if state.start_epoch > settings.last_epoch:
        context.signals.leave_at_once()
        context.log.say(_describe("finished before", evaluate_now(), state.best))
    job.exits.end()


def evaluate_only(context: Context, given: inputs.Inputs, model: VisionTransformer) -> None:
    """Evaluate a checkpoint, and nothing else (`--eval`)."""
    model.load_state_dict(given.weights)
    context.signals.leave_at_once()
    test = evaluator(context, given, model)()
    context.log.say(_describe("evaluated", test, test["acc1"]))
    leaving.finish(context)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable, prepare: Prepare, device: torch.device, amp: str = "none"
) -> dict[str, float]:
    """Measure the accuracy over all processes, each image counted once.

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


def evaluator(
    context: Context, given: inputs.Inputs, model: VisionTransformer, job: Job | None = None
) -> Callable[..., dict[str, float]]:
    """Return a function that evaluates `model` as it is now on all validation images, each counted once.

    After an epoch of training it takes the number of the epoch, so that a run of `job` that is stopped in the middle of
    the evaluation continues with it.
    """
    settings = context.settings
    context.log.say(given.val.summary("validation"))
    for note in given.notes:
        context.log.say(note)
    transform = transforms.evaluation_transform(model.patch_embed.img_size, settings.crop_pct)
    normalize = transforms.Normalize(*statistics(settings)).to(context.device)
    indices = range(world.rank(), len(given.val), world.world_size())
    if not settings.dist_eval:  # the first process counts all images, the others none
        indices = range(len(given.val) if world.is_main() else 0)
    images = SeededImages(given.val, transform, settings.seed, settings.max_bad_images)
    batches = evaluation_loader(
        images,
        indices,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        pin_memory=context.pin_memory,
    )

    def prepare(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = (tensor.to(context.device, non_blocking=True) for tensor in batch)
        return normalize(images), targets

    rounds = context.agreement.maximum(len(batches))[0]

    def evaluate_now(epoch: int | None = None) -> dict[str, float]:
        shown = batches if epoch is None else job.exits.checked(batches, rounds, epoch, job.averages)
        result = evaluate(model, shown, prepare, context.device, context.amp)
        return result | {"bad_images": images.bad.collect(context.device)}

    return evaluate_now


def statistics(settings: SupervisedSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation for normalisation."""
    return transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)


def _describe(when: str, test: dict[str, float], best: float) -> str:
    return (
        f"{when}: accuracy on {test['images']} validation images: {test['acc1']:.2f}% (top 5 {test['acc5']:.2f}%, "
        f"loss {test['loss']:.4f}); best epoch so far, chosen on these images: {best:.2f}%"
    )
