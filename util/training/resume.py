"""What a run may continue from: a checkpoint of the same architecture, effective batch and pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from util.config import Settings, names_of_kind
from util.data.step_loader import StepPlan
from util.distributed import world
from util.distributed.agreement import Agreement
from util.training import checkpoint

# What a parameter group takes from the command line even when it continues a checkpoint.
_OWN_OPTIONS = {"weight_decay", "lr_scale", "fused", "foreach"}

# Settings that change the result, but not that of a run that continues: what it starts from is not read again, and the
# effective batch is compared as a whole.
_NOT_COMPARED = {"resume", "finetune", "batch_size", "accum_iter", "effective_batch_size"}


def check(path: str | Path, content: dict, model: nn.Module, plan: StepPlan) -> dict:
    """`content` of the checkpoint to continue, if it fits `model` (the meta device will do) and `plan`.

    Raises:
        ValueError: of another architecture, without an optimizer, of another effective batch size, or stopped within an
            epoch of another number of pictures.
    """
    checkpoint.check_state(path, model, checkpoint.model_state(content, path))
    optimizer = content.get("optimizer")
    if not (isinstance(optimizer, dict) and optimizer.get("param_groups") and isinstance(content.get("epoch"), int)):
        raise ValueError(
            f"{path}: holds weights but no training state; start from it with --finetune instead of --resume"
        )
    before, now = content.get("effective_batch_size"), plan.effective_batch_size
    if before is not None and before != now:
        raise ValueError(
            f"{path}: its run had an effective batch of {before} images, this one has {now}; "
            f"continue it with --effective_batch_size {before}, or start a new --output_dir"
        )
    before = content.get("num_images", plan.num_samples)
    if before != plan.num_samples and steps_into_epoch(content, plan.steps_per_epoch):
        raise ValueError(
            f"{path}: it was written within an epoch of {before} pictures, and --data_path has {plan.num_samples}; "
            f"continue with the pictures it had, or start a new --output_dir with --finetune {path}"
        )
    return content | {"path": str(path)}


def steps_into_epoch(content: dict, steps_per_epoch: int) -> int:
    """How many steps of the epoch after `epoch` a checkpoint has done."""
    done = content["epoch"] + 1
    return max(0, content.get("step", 0) - done * content.get("steps_per_epoch", steps_per_epoch))


def check_same_start(settings: Settings, content: dict | None, agreement: Agreement) -> None:
    """End all processes if they did not find the same checkpoint: they would train on, each from another step."""
    step = content.get("step", 0) if content is not None else -1
    last, first = agreement.maximum(step, -step)
    if last != -first:
        if world.is_main():
            print(
                f"error: --output_dir {settings.output_dir}: the processes found different checkpoints there, of step "
                f"{max(-first, 0)} and of step {last}; name a folder that all machines share",
                file=sys.stderr,
                flush=True,
            )
        agreement.maximum(0)  # the first process to leave makes the launcher end the others
        raise SystemExit(2)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Continue with `state`, but with this command's own options. ValueError: it is of other groups."""
    groups = state["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint's optimizer has {len(groups)} groups of parameters, this one has "
            f"{len(optimizer.param_groups)}; start from its weights with --finetune and another --output_dir"
        )
    asked = [{name: group[name] for name in _OWN_OPTIONS & group.keys()} for group in optimizer.param_groups]
    groups = [group | options for group, options in zip(groups, asked, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})


def changed_settings(content: dict, settings: Settings) -> list[str]:
    """Return what a continued run does otherwise than before: `--name old -> new`, of what changes the result."""
    before, now = checkpoint.arguments(content), settings.as_dict()
    compared = names_of_kind(type(settings), "result") & before.keys() - _NOT_COMPARED
    names = [name for name in now if name in compared and before[name] != now[name]]
    return [f"--{name} {before[name]} -> {now[name]}" for name in names]
