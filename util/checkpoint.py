"""Checkpoints: written whole or not at all, loaded without executing anything from the file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn

LAST = "checkpoint-last.pth"


def save(path: Path, content: dict) -> None:
    """Write `content` to a temporary file, flush it to disk, rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: str | Path) -> dict:
    """Read a checkpoint on the CPU, with `weights_only=True`.

    `argparse.Namespace`, which MAE's published checkpoints hold, is the one class allowed besides tensors.

    Raises:
        ValueError: no such file, truncated, or not a checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on the damaged byte
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: damaged, or not a PyTorch checkpoint of tensors ({reason[:160]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def model_state(content: dict, path: str | Path = "the checkpoint") -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint: under `model` or `state_dict`, or the content itself."""
    state = content.get("model", content.get("state_dict", content))
    entries = state.items() if isinstance(state, dict) else ()
    state = {str(name).removeprefix("module."): value for name, value in entries if isinstance(value, torch.Tensor)}
    if not state:
        raise ValueError(f"{path}: holds no model weights")
    return state


def arguments(content: dict) -> dict:
    """The settings that a checkpoint was made with, as a plain dict; empty if it has none."""
    args = content.get("args") or {}
    return vars(args) if isinstance(args, argparse.Namespace) else dict(args)


def describe_difference(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], most: int = 3) -> str:
    """One line that names the first tensors in which a checkpoint differs from a model; empty if none does."""
    parts = []
    for name in wanted:
        if name not in found:
            parts.append(f"{name} is missing in it")
        elif found[name].shape != wanted[name].shape:
            parts.append(f"{name} is {tuple(found[name].shape)} in it and {tuple(wanted[name].shape)} in the model")
    parts += [f"{name} is not in the model" for name in found if name not in wanted]
    more = f"; and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more


def check_state(path: str | Path, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """ValueError that names the differing tensors, if `state` is not exactly `model`'s."""
    difference = describe_difference(model.state_dict(), state)
    if difference:
        raise ValueError(f"{path}: a checkpoint of another architecture than --model: {difference}")


def resume_path(output_dir: str | Path, resume: str | None) -> Path | None:
    """What a run continues from: its own last checkpoint, else `--resume`, else nothing."""
    own = Path(output_dir) / LAST
    if own.is_file():
        return own
    return Path(resume) if resume else None
