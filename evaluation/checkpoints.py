"""Open a checkpoint to look at it: the model, and how its images are prepared."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch

import masking
import models_mae
from methods import base
from models_base import MaskedModel, keep_blocks
from util.config import PretrainSettings
from util.data import transforms
from util.kinds import check_kinds
from util.training import checkpoint, foreign

# Settings that say what a model is, and what its images are; the others are of its training.
OF_MODEL = ("model", "input_size", "patch_size", "in_chans", "norm_pix_loss", "mean", "std")
OF_MODEL += ("mask_ratio", "masking", "masking_args")
OF_DATA = ("dataset", "data_path", "loader")


@dataclass
class Opened:
    """A model to look at.

    Attributes:
        model: in evaluation mode, on the device.
        settings: of its pre-training, as far as the checkpoint tells.
        strategy: its masking.
        normalize: uint8 images -> the model's input, on the device.
        has_decoder: False for an encoder alone, such as a fine-tuned one.
        trained: False for a model without a checkpoint.
        assumed: sentences on what had to be assumed because the checkpoint does not tell it, and on what was left out.
        refused: what the checkpoint names but may not choose, a sentence by setting: code and downloads. `strategy` is
            then random masking.
    """

    model: models_mae.MaskedAutoencoderViT
    settings: PretrainSettings
    strategy: masking.base.Strategy
    normalize: transforms.Normalize
    has_decoder: bool = True
    trained: bool = True
    assumed: str = ""
    refused: dict[str, str] = field(default_factory=dict)

    def require(self, *names: str) -> None:
        """Raise a ValueError if one of these settings is `refused`."""
        for name in names:
            if name in self.refused:
                raise ValueError(self.refused[name])

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of the model's images."""
        return self.model.patch_embed.img_size


def untrained(name: str, device: torch.device | str = "cpu", **changes) -> Opened:
    """Build a model of `models_mae` with random weights; `changes`, `seed` too, are settings as on the command line."""
    check_device(device)
    settings = PretrainSettings(model=name, **changes)
    settings.check()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = base.build_model(settings)
    return _opened(model, settings, device, has_decoder=model.has_decoder, trained=False)


def open_checkpoint(path: str | Path, device: torch.device | str = "cpu", **changes) -> Opened:
    """Open the model in a checkpoint of this project, of any of its mains, or in weights that `foreign.read` knows.

    The settings come from the checkpoint; what it does not tell (the name of the architecture, the sizes) is read from
    its tensors' shapes. Nothing that it names is imported, called or downloaded: a masking strategy of one's own, and a
    data set of the Hugging Face hub, are used only if `changes` name the same one.

    Args:
        path: of the checkpoint.
        device: where the model goes.
        changes: settings that override the checkpoint's.

    Raises:
        ValueError: no checkpoint of an architecture in `models_mae`.
    """
    check_device(device)
    content = foreign.read(path)
    state = encoder_names(content["model"])
    settings, refused = _refuse_code(settings_of(content, state, path, changes), path, changes)
    notes = [*content.get("notes", ()), "" if changes.get("input_size") else assumed_shape(content, state)]
    blocks = probe_blocks(content, path)
    with torch.device("meta"):
        wanted = _build(settings, blocks, state).state_dict()
    has_decoder = any(name.startswith("decode") for name in state)
    needed = {name for name in wanted if has_decoder or not name.startswith(checkpoint.DECODERS)}
    difference = checkpoint.describe_difference({name: wanted[name] for name in needed}, state)
    if difference:
        raise ValueError(f"{path}: not the architecture {settings.model}, name it with --model: {difference}")
    checkpoint.check_finite(path, {name: state[name] for name in needed})
    model = _build(settings, blocks, state)
    foreign.check_heads(path, content, model, settings.model)
    model.load_state_dict({name: state[name] for name in needed}, strict=False)
    try:
        return _opened(
            model, settings, device, has_decoder=has_decoder, assumed="; ".join(filter(None, notes)), refused=refused
        )
    except ValueError as error:
        raise ValueError(f"{path}: its settings cannot be used: {error}") from error


def _build(settings: PretrainSettings, blocks: int | None, state: dict[str, torch.Tensor]) -> MaskedModel:
    """Build the model that `state` is of, or is the encoder of, on the current default device."""
    model = base.build_model(settings)
    keep_blocks(model, blocks)
    model.take_form_of(state)
    return model


def _refuse_code(settings: PretrainSettings, path: str | Path, changes: dict) -> tuple[PretrainSettings, dict]:
    """Return `settings` without what a file may not choose, and what that was: `Opened.refused`."""
    refused = {}
    if settings.masking not in masking.available() and "masking" not in changes:
        refused["masking"] = settings.masking
        settings = dataclasses.replace(settings, masking="random", masking_args=[])
    if settings.dataset.startswith("hfds") and "dataset" not in changes:
        refused["dataset"] = settings.dataset
        settings = dataclasses.replace(settings, dataset="folder", data_path=changes.get("data_path"))
    return settings, {
        name: f"{path}: names the {name} {value!r}, which is not imported or downloaded on a file's word; give "
        f"--{name} {value} to use it"
        for name, value in refused.items()
    }


def _opened(
    model: models_mae.MaskedAutoencoderViT, settings: PretrainSettings, device: torch.device | str, **facts
) -> Opened:
    normalize = transforms.Normalize(*base.channel_statistics(settings)).to(device)
    strategy = base.create_strategy(settings)
    grid, width = model.patch_embed.grid_size, model.cls_token.shape[-1]
    masking.check(strategy, model.num_patches, width, grid=grid, offers=masking.NEEDS)
    return Opened(model.to(device).eval(), settings, strategy, normalize, **facts)


def encoder_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict without what only a classifier has: its head, and the norm in front of it."""
    return {name: value for name, value in state.items() if not name.startswith(("head.", "head_dist.", "fc_norm."))}


def check_device(device: torch.device | str) -> None:
    """Raise ValueError for a GPU that is not there."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA GPU is visible here; leave it out, or use cpu")


def check_pictures(settings: PretrainSettings) -> None:
    """Raise ValueError unless the images of these settings are what can be resized here."""
    if settings.loader is not None and settings.dataset == "folder":
        raise ValueError(
            f"--loader {settings.loader}: the model was trained on the arrays of a loader, and only pictures can be "
            "resized for a look at it; it can be trained further, fine-tuned and exported"
        )
    if settings.in_chans not in (1, 3, 4):
        raise ValueError(
            f"--in_chans {settings.in_chans}: only pictures of 1 (grey), 3 (RGB) or 4 (RGBA) channels can be resized "
            "for a look at a model"
        )


def settings_of(content: dict, state: dict, path: str | Path, changes: dict) -> PretrainSettings:
    """Return a checkpoint's settings of model and data, over them what its tensors' shapes say, over all `changes`.

    What belongs to its training alone, such as the batch size or where it wrote, is left out.
    """
    known = checkpoint.arguments(content)
    hints = typing.get_type_hints(PretrainSettings) | {"input_size": int | list[int], "patch_size": int | list[int]}
    check_kinds(path, known, {name: hints[name] for name in OF_MODEL + OF_DATA})
    args = {name: known[name] for name in OF_MODEL + OF_DATA if known.get(name) is not None}
    if changes.get("masking", args.get("masking")) != args.get("masking"):
        args["masking_args"] = []  # they are of another strategy
    if args.get("model", "").startswith("vit_"):
        args["model"] = f"mae_{args['model']}"
    projection = state.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4:
        raise ValueError(f"{path}: no encoder of this project: patch_embed.proj.weight is missing in it")
    check_kinds(path, content, {"grid": list[int], "classes": list[str]})
    if ("pos_embed" not in state and not content.get("grid")) or state.get("pos_embed", projection[0]).ndim != 3:
        raise ValueError(f"{path}: no encoder of this project: pos_embed is missing in it")
    patch = list(projection.shape[2:])
    args["patch_size"], args["in_chans"] = patch, projection.shape[1]
    grid = _grid(content, state, path, changes.get("input_size"))
    args["input_size"] = [side * step for side, step in zip(grid, patch, strict=True)]
    if "model" not in args | changes:
        args["model"] = guess_model(state, path)
    settings = PretrainSettings(**(args | changes))
    try:
        settings.check()
        base.channel_statistics(settings)
    except ValueError as error:
        raise ValueError(f"{path}: its settings cannot be used: {error}") from error
    return settings


def probe_blocks(content: dict, path: str | Path) -> int | None:
    """Return how many blocks a probe kept of its architecture; None for all, and for what is no probe."""
    args = checkpoint.arguments(content)
    check_kinds(path, args, {"probe_blocks": int})
    return args.get("probe_blocks")


def told_grid(content: dict, state: dict[str, torch.Tensor]) -> tuple[int, int] | None:
    """Return rows and columns of patches if a checkpoint tells them: as `grid`, or by its `input_size`."""
    grid = tuple(content.get("grid") or ())
    if grid:
        if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != _places(content, state):
            raise ValueError(f"its grid is {list(grid)}, and its position table has {_places(content, state)} places")
        return grid
    size = checkpoint.arguments(content).get("input_size")
    if not size:
        return None
    size = [size] if isinstance(size, int) else size  # a number in MAE's own checkpoints, and at Hugging Face
    rows, columns = (side // step for side, step in zip((size[0], size[-1]), _patch(state), strict=True))
    return (rows, columns) if rows * columns == _places(content, state) else None


def _grid(content: dict, state: dict, path: str | Path, given: list[int] | None) -> tuple[int, int]:
    """Return rows and columns of patches: the checkpoint's, of `given` images, or square. ValueError: they differ."""
    try:
        told = told_grid(content, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if given:
        rows, columns = (side // step for side, step in zip((given[0], given[-1]), _patch(state), strict=True))
        if rows * columns != _places(content, state) or (told and told != (rows, columns)):
            shape = f"{told[0]} x {told[1]}" if told else f"{_places(content, state)}"
            height, width = _patch(state)
            raise ValueError(f"--input_size {given}: {path} is of images of {shape} patches of {height} x {width}")
        return rows, columns
    if told:
        return told
    places = _places(content, state)
    side = round(places**0.5)
    if side * side != places:
        raise ValueError(
            f"{path}: its position table has {places} places, not a square, and it does not tell their shape; "
            "give the images' height and width with --input_size"
        )
    return side, side


def assumed_shape(content: dict, state: dict[str, torch.Tensor]) -> str:
    """Return a sentence where the shape of a model's images is not known, but taken as square; else nothing."""
    if told_grid(content, state):
        return ""
    places = _places(content, state)
    side = round(places**0.5)
    height, width = (side * step for step in _patch(state))
    return (
        f"the file does not tell the shape of its images: {places} patches are taken as {side} x {side}, "
        f"images of {height} x {width}; --input_size HEIGHT WIDTH says otherwise"
    )


def _places(content: dict, state: dict[str, torch.Tensor]) -> int:
    """Return the number of patches: of the position table, else of the grid."""
    return state["pos_embed"].shape[1] - 1 if "pos_embed" in state else math.prod(content["grid"])


def _patch(state: dict[str, torch.Tensor]) -> tuple[int, int]:
    return tuple(state["patch_embed.proj.weight"].shape[2:])


def guess_model(state: dict[str, torch.Tensor], path: str | Path) -> str:
    """Return the architecture whose width and depth a state dict has. ValueError: none, or `--model` is needed."""
    width = state["patch_embed.proj.weight"].shape[0]
    depth = 1 + max((int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)), default=-1)
    for name in models_mae.available_models():
        if not name.startswith("mae_"):
            continue  # the others say which they are
        with torch.device("meta"):
            model = models_mae.create_model(name)
        if (model.pos_embed.shape[-1], len(model.blocks)) == (width, depth):
            return name
    raise ValueError(f"{path}: no architecture here has width {width} and {depth} blocks; name one with --model")
