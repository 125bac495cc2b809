#!/usr/bin/env python3
"""Pre-train a masked autoencoder. Reads top to bottom as a recipe; `--help` lists the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import engine_pretrain
import masking
from evaluation import monitor
from methods import base
from util import cli, optim, precision, seeding, terminal
from util.config import PretrainSettings
from util.data import datasets, transforms
from util.data.step_loader import MicroBatch
from util.distributed import world
from util.training import checkpoint, resume, run, strategy_state
from util.training.following import follow
from util.training.step import GradientStep


@dataclass
class Inputs:
    """What the settings name, opened and checked."""

    strategy: masking.base.Strategy
    images: datasets.ImageSet
    weights: dict | None = None  # state dict to start from
    notes: list[str] = field(default_factory=list)  # for the log


def main(argv: list[str] | None = None) -> None:
    """Pre-train as the command line says."""
    terminal.protect()
    settings = cli.parse(PretrainSettings, argv)
    with cli.exit_on_user_error():
        inputs = check(settings)
    with run.Run.start(settings, lambda: find_start(settings, inputs)) as job:
        train(job, inputs)


def train(job: run.Run, inputs: Inputs) -> None:
    """Build the model and the optimizer, and train for the epochs that are left."""
    settings = job.settings
    for note in inputs.notes:
        job.log.say(note)
    bare = base.build_model(settings)
    if inputs.weights is not None:
        bare.load_state_dict(inputs.weights)
    job.place(bare)
    if settings.compile:
        bare.compile_blocks()
    size, scale = bare.patch_embed.img_size, tuple(settings.crop_scale)
    transform = transforms.pretrain_transform(size, scale, settings.hflip, settings.exact_resize)
    loader = job.step_loader(inputs.images, transform)
    plan = loader.plan
    model = world.wrap(bare, job.device, plan.accumulates)
    optimizer = optim.pretrain_adamw(bare, settings.weight_decay, job.device)
    scaler = precision.grad_scaler(job.amp, job.device)
    job.restore(bare, optimizer, scaler, len(loader), inputs.strategy)

    nominal_tokens = plan.batch_size * plan.accum_iter * bare.num_patches * settings.mask_ratio
    update = GradientStep(model, optimizer, scaler, nominal_tokens, settings.clip_grad)
    shown = ("mask_ratio", "mask_ratio_min", "mask_ratio_max", "grad_norm")
    loop = job.loop(loader, optimizer, shown)
    normalize = transforms.Normalize(*base.channel_statistics(settings)).to(job.device)
    if settings.compile:
        normalize.compile(dynamic=True)  # flip, conversion and normalisation in one pass over the pixels
    prepare = make_prepare(normalize, settings.seed, bare.num_patches, job.device)

    watcher = None
    if world.is_main() and (settings.eval_every or settings.vis_every):
        watcher = monitor.Monitor(settings, inputs.strategy, normalize, size, job.log)
    for epoch in job.epochs():
        warming_up = epoch < settings.masking_warmup_epochs
        bare.set_masking(masking.create("random", mask_ratio=settings.mask_ratio) if warming_up else inputs.strategy)
        stats = engine_pretrain.train_one_epoch(model, loop, update, epoch, prepare=prepare, amp=job.amp)
        line = {f"train_{name}": value for name, value in stats.items()}
        if monitor.due(settings, epoch):
            found = job.look(epoch, loop.averages, lambda epoch=epoch: watcher.look(bare, epoch))
            line |= watcher.report(found, (epoch + 1) * len(loader)) if watcher is not None else {}
        job.log.epoch(line | {"epoch": epoch})
        job.save_epoch(epoch)
    if settings.epochs == 0 and job.start_epoch == 0:
        job.save_epoch(-1)  # the untrained model, to compare with
    job.finish()


def make_prepare(
    normalize: transforms.Normalize, seed: int, num_patches: int, device: torch.device
) -> engine_pretrain.Prepare:
    """Micro-batch -> normalised images (N, C, H, W) and the masking's noise (N, L), on the device."""

    def prepare(micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, flips = (t.to(device, non_blocking=True) for t in micro_batch.batch[0])  # (N, H, W, C) and (N,)
        images = normalize(pixels.permute(0, 3, 1, 2).contiguous(), flips)
        places, step_size = micro_batch.places, micro_batch.step_size
        return images, seeding.step_noise(seed, micro_batch.step, places, step_size, num_patches, device)

    return prepare


def check(settings: PretrainSettings) -> Inputs:
    """Open what the settings name, but for checkpoints. ValueError for anything that cannot work."""
    with torch.device("meta"):
        model = base.build_model(settings)
    strategy = base.create_strategy(settings)
    with strategy_state.unchanged(strategy):
        masking.check(strategy, model.num_patches, model.cls_token.shape[-1])
    base.channel_statistics(settings)
    images = datasets.open_unlabelled(settings.dataset, settings.data_path, settings.in_chans, settings.loader)
    run.step_plan(settings, len(images))
    return Inputs(strategy, images)


def find_start(settings: PretrainSettings, inputs: Inputs) -> dict | None:
    """Return the checkpoint to continue, or None, with `inputs.weights` if there are some to start from.

    Raises:
        ValueError: what there is does not fit.
    """
    with torch.device("meta"):
        model = base.build_model(settings)
    own = checkpoint.find_own(settings.output_dir)
    if own is not None or settings.resume:
        path, content = own or (settings.resume, checkpoint.load(settings.resume))
        inputs.notes = follow(settings, content, path)
        return resume.check(path, content, model, run.step_plan(settings, len(inputs.images)), inputs.images)
    content = checkpoint.load(settings.finetune) if settings.finetune else None
    inputs.notes = follow(settings, content, settings.finetune)
    if content is not None:
        inputs.weights = checkpoint.model_state(content, settings.finetune)
        checkpoint.check_state(settings.finetune, model, inputs.weights)
    return None


if __name__ == "__main__":
    main()
