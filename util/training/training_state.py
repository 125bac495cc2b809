"""Check the training state in a checkpoint: nothing of it is used before it is known to be of the right kind."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.kinds import check_kinds

# What a checkpoint may tell of its run, besides the tensors.
_KINDS = {
    "epoch": int,
    "step": int,
    "steps_per_epoch": int,
    "num_images": int,
    "effective_batch_size": int,
    "best_acc1": float,
    "classes": list[str],
    "grid": list[int],
    "averages": dict[str, dict[str, list[Real]]],
    "scaler": dict[str, float],
    "optimizer": dict,
}
_ADVICE = "start from its weights with --finetune and another --output_dir"
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def check(path: str | Path, content: dict) -> None:
    """Check all of `content` but the tensors. The optimizer's are compared where they are loaded (`load_optimizer`).

    Raises:
        ValueError: there is no training state, or it holds a value of the wrong kind, or one that no run writes.
    """
    check_kinds(path, content, _KINDS)
    optimizer = content.get("optimizer") or {}
    if not optimizer.get("param_groups") or content.get("epoch") is None:
        raise ValueError(
            f"{path}: holds weights but no training state; start from it with --finetune instead of --resume"
        )
    _check_progress(path, content)
    begun = content["epoch"] >= 0 or content.get("step", 0)
    if begun and not optimizer.get("state"):
        raise ValueError(f"{path}: its optimizer's state is empty; start from its weights with --finetune {path}")


def _check_progress(path: str | Path, content: dict) -> None:
    """Raise a ValueError for numbers that no run writes."""
    lowest = {"epoch": -1, "step": 0, "steps_per_epoch": 1, "num_images": 1, "effective_batch_size": 1}
    for name, minimum in lowest.items():
        if content.get(name, minimum) < minimum:
            raise ValueError(f"{path}: its {name} is {content[name]}, and must be at least {minimum}")
    steps = content.get("steps_per_epoch")
    if steps is not None and content.get("step", 0) > (content["epoch"] + 2) * steps:
        raise ValueError(
            f"{path}: its step is {content['step']}, which does not lie in the epoch after epoch {content['epoch']} "
            f"of {steps} steps each"
        )
    averages = content.get("averages") or {}
    if any(len(pair) != 2 for values in averages.values() for pair in values.values()):
        raise ValueError(f"{path}: its averages must be pairs of numbers")
    scaler = content.get("scaler") or {}
    if scaler and not (scaler.keys() >= _SCALER and scaler["scale"] > 0):
        raise ValueError(f"{path}: its scaler is not the state of a GradScaler: {', '.join(sorted(_SCALER))}")


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: dict,
    path: str | Path = "the checkpoint",
    stateless: Callable[[nn.Parameter], bool] = lambda parameter: False,
) -> None:
    """Continue with `state`: its tensors. The options are this command's own.

    Args:
        optimizer: a new one, over the parameters that are trained.
        state: what its predecessor's `state_dict` returned.
        path: names the checkpoint in errors.
        stateless: whether a parameter may have no state, because it has been frozen since the first step.

    Raises:
        ValueError: not a state of such an optimizer over such parameters. torch compares nothing, and its fused kernels
            would write past the end of a tensor that is too small.
    """
    check_kinds(path, state, {"param_groups": list[dict], "state": dict})
    numbers, found = _numbers(path, optimizer, state["param_groups"]), state.get("state")
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    groups = [options | {"params": group["params"]} for options, group in zip(own, state["param_groups"], strict=True)]
    copies = {}
    if found:  # there is nothing before the first step
        expected = _state_of_a_step(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number not in found and stateless(parameter):
                continue
            difference = _describe_state(found.get(number), expected, parameter)
            if difference:
                raise ValueError(f"{path}: its optimizer's {difference} (parameter {number}); {_ADVICE}")
            copies[number] = {name: _like(tensor, parameter) for name, tensor in found[number].items()}
    optimizer.load_state_dict({"state": copies, "param_groups": groups})


def _numbers(path: str | Path, optimizer: torch.optim.Optimizer, groups: list[dict]) -> list[int]:
    """Return the numbers that a file's groups give to the parameters. ValueError: they are not `optimizer`'s groups."""
    for group in groups:
        check_kinds(path, group, {"params": list[int]})
    numbers = [number for group in groups for number in group.get("params") or ()]
    theirs = [len(group.get("params") or ()) for group in groups]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{path}: its optimizer has {sum(theirs)} parameters in {len(theirs)} groups, this one has {sum(ours)} in "
            f"{len(ours)}, or has others in each; {_ADVICE}"
        )
    return numbers


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Copy `tensor` to memory of its own, laid out as its parameter's: in a file, tensors may share memory."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.ndim else tensor.clone()


def _state_of_a_step(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return what `optimizer` remembers of a parameter of one number, by name: found by a step on a blank one."""
    like = optimizer.param_groups[0]["params"][0]
    blank = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    blank.grad = torch.zeros_like(blank)
    trial = copy.copy(optimizer)
    trial.state, trial.param_groups = defaultdict(dict), [optimizer.param_groups[0] | {"params": [blank]}]
    trial.step()
    return trial.state[blank]


def _describe_state(found: Any, expected: dict[str, torch.Tensor], parameter: torch.Tensor) -> str:
    """Say how a parameter's state differs from what it must be; empty if it does not."""
    if not isinstance(found, dict) or found.keys() != expected.keys():
        names = ", ".join(map(str, found)) if isinstance(found, dict) else ""
        return f"state holds {names or 'nothing'} and not {', '.join(expected)}"
    for name, tensor in found.items():
        shape = parameter.shape if expected[name].ndim else torch.Size()
        wanted = f"{tuple(shape)}, {expected[name].dtype} and dense"
        if not isinstance(tensor, torch.Tensor):
            return f"{name} is a {type(tensor).__name__}, and must be {wanted}"
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not plain or tensor.shape != shape or tensor.dtype != expected[name].dtype:
            return f"{name} is {tuple(tensor.shape)}, {tensor.dtype}, and must be {wanted}"
        if not tensor.isfinite().all() or (not tensor.ndim and tensor < 0):
            return f"{name} is not finite"
    return ""
