"""Views of a masked autoencoder: salience, masks and reconstructions of images, as columns of a picture or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

import masking
from evaluation import drawing, encoder_views
from util.config import PretrainSettings
from util.data import transforms
from util.ratios import exact_ratio

STANDARD = ("salience", "masks", "rebuilt")
COLUMNS = ("salience", "attention", "heads", "pca", "masks", "rebuilt")  # what can be drawn beside the image

# What a strategy gets of what it may need, unless told otherwise: the end of the training, and the middle of what is
# drawn for a step.
_OFFERED = {"progress": 1.0, "draw": 0.5}


def drawable(strategy: masking.base.Strategy) -> bool:
    """Return whether `strategy` can mask outside of a training: it needs no teacher."""
    return masking.base.needs(strategy) <= {"grid", "patch_size", "attention", "maps", "boxes", *_OFFERED}


def choose_mask(
    model: nn.Module,
    strategy: masking.base.Strategy,
    images: torch.Tensor,
    noise: torch.Tensor,
    progress: float = 1.0,
) -> masking.Mask:
    """Mask normalised images (N, C, H, W) by noise (N, L) as `strategy` does at `progress` of the training.

    Attention is that of `model`, and the images whole.
    """
    offered = _OFFERED | {"progress": progress}
    if "attention" in masking.base.needs(strategy):
        offered["attention"] = model.class_attention(images)
    if "maps" in masking.base.needs(strategy):
        offered["maps"] = masking.attention_map(model.class_attention(images)).view(-1, *model.patch_embed.grid_size)
        height, width = images.shape[2:]
        whole = torch.tensor([0.0, 0.0, height, width, height, width, 0.0], device=images.device)
        offered["boxes"] = whole.expand(len(images), -1)
    return model.choose_mask(images, noise, strategy, **offered)


def standard_strategies(settings: PretrainSettings, own: masking.base.Strategy, num_patches: int) -> dict:
    """Return the three strategies at the run's mask ratio and temperature, by name.

    `own` replaces its namesake or stands beside them, as "own" if it has no name, unless it cannot be drawn.
    """
    ratio = float(exact_ratio(settings.mask_ratio))
    # All of AMR's ratios must leave at least one token and remove one.
    width = max(0.0, round(min(0.15, ratio - 1 / num_patches, 0.99 - ratio), 6))
    shared = {"mask_ratio": ratio, "temperature": temperature_of(own)}
    found = {"random": masking.create("random", mask_ratio=ratio), "sbam": masking.create("sbam", **shared)}
    found["sbam_amr"] = masking.create("sbam_amr", **shared, delta_r=width)
    return found | ({_name(settings): own} if drawable(own) else {})


def every_strategy(settings: PretrainSettings, own: masking.base.Strategy, num_patches: int) -> dict:
    """Return `standard_strategies` and every other registered one that can be drawn, each with its own defaults."""
    found = standard_strategies(settings, own, num_patches)
    for name in masking.available():
        if name not in found and name != "schedule":  # which masks as another one does
            ratio = {} if name == "amt" else {"mask_ratio": settings.mask_ratio}  # amt's counts what it throws, too
            strategy = masking.create(name, **ratio)
            found |= {name: strategy} if drawable(strategy) else {}
    return found


def own_name(settings: PretrainSettings, own: masking.base.Strategy) -> str:
    """Return the name of the run's strategy among `standard_strategies`, "random" if it cannot be drawn."""
    return _name(settings) if drawable(own) else "random"


def _name(settings: PretrainSettings) -> str:
    return settings.masking if settings.masking in masking.available() else "own"


def temperature_of(strategy: masking.base.Strategy) -> float:
    """Return the temperature of the salience that a strategy goes by; 1 where it has none."""
    return getattr(strategy, "temperature", 1.0)


def to_pixels(images: torch.Tensor, normalize: transforms.Normalize) -> torch.Tensor:
    """Bring normalised images (N, C, H, W) back to 0..1."""
    return (images - normalize.shift) / normalize.scale


@torch.no_grad()
def columns(
    model: nn.Module,
    pixels: torch.Tensor,
    normalize: transforms.Normalize,
    strategies: dict[str, masking.base.Strategy],
    *,
    temperature: float,
    rebuilt: str | None = None,
    seed: int = 0,
    names: Sequence[str] = STANDARD,
    progress: float = 1.0,
) -> list[drawing.Column]:
    """Make the columns for `drawing.draw`: the image, and what `names` says.

    Args:
        model: `models_mae.MaskedAutoencoderViT` in evaluation mode.
        pixels: (N, C, H, W) uint8, or floats in 0..1.
        normalize: pixels -> what the model was trained on.
        strategies: by name; all are given the same noise.
        temperature: of the salience, see `temperature_of`.
        rebuilt: name of the strategy whose mask is reconstructed; None for a model without a decoder.
        seed: of the noise.
        names: of `COLUMNS`, in the order in which they are drawn.
        progress: share of the training that is over, for strategies that change.
    """
    device, grid = normalize.shift.device, model.patch_embed.grid_size
    normalized = normalize(pixels.to(device))
    images = (pixels if pixels.is_floating_point() else pixels.float() / 255).cpu()
    tokens = model.embed(normalized)
    noise = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(seed)).to(device)
    masked = {"masks", "rebuilt"} & set(names)
    masks = {
        name: choose_mask(model, strategies[name], normalized, noise, progress)
        for name in (strategies if masked else ())
    }

    def salience() -> list[drawing.Column]:
        maps = masking.token_salience(tokens, temperature).view(-1, *grid).cpu()
        return [drawing.Column("salience", maps, quantity="salience")]

    def rebuild() -> list[drawing.Column]:
        if rebuilt is None:
            return []
        pred = model.predict_pixels(tokens, masks[rebuilt]).float()
        found = reconstruct(model, pred, normalized, normalize).cpu()
        how = "\n(mean, std: image's)" if model.norm_pix_loss else ""
        pasted = drawing.paste(images, found, masks[rebuilt].mask.cpu(), grid)
        return [drawing.Column(f"rebuilt: {rebuilt}{how}", found), drawing.Column("rebuilt + visible", pasted)]

    views = {
        "salience": salience,
        "attention": lambda: encoder_views.attention(model, normalized),
        "heads": lambda: encoder_views.heads(model, normalized),
        "pca": lambda: encoder_views.principal_components(model, normalized),
        "masks": lambda: _masks(masks, images, grid),
        "rebuilt": rebuild,
    }
    title = "image\n(without channel 4)" if images.shape[1] == 4 else "image"
    return [drawing.Column(title, images), *(column for name in names for column in views[name]())]


def _masks(masks: dict[str, masking.Mask], images: torch.Tensor, grid: tuple[int, int]) -> list[drawing.Column]:
    """Draw images (N, C, H, W) without what each mask removes."""
    found = []
    for name, mask in masks.items():
        removed, shares = mask.mask.cpu(), mask.mask.float().mean(dim=1).tolist()
        captions = tuple(f"{share:.0%} removed" for share in shares)
        hidden = drawing.hide(images, removed, grid)
        if mask.thrown is not None:
            captions = tuple(f"{share:.0%}, black: thrown" for share in shares)
            hidden = drawing.hide(hidden, mask.thrown.cpu(), grid, grey=0.0)
        title = name if len(masks) > 4 else f"mask: {name}"
        found.append(drawing.Column(title, hidden, captions, removed.bool().view(-1, *grid)))
    return found


def reconstruct(
    model: nn.Module, pred: torch.Tensor, normalized: torch.Tensor, normalize: transforms.Normalize
) -> torch.Tensor:
    """Return predicted patches (N, L, P) as images (N, C, H, W) in 0..1.

    Under `norm_pix_loss` a prediction has no brightness and contrast of its own: each patch gets those of the true one,
    the removed ones too.
    """
    if model.norm_pix_loss:
        pred = drawing.denormalize_patches(pred, model.patchify(normalized).float())
    return to_pixels(model.unpatchify(pred), normalize).clamp(0, 1)


@torch.no_grad()
def salience_statistics(
    model: nn.Module,
    images: torch.Tensor,
    strategy: masking.base.Strategy,
    masks: masking.base.Strategy | None = None,
    progress: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Compute statistics (N,) of normalised images (N, C, H, W), one number for each.

    Args:
        model: in evaluation mode.
        images: normalised.
        strategy: of the run.
        masks: what masks now, if it is not `strategy`, as in the warm-up.
        progress: share of the training that is over.

    Returns:
        salient_share: share of tokens with salience above the strategy's `delta` (0.1 where it has none).
        salience_entropy: entropy of the salience, as shares that sum to 1, over that of equal shares: 1 is spread out,
            0 is all on one token. 1 for an image without salience.
        mask_ratio: share of tokens removed, if what masks is `drawable` and its ratio is not drawn by the method.
    """
    tokens = model.embed(images)
    salience = masking.token_salience(tokens, temperature_of(strategy))  # (N, L)
    total = salience.sum(dim=1, keepdim=True)
    share = torch.where(total > 0, salience / total.clamp_min(1e-12), 1 / salience.shape[1])
    entropy = torch.special.entr(share).sum(dim=1) / math.log(salience.shape[1])
    noise = torch.full_like(salience, 0.5)  # counts do not depend on it
    found = {
        "salient_share": (salience > getattr(strategy, "delta", 0.1)).float().mean(dim=1),
        "salience_entropy": entropy,
    }
    masks = masks or strategy
    if drawable(masks) and model.has_mask_ratio:
        found["mask_ratio"] = choose_mask(model, masks, images, noise, progress).mask.float().mean(dim=1)
    return found
