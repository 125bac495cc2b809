"""A model's computation without its Python: torch.export's graph, and ONNX files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from exporting.exportable import Exportable, build_model
from methods import base
from models_base import MaskedModel
from util.training import tensor_names


class Features(nn.Module):
    """Normalised images (N, C, H, W) -> tokens (N, L + 1, D) of a model's encoder, the class token first."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode whole images."""
        return self.model.encode(self.model.embed(images), None)


def network(found: Exportable) -> nn.Module:
    """Build the network of a checkpoint for inference: images -> an encoder's tokens, or a classifier's logits."""
    state = tensor_names.encoder_or_classifier(found.state)
    model = build_model(found.settings, state, found.probe_blocks)
    model.load_state_dict(state, strict=False)  # an autoencoder's decoder stays as it is, and is not run
    return (Features(model) if isinstance(model, MaskedModel) else model).eval().requires_grad_(False)


def trace(found: Exportable) -> torch.export.ExportedProgram:
    """Trace the `network` of a checkpoint with torch.export, for any number of images (N, C, H, W) at a time."""
    settings = found.settings
    images = torch.zeros(2, settings.in_chans, *settings.size("input_size"))  # torch takes a 1 for a constant
    return torch.export.export(network(found), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_onnx(found: Exportable, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a file whose input is `images`, and whose output is `tokens`, `logits` or, without a head, `features`.

    The weights of a network above 2 GB, the most that one ONNX file can hold, go to a file beside it.

    Args:
        found: the checkpoint.
        path: of the file; its folder exists.
        metadata: goes along as the file's `metadata_props`, with mean and deviation of each channel.
    """
    pooled = "features" if "fc_norm.weight" in found.state else "tokens"
    names = {"input_names": ["images"], "output_names": ["logits" if found.kind == "classifier" else pooled]}
    statistics = zip(("mean", "std"), map(json.dumps, base.channel_statistics(found.settings)), strict=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        written = torch.onnx.export(trace(found), **names, dynamic_shapes=({0: "batch"},), verbose=False)
        written.model.metadata_props.update({**metadata, **dict(statistics)})
        written.save(Path(folder) / path.name)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before what names them
            os.replace(file, path.parent / file.name)
