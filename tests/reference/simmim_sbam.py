"""Masks of SBAM and AMR on cells of patches, from the tokens and the noise of a `simmim_sbam` file."""

from __future__ import annotations

import json

import numpy as np
import torch
from timm.layers import to_2tuple

import masking
from masking.cells import Cells
from masking.salience import min_max
from util.ratios import exact_ratio


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mask by renormalised cell salience for every grid in `golden["config"]`; the results have the file's own keys."""
    results = {}
    for name, config in json.loads(str(golden["config"])).items():
        found = one_grid(config, *(torch.from_numpy(golden[f"{name}/{key}"]).float() for key in ("tokens", "noise")))
        results |= {f"{name}/{key}": value for key, value in found.items()}
    return results


def one_grid(config: dict, tokens: torch.Tensor, noise: torch.Tensor) -> dict[str, np.ndarray]:
    """Compute all keys of one grid: tokens (N, L, D), noise (N, cells)."""
    grid, side = to_2tuple(config["grid"]), config["tokens_per_cell_side"]
    cells = Cells(*grid, side)
    shared = {"mask_ratio": config["mask_ratio"], "cell": side, "rounding": "removed"}
    options = {key: config[key] for key in ("delta_r", "delta")}
    fixed = masking.create("sbam", **shared, randomness=config["randomness"])
    adaptive = masking.create("sbam_amr", **shared, **options, randomness=config["randomness"], share_of="tokens")
    salience = masking.token_salience(tokens)
    by_cell = cells.mean(salience)
    masks = {"fixed": fixed(tokens, noise=noise, grid=grid), "amr": adaptive(tokens, noise=noise, grid=grid)}
    removed = {name: mask.mask.sum(dim=1).numpy() // side**2 for name, mask in masks.items()}
    order = (min_max(by_cell) + config["randomness"] * noise).argsort(dim=1, stable=True)
    settings = (float(exact_ratio(config[name])) for name in ("mask_ratio", "delta_r", "delta"))
    ratios = masking.adaptive_mask_ratio(salience, *settings)
    return {
        "salience": salience.numpy(),
        "cell_salience": by_cell.numpy(),
        "amr_ratio": ratios.numpy(),
        "masked_cells_fixed": removed["fixed"][0],
        "masked_cells_amr": removed["amr"],
        "renormalised/cell_salience": min_max(by_cell).numpy(),
        "renormalised/order": order.numpy(),
        **{f"renormalised/mask_{name}": mask.mask.view(-1, *grid).numpy() for name, mask in masks.items()},
    }
