"""Classifiers for fine-tuning and linear probing: names over timm's VisionTransformer."""

from __future__ import annotations

import copy
from functools import partial

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models_base import SeveralTokens, check_sizes, keep_blocks
from models_bootmae import BootMAEClassifier
from models_simmim import SimMIMClassifier
from util.config import SupervisedSettings
from util.suggest import check_known

# name -> patch size, width, blocks, heads, default image size; the encoders of models_mae under the same suffix.
_ARCHITECTURES = {
    "vit_mini_patch4": (4, 96, 4, 3, 16),
    "vit_tiny_patch4": (4, 192, 12, 3, 32),
    "vit_small_patch16": (16, 384, 12, 6, 224),
    "vit_base_patch16": (16, 768, 12, 12, 224),
    "vit_large_patch16": (16, 1024, 24, 16, 224),
    "vit_huge_patch14": (14, 1280, 32, 16, 224),
    "simmim_vit_mini_patch4": (4, 96, 4, 3, 16),
    "simmim_vit_base_patch16": (16, 768, 12, 12, 224),
    "bootmae_vit_mini_patch4": (4, 96, 4, 3, 16),
    "bootmae_vit_base_patch16": (16, 768, 12, 12, 224),
    "bootmae_vit_large_patch16": (16, 1024, 24, 16, 224),
}


class ViTClassifier(SeveralTokens, VisionTransformer):
    """timm's ViT."""


class LinearHeads(nn.ModuleList):
    """Linear layers on the same features: (N, D) -> (heads, N, classes).

    In fp32 whatever autocast says: one head whose rate is too high must not overflow, which would skip the step of all.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Apply every layer."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.stack([head(features.float()) for head in self])


def available_models() -> list[str]:
    """Return the names for `--model`."""
    return sorted(_ARCHITECTURES)


def create_model(
    name: str,
    *,
    num_classes: int,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    global_pool: bool = True,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """Build a classifier.

    Args:
        name: one of `available_models()`.
        num_classes: outputs.
        img_size, patch_size: pixels, one number or (height, width); the name's own if None.
        in_chans: channels of the images.
        global_pool: mean of the patch tokens, then a new LayerNorm; else the class token after the final LayerNorm.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.

    Raises:
        ValueError: unknown name, or the image is not a whole number of patches.
    """
    check_known("model", name, available_models())
    default_patch, embed_dim, depth, num_heads, default_size = _ARCHITECTURES[name]
    image, patch = to_2tuple(img_size or default_size), to_2tuple(patch_size or default_patch)
    check_sizes(image, patch, in_chans)
    options = {
        "img_size": image,
        "patch_size": patch,
        "in_chans": in_chans,
        "num_classes": num_classes,
        "global_pool": "avg" if global_pool else "token",
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "drop_path_rate": drop_path,
    }
    if name.startswith("simmim_"):
        return SimMIMClassifier(**options)
    if name.startswith("bootmae_"):
        return BootMAEClassifier(**options)
    return ViTClassifier(**options, norm_layer=partial(nn.LayerNorm, eps=1e-6))


def add_probe_head(
    model: VisionTransformer,
    blocks: int | None = None,
    *,
    heads: int = 0,
    batch_norm: bool = True,
    last_blocks: int = 1,
    append_mean: bool = False,
) -> None:
    """Freeze `model` and give it the head of linear probing: BatchNorm without scale and shift, then a linear layer.

    Args:
        model: from `create_model`, with its weights.
        blocks: how many of its blocks stay; all if None.
        heads: number of linear layers on the same features, all with the same first weights; 0 for a plain one.
        batch_norm: whether the BatchNorm is there.
        last_blocks, append_mean: what is classified, see `SeveralTokens`.

    Raises:
        ValueError: it has fewer blocks.
    """
    keep_blocks(model, blocks)
    for parameter in model.parameters():
        parameter.requires_grad = False
    linear = nn.Linear(model.classify_tokens(last_blocks, append_mean), model.head.out_features)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6) if batch_norm else nn.Identity()
    model.head = nn.Sequential(norm, LinearHeads(copy.deepcopy(linear) for _ in range(heads)) if heads else linear)


def init_finetune_head(model: VisionTransformer) -> None:
    """Start the head close to zero, as MAE does: its first outputs are almost equal for all classes."""
    nn.init.trunc_normal_(model.head.weight, std=2e-5)


def build_model(settings: SupervisedSettings, num_classes: int, drop_path: float = 0.0) -> VisionTransformer:
    """Build the classifier that the settings name, with a plain linear head."""
    return create_model(
        settings.model,
        num_classes=num_classes,
        img_size=settings.size("input_size"),
        patch_size=settings.size("patch_size"),
        in_chans=settings.in_chans,
        global_pool=settings.pools,
        drop_path=drop_path,
    )
