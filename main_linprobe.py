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
from util.training import run
from util.training.inputs import Inputs, find_start, open_inputs


def main(argv: list[str] | None = None) -> None:
    """Probe as the command line says."""
    terminal.protect()
    settings = cli.parse(LinprobeSettings, argv)

    def build(num_classes: int, with_head: bool = True) -> VisionTransformer:
        model = models_vit.build_model(settings, num_classes)
        if with_head:
            models_vit.add_probe_head(model)
        return model

    with cli.exit_on_user_error():
        inputs = open_inputs(settings, build, multiple=2)  # BatchNorm needs two images
    with run.Run.start(settings, lambda: find_start(settings, inputs, build, 2)) as job:
        train(job, inputs, build)


def train(job: run.Run, inputs: Inputs, build: Callable[..., VisionTransformer]) -> None:
    """Build the model and the optimizer, and train, or only evaluate."""
    settings = job.settings
    model = build(inputs.num_classes, with_head=False)
    if inputs.weights is not None:
        encoder = {name: tensor for name, tensor in inputs.weights.items() if not name.startswith("head.")}
        model.load_state_dict(encoder, strict=False)
    models_vit.add_probe_head(model)
    job.place(model)
    if settings.eval:
        engine_finetune.evaluate_only(job, inputs, model)
        return
    normalize = transforms.Normalize(*engine_finetune.statistics(settings)).to(job.device)

    def prepare(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = (tensor.to(job.device, non_blocking=True) for tensor in batch)
        return normalize(images), targets

    size, scale = model.patch_embed.img_size, tuple(settings.crop_scale)
    task = engine_finetune.Task(
        model=model,
        optimizer=optim.LARS(model.head.parameters(), weight_decay=settings.weight_decay),
        transform=transforms.probe_transform(size, scale, settings.hflip),
        prepare=prepare,
        multiple=2,
    )
    engine_finetune.fit(job, inputs, task)


if __name__ == "__main__":
    main()
