"""Masking strategies: `create(name, ...)` gives a callable `(tokens, noise=None) -> Mask`.

Convention, everywhere in this project: 1 / True = removed (masked), 0 / False = kept.
"""

from masking.base import Mask, available, check, create, draw_noise, keep_count, mask_from_scores, register
from masking.salience import SBAM, SBAMAdaptive, adaptive_mask_ratio, token_salience
from masking.uniform import RandomMasking

__all__ = [
    "SBAM",
    "Mask",
    "RandomMasking",
    "SBAMAdaptive",
    "adaptive_mask_ratio",
    "available",
    "check",
    "create",
    "draw_noise",
    "keep_count",
    "mask_from_scores",
    "register",
    "token_salience",
]
