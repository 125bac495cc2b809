"""What a new model starts from: the part of other weights that fits it, its position tables resized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.pos_embed import resize_pos_embed
from util.training import checkpoint, foreign
from util.training.tensor_names import State

Grid = tuple[int, int]  # rows and columns of patches


def start_from(
    path: str | Path, told: dict[str, Any], model: nn.Module, fit: Callable[[nn.Module, State, Grid | None], State]
) -> tuple[State, list[str]]:
    """Return the tensors of `--finetune path` that `model` starts from, and sentences on the others for the log.

    Args:
        path: of the weights.
        told: what `foreign.read` returned.
        model: the meta device will do.
        fit: `fit_pretraining` or `fit_classifier`.

    Raises:
        ValueError: they do not fit, or are not finite; names the file.
    """
    grid = told.get("grid")
    try:
        state = fit(model, told["model"], tuple(grid) if grid else None)
    except ValueError as error:
        raise ValueError(f"--finetune {path}: {error}") from error
    foreign.check_heads(f"--finetune {path}", told, model)
    checkpoint.check_finite(f"--finetune {path}", state)
    new = [name for name in model.state_dict() if name not in state]
    beside = (*checkpoint.DECODERS, *checkpoint.HEADS, "norm.")
    left = [name for name in told["model"] if name not in state and name.startswith(beside)]
    part = "decoder" if any(name.startswith(checkpoint.DECODERS) for name in new) else "head"
    notes = list(told.get("notes", ()))
    notes += [f"the {part} starts anew: {path} has none that fits ({_parts(new)})"] if new else []
    return state, notes + ([f"left out of {path}: {_parts(left)}"] if left else [])


def _parts(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.split(".")[0] for name in names))


def fit_pretraining(model: nn.Module, state: State, old_grid: Grid | None = None) -> State:
    """Return the part of a checkpoint that a pre-training starts from: the encoder, and the decoder if it has that.

    Position tables are resized to the model's grid. Heads are left out, and so is a decoder of which the model has no
    tensor. Nothing else is.

    Args:
        model: of pre-training; the meta device will do.
        state: a checkpoint's state dict.
        old_grid: rows and columns of patches of the checkpoint; a square grid if None.

    Returns:
        For `load_state_dict(..., strict=False)`: all of the model, or all but its decoder.

    Raises:
        ValueError: any other tensor is missing, has another shape, or has no place in the model; names the first few.
    """
    wanted = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith(checkpoint.HEADS)}
    (encoder, decoder), (found, beside) = _split(wanted), _split(state)
    if not any(name in decoder for name in beside if not name.startswith("mask_token")):
        beside = decoder = {}
    _check_architecture(encoder, found)
    difference = checkpoint.describe_difference(decoder, beside | _tables(decoder, beside))
    if difference:
        raise ValueError(
            f"its decoder is not that of --model: {difference}; scripts/export.py --to timm writes a file without it, "
            "from which a new decoder starts"
        )
    return _resize_tables(model, found | beside, old_grid)


def fit_classifier(model: nn.Module, state: State, old_grid: Grid | None = None) -> State:
    """Return the part of a checkpoint that `model` starts from: a pre-trained encoder, or a fine-tuned classifier.

    The position table is resized to the model's grid. Left out are decoders and heads, the `norm` where the model has a
    `fc_norm` instead, and a head for another number of classes. Nothing else is.

    Args:
        model: from `create_model`, before its head is changed; the meta device will do.
        state: a checkpoint's state dict.
        old_grid: rows and columns of patches of the checkpoint; a square grid if None.

    Returns:
        For `load_state_dict(..., strict=False)`: all but `head.*`, and but `fc_norm.*` with global pooling.

    Raises:
        ValueError: any other tensor is missing, has another shape, or has no place in the model; names the first few.
    """
    if hasattr(model, "adapt"):
        state = model.adapt(state, old_grid)
    wanted = model.state_dict()
    without = checkpoint.DECODERS + checkpoint.HEADS + (() if "norm.weight" in wanted else ("norm.",))
    state = {name: state[name] for name in state if name in wanted or not name.startswith(without)}
    if "head.weight" in state and state["head.weight"].shape != wanted["head.weight"].shape:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    needed = {name: wanted[name] for name in wanted if name in state or not name.startswith(("head.", "fc_norm."))}
    _check_architecture(needed, state)
    return _resize_tables(model, state, old_grid)


def _split(state: State) -> tuple[State, State]:
    """Return the tensors of the encoder, and the others."""
    beside = {name: tensor for name, tensor in state.items() if name.startswith(checkpoint.DECODERS)}
    return {name: tensor for name, tensor in state.items() if name not in beside}, beside


def _check_architecture(wanted: State, found: State) -> None:
    difference = checkpoint.describe_difference(wanted, found | _tables(wanted, found))
    if not difference:
        return
    theirs, ours = _describe_encoder(found), _describe_encoder(wanted)
    remedy = f"it has {theirs}, the model {ours}; choose --model, --patch_size and --in_chans to match; "
    raise ValueError(
        f"a checkpoint of another architecture than --model: {remedy if theirs != ours else ''}{difference}"
    )


def _describe_encoder(state: State) -> str:
    width, channels, *patch = state[checkpoint.FIRST].shape
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    return f"width {width}, {len(blocks)} blocks, patches of {' x '.join(map(str, patch))} and {channels} channel(s)"


def _tables(wanted: State, found: State) -> State:
    """Return the model's position tables of which `found` has one of any length."""
    shared = [name for name in wanted if name.endswith("pos_embed") and name in found]
    widths = {name: (found[name].ndim, found[name].shape[-1:]) for name in shared}
    return {name: wanted[name] for name in shared if widths[name] == (3, wanted[name].shape[-1:])}


def _resize_tables(model: nn.Module, state: State, old_grid: Grid | None) -> State:
    """Resize the position tables to the model's grid. ValueError: their grid is not known."""
    tables, grid = _tables(model.state_dict(), state), model.patch_embed.grid_size
    return state | {name: _resize_table(state[name], grid, old_grid) for name in tables}


def _resize_table(table: torch.Tensor, grid: Grid, old_grid: Grid | None) -> torch.Tensor:
    places = table.shape[1] - 1
    if old_grid is None:
        side = round(places**0.5)
        if side * side != places:
            raise ValueError(f"the checkpoint's position table has {places} places, not a square grid")
        old_grid = (side, side)
    elif len(old_grid) != 2 or min(old_grid) < 1 or old_grid[0] * old_grid[1] != places:
        raise ValueError(f"its position table has {places} places, and its grid is {list(old_grid)}")
    return table if tuple(old_grid) == tuple(grid) else resize_pos_embed(table, grid, old_grid)
