#!/usr/bin/env python3
"""Pre-train with a masked-image method. Reads top to bottom as a recipe; `--help` lists the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

import engine_pretrain
import methods
from evaluation import monitor
from util import cli, optim, terminal
from util.config import PretrainSettings
from util.data import datasets
from util.distributed import world
from util.training import checkpoint, fitting, foreign, resume
from util.training.context import Context, step_plan
from util.training.epoch import Job
from util.training.following import follow
from util.training.state import TrainingState
from util.training.step import GradientStep


@dataclass
class Inputs:
    """What the settings name, opened and checked."""

    images: datasets.ImageSet
    method: methods.Method  # on the meta device
    weights: dict | None = None  # tensors to start from
    notes: list[str] = field(default_factory=list)  # for the log


def main(argv: list[str] | None = None) -> None:
    """Pre-train as the command line says."""
    terminal.protect()
    settings = cli.parse(PretrainSettings, argv)
    with cli.exit_on_user_error():
        inputs = check(settings)
    with Context.start(settings, {"training": inputs.images}, lambda: find_start(settings, inputs)) as context:
        train(context, inputs)


def train(context: Context, inputs: Inputs) -> None:
    """Build the method and the optimizer, and train for the epochs that are left."""
    settings = context.settings
    context.log.say(inputs.images.summary("training"))
    for note in inputs.notes:
        context.log.say(note)
    method = methods.from_settings(settings, inputs.weights)
    context.place(method)
    method.normalize.to(context.device)
    if settings.compile:
        method.compile_parts()
    loader = context.step_loader(inputs.images, method.views, joins=method.accumulates)
    optimizer = optim.pretrain_adamw(method.parameter_groups(settings.weight_decay), context.device, method.betas)
    state = TrainingState(context, method, optimizer, loader)
    state.restore()
    with cli.exit_on_user_error():
        method.begin(state.start_epoch, len(inputs.images), context.amp)
    if method.maps is not None and not any(map(method.maps.due, range(settings.epochs))):
        context.log.say(
            f"no attention maps will be made: the first are due after epoch {method.maps.every} and used in the next, "
            f"of {settings.epochs} epochs; lower refresh_epochs"
        )
    forward = world.wrap(method, context.device, loader.plan.accumulates)
    update = GradientStep(forward, optimizer, state.scaler, settings.clip_grad, method.clip_each)
    job = Job(context, state, method.shown)

    watcher = None
    if world.is_main() and (settings.eval_every or settings.vis_every):
        with cli.exit_on_user_error():  # of its validation images
            watcher = monitor.Monitor(settings, method, context.log)
    for epoch in job.epochs():
        stats = engine_pretrain.train_one_epoch(method, job, update, epoch)
        line = {f"train_{name}": value for name, value in stats.items()}
        if monitor.due(settings, epoch):
            found = job.exits.look(epoch, job.averages, lambda epoch=epoch: watcher.look(epoch))
            line |= watcher.report(found, (epoch + 1) * len(loader)) if watcher is not None else {}
        context.log.epoch(line | {"epoch": epoch})
        job.exits.save_epoch(epoch)
    if settings.epochs == 0 and state.start_epoch == 0:
        job.exits.save_epoch(-1)  # the untrained model, to compare with
    job.exits.end()


def check(settings: PretrainSettings) -> Inputs:
    """Open what the settings name, but for checkpoints. ValueError for anything that cannot work."""
    with torch.device("meta"):
        method = methods.from_settings(settings)
    images = datasets.open_unlabelled(settings.dataset, settings.data_path, settings.in_chans, settings.loader)
    step_plan(settings, len(images), joins=method.accumulates)
    for name in settings.needs_pictures:
        images.check_pictures(f"--{name}", "leave it out")
    if method.changes_colours and images.dtype not in (None, np.uint8):
        raise ValueError(
            f"--method {settings.method}: changes the colours of 8-bit images, and those of {settings.data_path} are "
            f"{images.dtype}; convert them, or choose another method"
        )
    return Inputs(images, method)


def find_start(settings: PretrainSettings, inputs: Inputs) -> dict | None:
    """Return the checkpoint to continue, or None, with `inputs.weights` if there are some to start from.

    Raises:
        ValueError: what there is does not fit.
    """
    own, model = checkpoint.find_own(settings.output_dir), inputs.method.model
    if own is not None or settings.resume:
        path, content = own or (settings.resume, checkpoint.load(settings.resume))
        inputs.notes = follow(settings, content, path)
        plan = step_plan(settings, len(inputs.images), joins=inputs.method.accumulates)
        return resume.check(path, content, model, plan, inputs.images, inputs.method.maps)
    content = foreign.read(settings.finetune) if settings.finetune else None
    inputs.notes = follow(settings, content, settings.finetune)
    if content is not None:
        inputs.weights, notes = fitting.start_from(settings.finetune, content, model, fitting.fit_pretraining)
        inputs.notes += notes
    return None


if __name__ == "__main__":
    main()
