#!/usr/bin/env python3
"""Fine-tune a classifier from a pre-trained encoder. Reads top to bottom as a recipe; `--help` lists the settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer

import engine_finetune
import models_vit
from util import cli, optim, terminal
from util.config import FinetuneSettings
from util.data import transforms
from util.training.context import Context
from util.training.inputs import Inputs, find_start, open_inputs


def main(argv: list[str] | None = None) -> None:
    """Fine-tune as the command line says."""
    terminal.protect()
    settings = cli.parse(FinetuneSettings, argv)
    multiple = 2 if settings.mixes else 1

    def build(num_classes: int, with_head: bool = True) -> VisionTransformer:
        return models_vit.build_model(settings, num_classes, settings.drop_path)

    with cli.exit_on_user_error():
        inputs = open_inputs(settings, build, multiple)
        make_transform(settings, (32, 32))
    with Context.start(settings, inputs.images, lambda: find_start(settings, inputs, build, multiple)) as context:
        train(context, inputs, build)


def train(context: Context, inputs: Inputs, build: Callable[..., VisionTransformer]) -> None:
    """Build the model and the optimizer, and train, or only evaluate."""
    settings = context.settings
    model = build(inputs.num_classes)
    models_vit.init_finetune_head(model)
    if inputs.weights is not None:
        model.load_state_dict(inputs.weights, strict=False)
    context.place(model)
    if settings.eval:
        engine_finetune.evaluate_only(context, inputs, model)
        return
    mean, std = engine_finetune.statistics(settings)
    method = engine_finetune.Classification(
        model,
        make_transform(settings, model.patch_embed.img_size),
        make_prepare(settings, inputs.num_classes, transforms.Normalize(mean, std).to(context.device), context.device),
        smoothing=0.0 if settings.mixes else settings.smoothing,  # with mixup it is in the targets
    )
    optimizer = optim.finetune_adamw(model, settings.weight_decay, settings.layer_decay, context.device)
    engine_finetune.fit(context, inputs, method, optimizer, multiple=2 if settings.mixes else 1)


def make_transform(settings: FinetuneSettings, size: tuple[int, int]) -> Callable:
    """Return the augmentation on the host."""
    mean, _ = engine_finetune.statistics(settings)
    scale = tuple(settings.crop_scale)
    return transforms.finetune_transform(size, scale, settings.hflip, settings.aa, settings.color_jitter, mean)


def make_prepare(
    settings: FinetuneSettings, num_classes: int, normalize: transforms.Normalize, device: torch.device
) -> Callable[[list], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function: uint8 images and classes -> normalised, erased, mixed, on the device."""
    erase = RandomErasing(
        settings.reprob, mode=settings.remode, min_count=settings.recount, max_count=settings.recount, device=device
    )
    mix = None
    if settings.mixes:
        mix = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            cutmix_minmax=settings.cutmix_minmax or None,
            prob=settings.mixup_prob,
            switch_prob=settings.mixup_switch_prob,
            mode=settings.mixup_mode,
            label_smoothing=settings.smoothing,
            num_classes=num_classes,
        )

    def prepare(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        images = erase(normalize(images)) if settings.reprob > 0 else normalize(images)
        return mix(images, targets) if mix is not None else (images, targets)

    return prepare


if __name__ == "__main__":
    main()
