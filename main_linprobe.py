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
            models_vit.add_probe_head(model, settings.probe_blocks)
        return model

    with cli.exit_on_user_error():
        inputs = open_inputs(settings, build, multiple=2)  # BatchNorm needs two images
    with Context.start(settings, lambda: find_start(settings, inputs, build, 2)) as context:
        train(context, inputs, build)


def train(context: Context, inputs: Inputs, build: Callable[..., VisionTransformer]) -> None:
    """Build the model and the optimizer, and train, or only evaluate."""
    settings = context.settings
    model = build(inputs.num_classes, with_head=False)
    if inputs.weights is not None:
        encoder = {name: tensor for name, tensor in inputs.weights.items() if not name.startswith("head.")}
        model.load_state_dict(encoder, strict=False)
    models_vit.add_probe_head(model, settings.probe_blocks)
    context.place(model)
    if settings.eval:
        engine_finetune.evaluate_only(context, inputs, model)
        return
    normalize = transforms.Normalize(*engine_finetune.statistics(settings)).to(context.device)

    def prepare(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = (tensor.to(context.device, non_blocking=True) for tensor in batch)
        return normalize(images), targets

    size, scale = model.patch_embed.img_size, tuple(settings.crop_scale)
    views = transforms.probe_transform(size, scale, settings.hflip)
    method = engine_finetune.Classification(model, views, prepare)
    optimizer = optim.LARS(model.head.parameters(), weight_decay=settings.weight_decay)
    engine_finetune.fit(context, inputs, method, optimizer, multiple=2)


if __name__ == "__main__":
    main()
