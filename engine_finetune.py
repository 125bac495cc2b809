"""Train and evaluate classifiers: what fine-tuning and linear probing share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping

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

# Far above the logits of a head that learns. Momentum carries the weights on from there, but not to infinity, which no
# checkpoint could hold.
_DIVERGED = 1e10


class Classification(Method):
    """Cross entropy of a classifier on labelled images.

    Args:
        model: images (N, C, H, W) -> logits (N, classes).
        views: PIL image -> uint8 tensor, for training.
        prepare: batch -> images, and classes (N,) or probabilities (N, classes), on the device.
        smoothing: label smoothing; with mixup it is in the targets and must be 0 here.
        heads: names, where the model has several heads and gives (heads, N, classes). Each learns as if it were alone.

    Attributes:
        rate_of_epoch: whole epoch -> learning rate, where that does not change with each step.
        diverged: (heads,) bool, of several heads, which has learnt no more at some step.
    """

    rate_of_epoch: Callable[[float], float] | None = None

    def __init__(
        self,
        model: nn.Module,
        views: Callable,
        prepare: Prepare,
        smoothing: float = 0.0,
        heads: Collection[str] = (),
    ):
        super().__init__(model)
        self.views, self.prepare, self.smoothing = views, prepare, smoothing
        self.terms = tuple(heads) or ("cross_entropy",)
        self.diverged = torch.zeros(len(self.terms), dtype=torch.bool)

    def inputs(self, micro_batch: MicroBatch, seed: int, device: torch.device) -> Inputs:
        """Put a batch on the device, with its targets."""
        images, targets = self.prepare(micro_batch.batch)
        return Inputs([images], targets=targets)

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Count the images: nothing is masked."""
        images = inputs.views[0]
        return Plan(dict.fromkeys(self.terms, torch.full((), float(len(images)), device=images.device)))

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Sum the cross entropy over the images, for each head."""
        logits = dict(zip(self.terms, self._stopped(by_head(self.model(inputs.views[0]))), strict=True))
        how = {"label_smoothing": self.smoothing, "reduction": "sum"}
        return {
            name: Loss(F.cross_entropy(each, inputs.targets, **how), plan.counts[name]) for name, each in logits.items()
        }

    def _stopped(self, logits: torch.Tensor) -> torch.Tensor:
        """Take 0 for the logits (heads, N, classes) of a head that diverged: no gradient, and the others learn on."""
        if len(logits) == 1:
            return logits
        over = ~(logits.detach().abs() < _DIVERGED).flatten(1).all(dim=1)
        self.diverged = self.diverged.to(over.device) | over
        return torch.where(self.diverged[:, None, None], 0.0, logits)

    def schedule(self, at: At, lr: float, weight_decay: float) -> tuple[float, float]:
        """Return the learning rate, that of the whole epoch with `rate_of_epoch`, and the weight decay."""
        return lr if self.rate_of_epoch is None else self.rate_of_epoch(int(at.epoch)), weight_decay


def by_head(logits: torch.Tensor) -> torch.Tensor:
    """Return logits (N, classes) or (heads, N, classes) as (heads, N, classes), in fp32."""
    return logits.float().reshape(-1, *logits.shape[-2:])


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
    n_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for epoch in job.epochs():
        train = train_one_epoch(method, job, update, epoch)
        if diverged := [name for name, over in zip(method.terms, method.diverged.tolist(), strict=True) if over]:
            context.log.say(f"epoch {epoch}: diverged, and learn no more: {' '.join(diverged)}; lower --blrs")
        world.average_buffers(model)
        test = evaluate_now(epoch)
        state.best = max(state.best, test["acc1"])
        context.log.say(_describe(f"epoch {epoch}", test, state.best))
        context.log.scalars({f"test/{name}": value for name, value in test.items()}, (epoch + 1) * len(loader))
        line = {f"train_{name}": value for name, value in train.items()}
        line |= {f"test_{name}": value for name, value in test.items()}
        line |= {"test_acc1_best_epoch": state.best, "epoch": epoch, "n_parameters": n_parameters}
        context.log.epoch(line)
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
    model: nn.Module,
    batches: Iterable,
    prepare: Prepare,
    device: torch.device,
    amp: str = "none",
    heads: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Measure the accuracy over all processes, each image counted once.

    Args:
        model: the bare module, not in DistributedDataParallel: processes may have different numbers of batches.
        batches: this process's share of the images, without padding.
        prepare: batch -> images and classes (N,) on the device.
        device, amp: where and in which format.
        heads: name -> base learning rate, where the model has several heads.

    Returns:
        loss (mean cross entropy), acc1 and acc5 (percent), images (counted, over all processes). With `heads` they are
        those of the head with the highest acc1, chosen on these very images; its rate is best_blr, and each head has
        its own loss, acc1 and acc5 with its name appended.
    """
    suffixes = [f"_{name}" for name in heads] if heads else [""]
    model.eval()
    averages, counted = Averages(device), torch.zeros((), device=device)
    # Every process needs every name, also one without images.
    for name, suffix in itertools.product(("loss", "acc1", "acc5"), suffixes):
        averages.add(name + suffix, 0.0, 0.0)
    for batch in batches:
        images, targets = prepare(batch)
        with precision.autocast(amp, device):
            logits = by_head(model(images))
        for suffix, each in zip(suffixes, logits, strict=True):
            hits = each.topk(min(5, each.shape[1]), dim=1).indices == targets[:, None]  # (N, 5)
            averages.add(f"loss{suffix}", F.cross_entropy(each, targets, reduction="sum"), len(images))
            averages.add(f"acc1{suffix}", 100.0 * hits[:, :1].sum(), len(images))
            averages.add(f"acc5{suffix}", 100.0 * hits.sum(), len(images))
        counted += len(images)
    found = averages.read()
    if heads:
        best = max(heads, key=lambda name: found[f"acc1_{name}"])
        found = {name: found[f"{name}_{best}"] for name in ("loss", "acc1", "acc5")} | {"best_blr": heads[best]} | found
    return found | {"images": int(world.all_reduce(counted))}


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
        result = evaluate(model, shown, prepare, context.device, context.amp, settings.heads)
        if epoch is None:
            return result | {"bad_images": images.bad.collect(context.device)}
        return result | {"bad_images": job.exits.count_bad(images.bad, epoch, len(job.loader), job.averages)}

    return evaluate_now


def statistics(settings: SupervisedSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation for normalisation."""
    return transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)


def _describe(when: str, test: dict[str, float], best: float) -> str:
    head = f" of the best head, --blr {test['best_blr']:g}, chosen on these images" if "best_blr" in test else ""
    return (
        f"{when}: accuracy on {test['images']} validation images{head}: {test['acc1']:.2f}% "
        f"(top 5 {test['acc5']:.2f}%, loss {test['loss']:.4f}); best epoch so far, chosen on these images: {best:.2f}%"
        # What scripts around MAE look for in its output.
        f"\n* Acc@1 {test['acc1']:.3f} Acc@5 {test['acc5']:.3f} loss {test['loss']:.3f}"
    )
