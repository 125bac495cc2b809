"""What a checkpoint holds that can be converted, and the checks that it is whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models_vit
from evaluation import checkpoints
from methods import base
from models_base import keep_blocks
from util.config import PretrainSettings
from util.training import checkpoint, tensor_names


@dataclass
class Exportable:
    """What a checkpoint holds.

    Attributes:
        state: its tensors, under our names.
        settings: of the model.
        classes: names of a classifier's classes; empty where they are unknown, and for an encoder or autoencoder.
        grid: rows and columns of patches.
        notes: sentences for who converts it: what was assumed, left out, or computes otherwise here.
        probe_blocks: blocks of a probe that has fewer than its architecture.
        training: what the checkpoint tells of its training, see `model_card.facts`.
    """

    state: tensor_names.State
    settings: PretrainSettings
    classes: tuple[str, ...]
    grid: tuple[int, int]
    notes: tuple[str, ...] = ()
    probe_blocks: int | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Return autoencoder, classifier or encoder."""
        if any(name.startswith("head.") for name in self.state):
            return "classifier"
        return "autoencoder" if any(name.startswith("decode") for name in self.state) else "encoder"

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of the classes, or their numbers where the names are unknown."""
        return self.classes or numbered(self.state)

    @property
    def is_beit(self) -> bool:
        """Return whether it is a BEiT: queries and values have biases, keys have none."""
        return "blocks.0.attn.q_bias" in self.state

    def model(self) -> nn.Module:
        """Build the model of these tensors without memory: of pre-training, or a classifier."""
        with torch.device("meta"):
            return build_model(self.settings, self.state, self.probe_blocks)


def numbered(state: tensor_names.State) -> tuple[str, ...]:
    """Return the numbers of a classifier's classes as text; none without a head."""
    head = state.get("head.weight", state.get("head.1.weight", ()))
    return tuple(str(number) for number in range(len(head)))


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
        model.take_form_of(state)
    keep_blocks(model, probe_blocks)
    return model


def check_names(path: Path, found: Exportable) -> None:
    """Raise ValueError unless the tensors are a whole autoencoder, encoder or classifier of the architecture."""
    wanted = checkpoints.encoder_names(found.model().state_dict())
    if found.kind == "encoder":
        wanted = tensor_names.encoder_or_classifier(wanted)
    difference = checkpoint.describe_difference(wanted, checkpoints.encoder_names(found.state))
    if difference:
        raise ValueError(f"{path}: not the architecture {found.settings.model}, name it with --model: {difference}")
