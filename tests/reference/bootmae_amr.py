"""BootMAE under SBAM and AMR from a `bootmae_amr` file; the weights are those of `bootmae_tiny`."""

from __future__ import annotations

import json

import numpy as np
import torch
from helpers import golden as stored
from reference import bootmae

import masking
from methods import At, BootMAE, Inputs
from util.ratios import exact_ratio


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Compute masks, predictions, losses and gradients from images, noise and the other file's weights."""
    config, tiny = json.loads(str(golden["config"])), stored("bootmae_tiny")
    weights = {name: torch.from_numpy(np.array(tiny[name])) for name in tiny if name.startswith(("state/", "ema/"))}
    sizes = json.loads(str(tiny["config"])) | {"feature_weight": config["feature_weight"]}
    images, noise = (torch.from_numpy(np.array(golden[name])) for name in ("images", "noise"))
    results = {}
    for name in ("sbam", "amr"):
        method = bootmae.build(sizes, weights)
        found = one_strategy(name, method, config, images, noise)
        results |= {f"{name}/{key}": value for key, value in found.items()}
    tokens = method.model.embed(images)
    salience = masking.token_salience(tokens)
    options = {name: float(exact_ratio(config[name])) for name in ("mask_ratio", "delta_r", "delta")}
    results |= {
        "tokens": tokens,
        "salience": salience,
        "share": (salience > config["delta"]).float().mean(dim=1),
        "ratio": masking.adaptive_mask_ratio(salience, **options),
        "order": (salience + config["randomness"] * noise).argsort(dim=1, stable=True).short(),
        "target/pixel": method.model.unpatchify(method.model.pixel_target(images)),
        "target/feature": method.choose(Inputs([images], noise), At(0, 0.0, 1)).extra["features"],
    }
    return {name: value.detach().numpy() for name, value in results.items()}


def one_strategy(
    name: str, method: BootMAE, config: dict, images: torch.Tensor, noise: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Compute what stands below `sbam/` or `amr/`."""
    options = {"mask_ratio": config["mask_ratio"], "randomness": config["randomness"], "delta": config["delta"]}
    if name == "amr":
        options["delta_r"] = config["delta_r"]
    strategy = masking.create("sbam_amr" if name == "amr" else "sbam", **options)
    object.__setattr__(method, "strategy", strategy)
    model, at = method.model, At(0, 1.0, 1)  # late enough for the whole weight of the features
    plan = method.choose(Inputs([images], noise), at)
    first, last = model.encode_features(model.embed(images), plan.mask)
    losses = method(Inputs([images]), plan, at)
    pixel, feature = (losses[term].sum / losses[term].count for term in ("pixels", "features"))
    (pixel + feature).backward()
    return {
        "num_keep": plan.mask.num_keep,
        "mask": plan.mask.mask.to(torch.uint8),
        "pred/pixel": model.unpatchify(model.regress(model.norm(last), first, plan.mask)),
        "pred/feature": model.predict_features(model.norm(last), last, plan.mask),
        "weight": method.patch_weights(plan.mask.mask),
        "loss/pixel": pixel,
        "loss/feature": bootmae.unweighted(method, images, plan),
        "loss/total": pixel + feature,
    } | {f"grad/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
