"""Checkpoints: written whole or not at all, loaded without executing anything from the file."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import warnings
import zipfile
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from util.files import replacing
from util.pos_embed import resize_pos_embed

LAST = "checkpoint-last.pth"
PREVIOUS = "checkpoint-previous.pth"


def save(path: Path, content: dict) -> None:
    """Write `content` to a temporary file, flush it to disk, read it back, rename it to `path`.

    Raises:
        OSError: it could not be written, or does not read back as it was written; `path` is as it was.
    """
    try:
        with replacing(path, durable=True) as file:
            torch.save(content, file)
            file.flush()
            damage = find_damage(file.name)
            if damage:
                raise OSError(f"{file.name}: does not read back as it was written ({damage})")
    except RuntimeError as error:  # PyTorch's writer, on a full disk
        raise OSError(str(error).splitlines()[0]) from error


def find_damage(path: str | Path) -> str:
    """What is wrong with a file of `torch.save`, by the checksums that it holds; empty if nothing is.

    `torch.load` does not compare them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # what a damaged file raises depends on the damaged byte
        return str(error) or type(error).__name__
    return f"wrong checksum of {broken}" if broken else ""


def load(path: str | Path) -> dict:
    """Read a checkpoint on the CPU, with `weights_only=True`.

    `argparse.Namespace`, which MAE's published checkpoints hold, is the one class allowed besides tensors.

    Raises:
        ValueError: no such file, truncated, or not a checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    damage = find_damage(path) if zipfile.is_zipfile(path) else ""  # files older than PyTorch 1.6 have no checksums
    if damage:
        raise ValueError(f"{path}: damaged ({damage})")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on the damaged byte
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: damaged, or not a PyTorch checkpoint of tensors ({reason[:160]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def peek(path: str | Path) -> dict:
    """A checkpoint whose tensors stay on disk: as quick for a large one as for a small one, and not checked.

    Raises:
        ValueError: no such file, or not a whole checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a damaged file raises depends on the damaged byte
        raise ValueError(f"{path}: there is no whole checkpoint") from error


def fingerprint(path: str | Path) -> str | None:
    """A short text that is another for another content; None if there is no file of `torch.save`.

    Made of the checksums in the file, so the tensors are not read.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        sums = [(member.file_size, member.CRC) for member in archive.infolist()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


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


def own_checkpoints(output_dir: str | Path) -> list[Path]:
    """A run's checkpoints, the newest first: last, the one before, the kept ones from the latest epoch on."""
    folder = Path(output_dir)
    newest = [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]
    return newest + [path for _, path in sorted(kept_checkpoints(folder), reverse=True)]


def kept_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(epoch, path) of every checkpoint-{epoch}.pth."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pth", path.name), path) for path in folder.glob("checkpoint-*.pth"))
    return [(int(match[1]), path) for match, path in found if match]


def find_own(output_dir: str | Path) -> tuple[Path, dict] | None:
    """The newest of a run's own checkpoints that is whole, and its content; damaged ones are warned of.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    paths = own_checkpoints(output_dir)
    for path in paths:
        try:
            content = load(path)
        except ValueError as error:
            if os.environ.get("RANK", "0") == "0":
                warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
            continue
        return path, content
    if paths:
        raise ValueError(
            f"--output_dir {output_dir}: all its checkpoints are damaged; name a good one with --resume "
            "and another --output_dir"
        )
    return None


def fit_state(
    model: VisionTransformer, state: dict[str, torch.Tensor], old_grid: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """The part of a checkpoint that `model` starts from: a pre-trained encoder, or a fine-tuned classifier.

    The decoder is left out, the position table is resized to the model's grid, a head for another number of classes
    is left out.

    Args:
        model: from `create_model`, before its head is changed; the meta device will do.
        state: a checkpoint's state dict.
        old_grid: rows and columns of patches of the checkpoint; a square grid if None.

    Returns:
        For `load_state_dict(..., strict=False)`: all but `head.*`, and but `fc_norm.*` with global pooling.

    Raises:
        ValueError: any other tensor is missing, or has another shape; names the first few.
    """
    wanted = model.state_dict()
    grid = model.patch_embed.grid_size
    state = {name: tensor for name, tensor in state.items() if name in wanted}
    table = state.get("pos_embed")
    if table is not None and table.shape[-1] == wanted["pos_embed"].shape[-1]:
        state["pos_embed"] = _fit_table(table, grid, old_grid)
    if "head.weight" in state and state["head.weight"].shape != wanted["head.weight"].shape:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    start_fresh = {name for name in wanted if name.startswith(("head.", "fc_norm.")) and name not in state}
    difference = describe_difference({name: wanted[name] for name in wanted if name not in start_fresh}, state)
    if difference:
        raise ValueError(f"a checkpoint of another architecture than --model: {difference}")
    return state


def _fit_table(table: torch.Tensor, grid: tuple[int, int], old_grid: tuple[int, int] | None) -> torch.Tensor:
    if old_grid is None:
        side = round((table.shape[1] - 1) ** 0.5)
        if side * side != table.shape[1] - 1:
            raise ValueError(f"the checkpoint's position table has {table.shape[1] - 1} places, not a square grid")
        old_grid = (side, side)
    return table if tuple(old_grid) == tuple(grid) else resize_pos_embed(table, grid, old_grid)
