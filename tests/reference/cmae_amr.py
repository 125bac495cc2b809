"""CMAE under SBAM and AMR on cells from a `cmae_amr` file; the weights are those of `cmae_tiny`."""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from helpers import golden as stored
from reference import cmae

import masking
from masking.cells import Cells
from masking.salience import min_max
from methods import At, Inputs
from util.ratios import exact_ratio


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute masks, predictions, losses and gradients from both views, noise and the other file's weights."""
    config, tiny = json.loads(str(golden["config"])), stored("cmae_tiny")
    weights = {name: torch.from_numpy(np.array(tiny[name])) for name in tiny if name.startswith("state/")}
    names = {cmae.ours(n.removeprefix("state/")): n.removeprefix("state/") for n in weights}
    images, seconds, noise = (
        torch.from_numpy(np.array(golden[n])).float() for n in ("images", "images_target", "noise")
    )
    side = math.isqrt(json.loads(str(tiny["config"]))["num_tokens"] // noise.shape[1])  # of a cell, in patches
    results = {}
    for name in ("sbam", "amr"):
        method = cmae.build(json.loads(str(tiny["config"])), weights)
        options = {"mask_ratio": config["mask_ratio"], "randomness": config["randomness"], "delta": config["delta"]}
        options |= {"delta_r": config["delta_r"]} if name == "amr" else {}
        strategy = masking.create("sbam_amr" if name == "amr" else "sbam", **options, cell=side)
        object.__setattr__(method, "strategy", strategy)
        found = one_strategy(method, Inputs([images, seconds], noise), names)
        found["num_keep_cells"] = (~found["mask"].bool()).sum(dim=1) // side**2
        results |= {f"{name}/{key}": value for key, value in found.items()}
    tokens = method.model.embed(images)
    salience = masking.token_salience(tokens)
    by_cell = min_max(Cells(*method.model.patch_embed.grid_size, side).mean(salience))
    ratio, delta_r = (float(exact_ratio(config[name])) for name in ("mask_ratio", "delta_r"))
    results |= {
        "tokens": tokens,
        "salience": salience,
        "cell_salience": by_cell,
        "share": (by_cell > config["delta"]).float().mean(dim=1),
        "ratio": masking.adaptive_mask_ratio(by_cell, ratio, delta_r, config["delta"]),
    }
    return {name: value.detach().numpy() for name, value in results.items()}


def one_strategy(method, inputs: Inputs, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Compute what stands below `sbam/` or `amr/`."""
    at = At(0, 0.0, 1)
    plan = method.choose(inputs, at)
    seen, hooks = cmae.watch(method)
    losses = method(inputs, plan, at)
    for hook in hooks:
        hook.remove()
    pixel, contrast = (losses[term].sum / losses[term].count for term in ("pixels", "contrast"))
    (pixel + contrast).backward()
    return {
        "mask": plan.mask.mask.to(torch.uint8),
        "pred/pixel": seen["model.decoder_pred"][0][1][:, 1:],
        "pred/feature": seen["feature_decoder.decoder_pred"][0][1][:, 1:],
        "loss/pixel": method.model.forward_loss(inputs.views[0], seen["model.decoder_pred"][0][1][:, 1:], plan.mask),
        "loss/contrastive": contrast,
        "loss/total": pixel + contrast,
    } | {f"grad/{names[n]}": p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
