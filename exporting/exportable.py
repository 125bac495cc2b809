"""What a checkpoint holds that can be converted, and the checks that it is whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from evaluation import checkpoints
from exporting import tensor_names
from methods import base
from util.config import PretrainSettings
from util.training import checkpoint


@dataclass
class Exportable:
    """What a checkpoint holds.

    Attributes:
        state: its tensors, under our names.
        settings: of the model.
        classes: names of a classifier's classes; empty for an encoder or autoencoder.
        grid: rows and columns of patches.
        notes: sentences for who converts it: what was assumed, left out, or computes otherwise here.
    """

    state: tensor_names.State
    settings: PretrainSettings
    classes: tuple[str, ...]
    grid: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Return autoencoder, classifier or encoder."""
        if any(name.startswith("head.") for name in self.state):
            return "classifier"
        return "autoencoder" if "decoder_pred.weight" in self.state else "encoder"


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. ValueError: it does not."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not the settings of a model")
    return content


def load_tensors(path: Path) -> tensor_names.State:
    """Read the tensors of a safetensors file. ValueError: it is damaged, or has none."""
    try:
        return checkpoint.model_state(load_file(path), path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged, or no safetensors file ({error})") from error


def check_names(path: Path, settings: PretrainSettings, state: tensor_names.State) -> None:
    """Raise ValueError unless `state` is a whole autoencoder, encoder or classifier of the architecture."""
    if not settings.model.startswith("mae_"):
        raise ValueError(
            f"{path}: is of {settings.model}, which no other format holds yet; export a model named mae_..."
        )
    with torch.device("meta"):
        wanted = base.build_model(settings).state_dict()
    if "decoder_pred.weight" not in state:
        wanted = {name: value for name, value in wanted.items() if not name.startswith(("decoder", "mask_token"))}
    if "fc_norm.weight" in state:  # a classifier of the mean of the patch tokens has this norm instead
        wanted = {name: value for name, value in wanted.items() if not name.startswith("norm.")}
    difference = checkpoint.describe_difference(wanted, checkpoints.encoder_names(state))
    if difference:
        raise ValueError(f"{path}: not the architecture {settings.model}, name it with --model: {difference}")


def check_heads(path: Path, settings: PretrainSettings, content: dict[str, Any], state: tensor_names.State) -> None:
    """Raise ValueError for a different number of heads: no tensor holds it, and it would compute something else."""
    if "heads" not in content:
        return
    with torch.device("meta"):
        model = base.build_model(settings)
    ours = {"heads": model.blocks[0].attn.num_heads}
    if "decoder_pred.weight" in state:
        ours["decoder_heads"] = model.decoder_blocks[0].attn.num_heads
    for name, number in ours.items():
        if content.get(name, number) != number:
            raise ValueError(f"{path}: {content[name]} {name.replace('_', ' ')}, but {settings.model} has {number}")
