"""Builders shared by the methods: the model, the masking strategy, the normalisation of the settings."""

from __future__ import annotations

import masking
import models_mae
from util import cli
from util.config import PretrainSettings
from util.data import transforms


def build_model(settings: PretrainSettings) -> models_mae.MaskedAutoencoderViT:
    """The model, still with random masking; on the current default device."""
    sizes = {"img_size": settings.size("input_size"), "patch_size": settings.size("patch_size")}
    given = {name: size for name, size in sizes.items() if size is not None}
    return models_mae.create_model(
        settings.model, in_chans=settings.in_chans, norm_pix_loss=settings.norm_pix_loss, **given
    )


def create_strategy(settings: PretrainSettings) -> masking.base.Strategy:
    """The masking strategy with its own options."""
    options = {"mask_ratio": settings.mask_ratio} | cli.parse_options(settings.masking_args)
    return masking.create(settings.masking, **options)


def channel_statistics(settings: PretrainSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation for normalisation."""
    return transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)
