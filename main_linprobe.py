#!/usr/bin/env python3
"""Linear probing: train a linear classifier on a frozen encoder. `--help` lists the settings."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer

import models_vit
import supervised
from util import cli, optim, run, transforms
from util.config import LinprobeSettings


def main(argv: list[str] | None = None) -> None:
    """Probe as the command line says."""
    settings = cli.parse(LinprobeSettings, argv)

    def build(num_classes: int, with_head: bool = True) -> VisionTransformer:
        model = supervised.build_model(settings, num_classes)
        if with_head:
            models_vit.add_probe_head(model)
        return model

    with cli.exit_on_user_error():
        inputs = supervised.check(settings, build, multiple=2)  # BatchNorm needs two images
    job = run.Run.start(settings, inputs.resumed)
    inputs.resumed = None  # the run holds it, until it has restored from it

    model = build(inputs.num_classes, with_head=False)
    if inputs.weights is not None:
        encoder = {name: tensor for name, tensor in inputs.weights.items() if not name.startswith("head.")}
        model.load_state_dict(encoder, strict=False)
    models_vit.add_probe_head(model)
    job.place(model)
    if settings.eval:
        supervised.evaluate_only(job, inputs, model)
        return
    normalize = transforms.Normalize(*supervised.statistics(settings)).to(job.device)

    def prepare(batch: list) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = (tensor.to(job.device, non_blocking=True) for tensor in batch)
        return normalize(images), targets

    size, scale = model.patch_embed.img_size, tuple(settings.crop_scale)
    task = supervised.Task(
        model=model,
        optimizer=optim.LARS(model.head.parameters(), weight_decay=settings.weight_decay),
        transform=transforms.probe_transform(size, scale, settings.hflip),
        prepare=prepare,
        multiple=2,
    )
    supervised.fit(job, inputs, task)


if __name__ == "__main__":
    main()
