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
from torch import nn

from util.files import replacing
from util.training.pickles import find_damage, unpickle

LAST = "checkpoint-last.pth"
PREVIOUS = "checkpoint-previous.pth"

# Where a checkpoint has its model. Of the second kind a file may have several, and none is the obvious one.
_MODELS = ("model", "state_dict", "model_state_dict")
_ONE_OF_SEVERAL = ("student", "teacher", "model_ema", "state_dict_ema", "encoder", "target_encoder", "backbone")

_WRAPPERS = r"((module|encoder|backbone|model|student|teacher|model_ema)\.)*"
FIRST = "patch_embed.proj.weight"  # every encoder has it

# What a model may have beside its encoder.
DECODERS = ("decode", "mask_token", "de_pos_embed", "down", "lm_head")  # what predicts, of all methods
HEADS = ("head.", "head_dist.", "fc_norm.", "pooler.")


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


def load(path: str | Path) -> dict:
    """Read a checkpoint on the CPU, without importing or calling anything that it names (`pickles.unpickle`).

    Raises:
        ValueError: no such file, damaged, compressed, or not a checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    try:
        damage = find_damage(path) if _is_archive(path) else ""  # files older than PyTorch 1.6 have no checksums
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); mend its permissions or its disk") from error
    if damage:
        raise ValueError(f"{path}: damaged ({damage})")
    content = unpickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    args = content.get("args")
    if not isinstance(args, (argparse.Namespace, dict, type(None))):
        raise ValueError(f"{path}: its args are a {type(args).__name__}, not a dictionary of settings")
    return content


def _is_archive(path: str | Path) -> bool:
    """Return whether torch or Python takes a file for a zip archive: they look at its two ends."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK" or zipfile.is_zipfile(path)


def peek(path: str | Path) -> dict:
    """Read a checkpoint but leave its tensors on disk: as fast for a large one as for a small one, and not checked.

    Raises:
        ValueError: no such file, or not a whole checkpoint.
    """
    try:
        return unpickle(path, mmap=True)
    except ValueError as error:
        raise ValueError(f"{path}: there is no whole checkpoint") from error


def fingerprint(path: str | Path) -> str | None:
    """Return a short text that differs for different content; None if there is no file of `torch.save`.

    Made of the checksums in the file, so the tensors are not read.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        sums = [(member.file_size, member.CRC) for member in archive.infolist()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def arguments(content: dict) -> dict:
    """Return the settings that a checkpoint was made with, as a plain dict; empty if it has none."""
    args = content.get("args") or {}
    return dict(vars(args) if isinstance(args, argparse.Namespace) else args)


def model_state(content: dict, path: str | Path = "the checkpoint") -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint, its names without what known wrappers put before them.

    It is under `model`, `state_dict` or `model_state_dict`, else under `teacher` beside `student` (DINO, iBOT), else
    under the only one of `student`, `teacher`, `model_ema` and the like, else the content itself. Wrappers are
    DistributedDataParallel (`module.`), torch.compile (`_orig_mod.`), and `encoder.`, `backbone.`, `model.` before the
    names of a ViT.

    Raises:
        ValueError: no weights, several models, an unknown wrapper, or a tensor that is not plain (dense, on the CPU).
    """
    state = _state_dict(content, path)
    entries = [(str(name).replace("_orig_mod.", "").removeprefix("module."), value) for name, value in state.items()]
    entries = [(name, value) for name, value in entries if isinstance(value, torch.Tensor)]
    prefix = _wrapper([name for name, _ in entries], path)
    found = {name.removeprefix(prefix): value for name, value in entries}
    if not found:
        raise ValueError(f"{path}: holds no model weights")
    if len(found) < len(entries):
        raise ValueError(f"{path}: holds two tensors of one name; save the model alone, as {{'model': ...}}")
    for name, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            raise ValueError(f"{path}: {name} is not a dense tensor of numbers; save the model's plain weights")
    return found


def takes_teacher(content: dict) -> bool:
    """Return whether a checkpoint holds a student and its teacher, and no other model: DINO and iBOT use the latter."""
    found = {name for name in (*_MODELS, *_ONE_OF_SEVERAL) if isinstance(content.get(name), dict)}
    return found == {"student", "teacher"}


def _state_dict(content: dict, path: str | Path) -> dict:
    for name in _MODELS:
        if isinstance(content.get(name), dict):
            return content[name]
    if takes_teacher(content):
        return content["teacher"]
    several = [name for name in _ONE_OF_SEVERAL if isinstance(content.get(name), dict)]
    if len(several) > 1:
        raise ValueError(
            f"{path}: holds several models, {', '.join(several)}; save the one that is meant, as {{'model': ...}}"
        )
    return content[several[0]] if several else content


def _wrapper(names: list[str], path: str | Path) -> str:
    """Return what stands before the names of a ViT's tensors. ValueError: something unknown, or several ViTs."""
    prefixes = {name.removesuffix(FIRST) for name in names if name.endswith(f".{FIRST}") or name == FIRST}
    if not prefixes or "" in prefixes:
        return ""
    known = sorted(prefix for prefix in prefixes if re.fullmatch(_WRAPPERS, prefix))
    if len(prefixes) > 1 or not known:
        raise ValueError(
            f"{path}: the tensors of its ViT are called {' and '.join(sorted(prefixes))}{FIRST}, which could mean "
            "anything; save the encoder alone, as {'model': ...}, under timm's names"
        )
    return known[0]


def describe_difference(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], most: int = 3) -> str:
    """Name, in one line, the first tensors in which a checkpoint differs from a model; empty if none does."""
    parts = []
    for name, tensor in wanted.items():
        if name not in found:
            parts.append(f"{name} is missing in it")
        elif found[name].shape != tensor.shape:
            parts.append(f"{name} is {tuple(found[name].shape)} in it and {tuple(tensor.shape)} in the model")
        elif found[name].is_floating_point() != tensor.is_floating_point():
            parts.append(f"{name} is {found[name].dtype} in it and {tensor.dtype} in the model")
    parts += [f"{name} is not in the model" for name in found if name not in wanted]
    more = f"; and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more


def check_state(path: str | Path, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError that names the tensors, unless `state` is exactly `model`'s, and finite."""
    difference = describe_difference(model.state_dict(), state)
    if difference:
        raise ValueError(f"{path}: a checkpoint of another architecture than --model: {difference}")
    check_finite(path, state)


def check_finite(path: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError that names the first tensor with a value that is not finite. Shapes are checked before."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {name} is not finite, as after a training that diverged; take an earlier one")


def own_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return a run's checkpoints, the newest first: last, the one before, the kept ones from the latest epoch on."""
    folder = Path(output_dir)
    newest = [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]
    return newest + [path for _, path in sorted(kept_checkpoints(folder), reverse=True)]


def kept_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (epoch, path) of every checkpoint-{epoch}.pth."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pth", path.name), path) for path in folder.glob("checkpoint-*.pth"))
    return [(int(match[1]), path) for match, path in found if match]


def find_own(output_dir: str | Path) -> tuple[Path, dict] | None:
    """Return the newest of a run's own checkpoints that is whole, and its content; damaged ones are warned of.

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
