"""What an encoder makes of whole images, as columns of a picture: its class token's attention, its patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import masking
from evaluation.drawing import Column
from evaluation.features import encode_images
from models_base import MaskedModel


def attention(model: MaskedModel, images: torch.Tensor) -> list[Column]:
    """Draw how the class token attends to the patches of normalised images (N, C, H, W), on average over the heads."""
    return [_map("attention", model, model.class_attention(images).mean(dim=1, keepdim=True))]


def heads(model: MaskedModel, images: torch.Tensor) -> list[Column]:
    """Draw the same of each head."""
    found = model.class_attention(images).split(1, dim=1)
    return [_map(f"head {number}", model, head) for number, head in enumerate(found, 1)]


def _map(title: str, model: MaskedModel, attention: torch.Tensor) -> Column:
    """Draw attention (N, 1, L), of each image stretched to [0, 1]."""
    maps = masking.attention_map(attention).view(-1, *model.patch_embed.grid_size)
    return Column(title, maps.cpu(), quantity="attention")


def principal_components(model: MaskedModel, images: torch.Tensor) -> list[Column]:
    """Draw the first three principal components of the patch tokens of all images together as red, green and blue."""
    tokens = encode_images(model, images, "tokens")  # (N, L, D)
    colours = component_colours(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    pictures = colours.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)  # (N, 3, rows, columns)
    return [Column("PCA", pictures.cpu())]


def component_colours(tokens: torch.Tensor) -> torch.Tensor:
    """Return the first three principal components of tokens (n, D), each stretched so that 98% of them fill [0, 1].

    Returns:
        (n, 3); fewer than three tokens or channels have fewer components, the others are 0.
    """
    centred = tokens.double().cpu() - tokens.double().cpu().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)  # (min(n, D), D), the largest variance first
    found = centred @ directions[:3].T  # (n, 3)
    low, high = found.quantile(torch.tensor([0.01, 0.99], dtype=found.dtype), dim=0)
    stretched = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return F.pad(stretched, (0, 3 - stretched.shape[1])).float()
