"""What a sweep costs: operations (FLOPs) counted on tensors without content, and GPU hours derived from them.

A method is built without memory and takes one step on two such images under torch's counter; nothing is computed. Only
matrix products and convolutions are counted, the backward pass as twice the forward pass. Not counted: data, optimizer,
norms, the products under the salience (below 1%).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import masking
import methods
import models_vit
from masking.base import check as masked_blank
from methods import At, Inputs, Method
from methods.base import channel_statistics
from models_base import keep_blocks
from studies.trial import Step, SweepRun
from util.config import PretrainSettings, Settings, SupervisedSettings, names_of_kind
from util.data import datasets, transforms
from util.data.step_loader import MicroBatch

GPU, PEAK, GPUS = "A6000", 154.8e12, 8  # FLOP/s of each, nominal: bf16, dense
# Of the peak, in training. Assumed: an H200 reached 28% to 44% of its measured peak (docs/BENCHMARKS.md), which is less
# than the nominal one.
SHARE = 0.3
IMAGENET = 1_281_167, 50_000  # images for training and for validation
_BATCH = 2
_COUNTED: dict[tuple, float] = {}  # of methods, encoders and classifiers; a count takes seconds
# What decides the FLOPs, besides how many patches are kept and thrown.
_DECISIVE = names_of_kind(PretrainSettings, "result") | {"grad_checkpointing"}
_DECISIVE -= {"masking", "masking_args", "mask_ratio", "masking_warmup_epochs", "epochs", "warmup_epochs", "seed"}
_DECISIVE -= {"blr", "lr", "min_lr", "weight_decay", "clip_grad", "data_path", "resume", "finetune"}


def describe(runs: list[SweepRun]) -> list[str]:
    """Return lines that say what is left of `runs` costs, each step by its task, and what could not be counted."""
    found, flops, number, failed, notes = {}, defaultdict(float), defaultdict(int), defaultdict(int), set()
    for run in runs:
        for step in run.left():
            settings = step.settings or run.steps[0].settings
            try:
                place = settings.dataset, settings.data_path, settings.in_chans
                if place not in found:
                    found[place] = images_of(settings)
                images, note = found[place]
                flops[step.task] += step_flops(step, run.steps[0].settings, images)
            except Exception as error:  # a method or mask of the user's own may fail in any way
                failed[f"{step.task} ({type(error).__name__}: {error})"] += 1
                continue
            number[step.task] += 1
            notes.add(note)
            if step.task == "pretrain" and "amr" in settings.masking:
                notes.add(f"{settings.masking} at its base ratio")
    rows = [
        f"{number[task]:5} x {task:9} {total:8.2g} FLOP {_hours(total):>9} GPU hours" for task, total in flops.items()
    ]
    total = sum(flops.values())
    first = (
        f"{sum(number.values())} commands: {_hours(total)} GPU hours, {_hours(total / GPUS)} h on {GPUS} x {GPU}, "
        f"if each reaches {SHARE:.0%} (assumed) of its {PEAK / 1e12:g} TFLOP/s (bf16, dense)"
    )
    counted = [f"counted, not measured, {'; '.join(sorted(notes))}"] if notes else []
    return [first, *rows, *counted, *(f"NOT counted: {times} x {what}" for what, times in failed.items())]


def _hours(flops: float) -> str:
    hours = flops / (SHARE * PEAK) / 3600
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def images_of(settings: Settings) -> tuple[tuple[int, int], str]:
    """Return how many images there are for training and for validation, and a note that says whose they are.

    Raises:
        ValueError: they are there, and cannot be read.
    """
    here = settings.dataset == "digits" or (
        settings.dataset in ("folder", "wds") and settings.data_path and Path(settings.data_path).exists()
    )
    if not here:
        place = settings.data_path or "--data_path"
        return IMAGENET, f"on ImageNet-1K's {IMAGENET[0]:,} + {IMAGENET[1]:,} images, because {place} is not here"
    loader = getattr(settings, "loader", None)
    train = len(datasets.open_unlabelled(settings.dataset, settings.data_path, settings.in_chans, loader))
    val = 0
    with contextlib.suppress(ValueError):  # images without labels have no such set
        val = len(datasets.open_labelled(settings.dataset, settings.data_path, "val", settings.in_chans))
    return (train, val), f"on {train:,} + {val:,} images of {settings.data_path or settings.dataset}"


def step_flops(step: Step, pretrain: PretrainSettings, images: tuple[int, int]) -> float:
    """Count the FLOPs of one command of a sweep.

    Args:
        step: the command.
        pretrain: settings of the pre-training that it is or measures.
        images: numbers for training and for validation.
    """
    if step.task == "pretrain":
        return pretrain_flops(pretrain, images[0])
    if step.task == "evaluate":
        asked = step.given.get("train_images"), step.given.get("val_images")
        seen = sum(min(number, wanted or number) for number, wanted in zip(images, asked, strict=True))
        return seen * _once(("encoder", *_key(pretrain)), lambda: encoder_flops(pretrain))
    settings = step.settings
    key = step.task, settings.model, settings.size("input_size"), settings.size("patch_size"), settings.in_chans
    key += (getattr(settings, "probe_blocks", None), settings.pools)
    forward = _once(key, lambda: classifier_flops(settings))
    passes = 1 if step.task == "linprobe" else 4 if settings.grad_checkpointing else 3  # the probed encoder is frozen
    return (settings.last_epoch + 1) * forward * (passes * images[0] + images[1])


def pretrain_flops(settings: PretrainSettings, num_images: int) -> float:
    """Count the FLOPs of a pre-training up to its last epoch, its random epochs and its attention maps included."""
    epochs = settings.last_epoch + 1
    random = min(settings.masking_warmup_epochs, epochs)
    method, total = _build(settings), 0.0
    for epoch, number in ((0, random), (random, epochs - random)):
        if number:
            mask = FixedCounts.of(method, At(0, float(epoch), settings.epochs))
            key = "method", mask, *_key(settings)
            total += number * num_images * _once(key, lambda mask=mask: method_flops(settings, mask))
    if method.maps is not None:
        looks = sum(method.maps.due(epoch) for epoch in range(epochs))
        total += looks * num_images * _once(("encoder", *_key(settings)), lambda: encoder_flops(settings))
    return total


def _once(key: tuple, count: Callable[[], float]) -> float:
    if key not in _COUNTED:
        _COUNTED[key] = count()
    return _COUNTED[key]


def _key(settings: PretrainSettings) -> tuple:
    return tuple(repr(getattr(settings, name)) for name in sorted(_DECISIVE))


@dataclasses.dataclass(frozen=True)
class FixedCounts:
    """A strategy with masks as large as another's, which asks for as much and does not look at it.

    Attributes:
        keep, thrown: tokens of each image.
        needs, reads_tokens: as of every strategy.
    """

    keep: int
    thrown: int = 0
    needs: frozenset[str] = frozenset()
    reads_tokens: bool = False

    @staticmethod
    def of(method: Method, at: At) -> FixedCounts:
        """Take the counts of a method's strategy at a moment of the training; of AMR at the base ratio."""
        strategy, embed = copy.copy(method.strategy_at(at)), method.model.patch_embed
        if hasattr(strategy, "delta_r"):
            strategy.delta_r = Fraction(0)
        mask = masked_blank(strategy, embed.num_patches, grid=embed.grid_size, offers=masking.NEEDS)
        asks = masking.base.needs(strategy), masking.reads_tokens(strategy)
        return FixedCounts(int(mask.num_keep[0]), mask.host_thrown[0], *asks)

    def __call__(self, tokens: torch.Tensor, noise: torch.Tensor | None = None, **needed) -> masking.Mask:
        """Mask tokens (N, L, D) by noise (N, L)."""
        return masking.mask_from_scores(masking.draw_noise(tokens, noise), self.keep, num_thrown=self.thrown)


def method_flops(settings: PretrainSettings, mask: FixedCounts) -> float:
    """Count the FLOPs of one image in a step: once what needs no gradient, three times the forward pass."""
    method = _build(settings)
    object.__setattr__(method, "strategy", mask)
    method.masking_warmup_epochs = 0
    inputs, at = blank_inputs(method, settings), At(0, 0.0, settings.epochs)
    with without_content(method.train()) as counter:
        plan = method.choose(inputs, at)
        chosen = counter.get_total_flops()
        method(inputs, plan, at)
        forward = counter.get_total_flops() - chosen
    return (chosen + (4 if settings.grad_checkpointing else 3) * forward) / _BATCH


def blank_inputs(method: Method, settings: PretrainSettings) -> Inputs:
    """Return what `method` makes of two black images; where it draws mask ratios, at their mean."""
    method.set_normalize(transforms.Normalize(*channel_statistics(settings)))  # its own is on the meta device
    height, width = method.model.patch_embed.img_size
    picture = torch.zeros(2 * height, 2 * width, settings.in_chans, dtype=torch.uint8)
    if not getattr(method.views, "takes_pixels", False):
        picture = v2.functional.to_pil_image(picture.permute(2, 0, 1))
    batch = MicroBatch(
        default_collate([(method.views(picture),)] * _BATCH), 0, range(_BATCH), _BATCH, list(range(_BATCH))
    )
    inputs = method.inputs(batch, 0, torch.device("cpu"))
    if inputs.ratios is None:
        return inputs
    steps = [method.draw_ratios(dataclasses.replace(batch, step=step), 0).rows for step in range(500)]
    mean = sum(map(sum, steps)) / sum(map(len, steps))
    return inputs._replace(ratios=inputs.ratios._replace(rows=(mean,) * len(inputs.ratios.rows)))


def encoder_flops(settings: PretrainSettings) -> float:
    """Count the FLOPs of the encoder on one whole image."""
    model = _build(settings).model
    with without_content(model) as counter:
        model.encode(model.embed(torch.zeros(1, settings.in_chans, *model.patch_embed.img_size)), None)
    return counter.get_total_flops()


def classifier_flops(settings: SupervisedSettings) -> float:
    """Count the FLOPs of the forward pass of one image through a classifier."""
    with torch.device("meta"):
        model = models_vit.build_model(settings, settings.nb_classes or 1000)
    keep_blocks(model, getattr(settings, "probe_blocks", None))
    with without_content(model.eval()) as counter:
        model(torch.zeros(1, settings.in_chans, *model.patch_embed.img_size))
    return counter.get_total_flops()


def _build(settings: PretrainSettings) -> Method:
    with torch.device("meta"):
        return methods.from_settings(settings)


@contextlib.contextmanager
def without_content(module: nn.Module) -> Iterator[FlopCounterMode]:
    """Count FLOPs in the block, in which the tensors of `module`, and all new ones, have no more than a shape."""
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        module.to_empty(device="cpu")
        with FlopCounterMode(display=False) as counter:
            yield counter
