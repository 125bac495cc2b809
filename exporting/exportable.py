"""What a checkpoint holds that can be converted, and the checks that it is whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import models_vit
from evaluation import checkpoints
from exporting import tensor_names
from methods import base
from models_base import keep_blocks
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
        probe_blocks: blocks of a probe that has fewer than its architecture.
    """

    state: tensor_names.State
    settings: PretrainSettings
    classes: tuple[str, ...]
    grid: tuple[int, int]
    notes: tuple[str, ...] = ()
    probe_blocks: int | None = None

    @property
    def kind(self) -> str:
        """Return autoencoder, classifier or encoder."""
        if any(name.startswith("head.") for name in self.state):
            return "classifier"
        return "autoencoder" if any(name.startswith("decode") for name in self.state) else "encoder"

    @property
    def is_beit(self) -> bool:
        """Return whether it is a BEiT: queries and values have biases, keys have none."""
        return "blocks.0.attn.q_bias" in self.state

    def model(self) -> nn.Module:
        """Build the model of these tensors without memory: of pre-training, or a classifier."""
        with torch.device("meta"):
            return build_model(self.settings, self.state, self.probe_blocks)


def build_model(settings: PretrainSettings, state: tensor_names.State, probe_blocks: int | None) -> nn.Module:
    """Build the model that `state` belongs to, not yet with its tensors: of pre-training, or a classifier.

    A classifier has a head where `state` holds a plain one.
    """
    if any(name.startswith(("head.", "fc_norm.")) for name in state):
        model = models_vit.create_model(
            settings.model.removeprefix("mae_").removeprefix("ibot_"),
            num_classes=len(state.get("head.weight", ())),
            img_size=settings.size("input_size"),
            patch_size=settings.size("patch_size"),
            in_chans=settings.in_chans,
            global_pool="fc_norm.weight" in state,
        )
    else:
        model = base.build_model(settings)
    keep_blocks(model, probe_blocks)
    return model


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


def check_names(path: Path, found: Exportable) -> None:
    """Raise ValueError unless the tensors are a whole autoencoder, encoder or classifier of the architecture."""
    wanted = checkpoints.encoder_names(found.model().state_dict())
    if found.kind == "encoder":
        wanted = tensor_names.encoder_or_classifier(wanted)
    difference = checkpoint.describe_difference(wanted, checkpoints.encoder_names(found.state))
    if difference:
        raise ValueError(f"{path}: not the architecture {found.settings.model}, name it with --model: {difference}")


def check_heads(path: Path, found: Exportable, content: dict[str, Any]) -> None:
    """Raise ValueError for a different number of heads: no tensor holds it, and it would compute something else."""
    if "heads" not in content:
        return
    model = found.model()
    ours = {"heads": model.blocks[0].attn.num_heads}
    if found.kind == "autoencoder":
        ours["decoder_heads"] = model.decoder_blocks[0].attn.num_heads
    for name, number in ours.items():
        if content.get(name, number) != number:
            raise ValueError(
                f"{path}: {content[name]} {name.replace('_', ' ')}, but {found.settings.model} has {number}"
            )
