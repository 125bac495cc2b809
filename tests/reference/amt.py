"""AM and AMT from an `amt_tiny` file: attention, maps, crops, orders, masks, predictions, losses, gradients."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch import nn

import masking
import models_mae
from masking.attention import attention_map, crop_map


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute what the file holds from its configuration, weights, images, boxes and random numbers."""
    given = {name: torch.from_numpy(np.array(value)) for name, value in golden.items() if value.dtype.kind != "U"}
    config = json.loads(str(golden["config"]))
    used = config.pop("weights_used")
    model = build(config, given)
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    attention = model.class_attention(given["map_images"])
    maps = attention_map(attention).view(-1, *model.patch_embed.grid_size)
    boxes = torch.cat([given["crop_box"], given["image_size"], given["flip"][:, None]], dim=1).float()
    weights = {
        name: crop_map(maps, boxes, size, patch, released=name.endswith("released")).flatten(1)
        for name in ("weights_released", "weights_intended")
    }
    results = {"attention_cls": attention, "map": maps} | weights
    for name in ("released", "intended"):
        results[f"pixel_map_{name}"] = crop_map(maps[:1], boxes[:1], size, released=name == "released")
    for name in ("amt", "am"):
        found = one_strategy(name, model, given, maps, boxes, released=used[name].endswith("released"))
        results |= {f"{name}/{key}": value for key, value in found.items()}
    return {name: value.detach().numpy() for name, value in results.items()}


def build(config: dict, given: dict[str, torch.Tensor]) -> models_mae.MaskedAutoencoderViT:
    """Build the product's model with the weights of the file."""
    names = models_mae.MaskedAutoencoderViT.__init__.__annotations__
    norm_layer = partial(nn.LayerNorm, eps=config["layer_norm_eps"])
    options = {name: value for name, value in config.items() if name in names}
    model = models_mae.MaskedAutoencoderViT(**options, norm_layer=norm_layer)
    model.load_state_dict(
        {name.removeprefix("state/"): value for name, value in given.items() if name.startswith("state/")}
    )
    return model.eval()


def one_strategy(
    name: str,
    model: models_mae.MaskedAutoencoderViT,
    given: dict,
    maps: torch.Tensor,
    boxes: torch.Tensor,
    released: bool,
) -> dict[str, torch.Tensor]:
    """Compute what stands below `am/` or `amt/`."""
    masked, thrown = given[f"{name}/ratios"].tolist()
    number = model.num_patches
    masked, removed = int(number * masked), int(number * (masked + thrown))  # as the release counts
    ratios = {"mask_ratio": Fraction(removed, number), "throw_ratio": Fraction(removed - masked, number)}
    strategy = masking.create(name, **ratios, released_crop=released)
    noise = -torch.expm1(-given[f"{name}/exponential"].double())
    images = given["images"]
    model.set_masking(strategy)
    mask = model.choose_mask(images, noise, maps=maps, boxes=boxes)
    latent = model.forward_encoder(images, mask)
    seen = []
    hook = model.decoder_blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pred = model.forward_decoder(latent, mask)
    hook.remove()
    results = {
        # Ours is lowest first: the kept ones; the draw is highest first: the masked ones.
        "order": (number - 1 - mask.ids_restore).argsort(dim=1),
        "mask": mask.mask.to(torch.int8) - 2 * (mask.thrown.to(torch.int8) if mask.thrown is not None else 0),
        "pred": pred,
    }
    if name == "amt":
        # There the kept tokens stand in the order of the draw.
        results |= {"latent": torch.cat([latent[:, :1], latent[:, 1:].flip(1)], dim=1), "decoder_input": seen[0]}
    for prefix, norm_pix_loss in (("raw_pix", False), ("norm_pix", True)):
        model.norm_pix_loss = norm_pix_loss
        model.zero_grad()
        loss, _ = model.forward_masked(images, mask)
        loss.backward()
        results[f"{prefix}/loss"] = loss
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if (name, prefix) == ("amt", "raw_pix"):
            results |= {f"{prefix}/grad/{n}": gradient.clone() for n, gradient in gradients.items()}
        else:
            results |= {f"{prefix}/grad_norm/{n}": gradient.norm() for n, gradient in gradients.items()}
    return results
