#!/usr/bin/env python3
"""Linear probing: train a linear classifier on a frozen encoder. `--help` lists the settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer

import engine_finetune
import models_vit
from util import cli, optim, terminal
from util.config import LinprobeSettings
from util.data import transforms
from util.training.context import Context
from util.training.inputs import Inputs, find_start, open_inputs


def main(argv: list[str] | None = None) -> None:
    """Probe as the command line says."""
    terminal.protect()
    settings = cli.parse(LinprobeSettings, argv)

    def build(num_classes: int, with_head: bool = True) -> VisionTransformer:
        model = models_vit.build_model(settings, num_classes)
        if with_head:
            add_head(model, settings)
        return model

    multiple = 2 if settings.batch_norm else 1  # BatchNorm needs two images
    with cli.exit_on_user_error():
        inputs = open_inputs(settings, build, multiple)
    with Context.start(settings, inputs.images, lambda: find_start(settings, inputs, build, multiple)) as context:
        train(context, inputs, build)


def train(context: Context, inputs: Inputs, build: Callable[..., VisionTransformer]) -> None:
    """Build the model and the optimizer, and train, or only evaluate."""
    settings = context.settings
    model = build(inputs.num_classes, with_head=False)
    if inputs.weights is not None:
        encoder = {name: tensor for name, tensor in inputs.weights.items() if not name.startswith("head.")}
        model.load_state_dict(encoder, strict=False)
    add_head(model, settings)
    context.place(model)
    if settings.eval:
        engine_finetune.evaluate_only(context, inputs, model)
        return
    normalize = transforms.Normalize(*engine_finetune.statistics(settings)).to(context.device)

    def prepare(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = (tensor.to(context.device, non_blocking=True) for tensor in batch)
        return normalize(images), targets

    size, scale = model.patch_embed.img_size, tuple(settings.crop_scale)
    views = transforms.probe_transform(size, scale, settings.hflip, settings.crop)
    method = engine_finetune.Classification(model, views, prepare, heads=settings.heads)
    if settings.lr_per == "epoch":
        method.rate_of_epoch = context.learning_rate
    engine_finetune.fit(context, inputs, method, make_optimizer(model, context), 2 if settings.batch_norm else 1)


def add_head(model: VisionTransformer, settings: LinprobeSettings) -> None:
    """Freeze the model and give it the head, or heads, that the settings name."""
    models_vit.add_probe_head(
        model,
        settings.probe_blocks,
        heads=len(settings.blrs),
        batch_norm=settings.batch_norm,
        last_blocks=settings.last_blocks,
        append_mean=settings.append_mean,
    )


def make_optimizer(model: VisionTransformer, context: Context) -> torch.optim.Optimizer:
    """Build the optimizer; each of several heads is a group, with a learning rate of its own."""
    settings, groups = context.settings, [{"params": list(model.head.parameters())}]
    if settings.blrs:
        groups = optim.head_groups(model.head[1], settings.blrs)
    if settings.optimizer == "sgd":
        return optim.probe_sgd(groups, settings.weight_decay, context.device)
    return optim.LARS(groups, weight_decay=settings.weight_decay)


if __name__ == "__main__":
    main()
