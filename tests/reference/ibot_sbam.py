"""SBAM and AMR in iBOT from the tokens, noise and ratios of an `ibot_sbam` file."""

from __future__ import annotations

import numpy as np
import torch

import masking


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mask each view at its own ratio, and in AttMask's way at one ratio behind its gate."""
    tokens, noise = (torch.from_numpy(np.array(golden[name])) for name in ("tokens", "noise"))
    randomness, delta, delta_r = (float(golden[name]) for name in ("randomness", "delta", "delta_r"))
    fixed = masking.create("sbam", randomness=randomness, delta=delta)
    # Each view has its own ratio; around 1/2 `delta_r` has most room.
    adaptive = masking.create("sbam_amr", mask_ratio=0.5, randomness=randomness, delta=delta, delta_r=delta_r)
    salience, ratio = masking.token_salience(tokens), golden["ratio"]
    share = (salience > delta).double().mean(dim=1).numpy()
    own = np.clip(ratio + delta_r * (2 * share - 1), 0, 1)
    views = masking.Ratios(tuple(ratio.tolist()))
    base = float(golden["swap/batch_ratio"])
    open_gate = golden["swap/uniform"] <= float(golden["swap/masking_prob"])
    gated, everywhere = masking.Ratios(tuple(base * open_gate)), masking.Ratios((base,) * len(tokens))
    masks = {
        "sbam/mask": masking.replace(fixed, tokens, views, noise).mask,
        "amr/mask": masking.replace(adaptive, tokens, views, noise).mask,
        "swap/mask": masking.replace(fixed, tokens, gated, noise).mask,
        "swap/mask_amr": masking.replace(adaptive, tokens, gated, noise).mask,
    }
    before = masking.replace(adaptive, tokens, everywhere, noise).mask
    return {
        "salience": salience.numpy(),
        "score": (salience + randomness * noise).numpy(),
        "amr/share_salient": share,
        "amr/ratio": np.where(ratio > 0, own, 0.0),
        "sbam/num_masked": masks["sbam/mask"].sum(dim=1).numpy(),
        "amr/num_masked": masks["amr/mask"].sum(dim=1).numpy(),
        "swap/num_masked_amr_before_gate": before.sum(dim=1).numpy(),
        **{name: mask.numpy() for name, mask in masks.items()},
    }
