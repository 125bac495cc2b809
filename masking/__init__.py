"""Masking strategies: `create(name, ...)` gives a callable `(tokens, noise=None) -> Mask`.

Convention, everywhere in this project: 1 / True = removed (masked), 0 / False = kept.
"""

from masking.attention import AttentionMasking, AttentionThrowing, attention_map, crop_map
from masking.attmask import AttMaskHigh, AttMaskHint, AttMaskLow
from masking.base import NEEDS, available, call, check, create, draw_noise, keep_count, reads_tokens, register
from masking.block import BlockMasking, InverseBlockMasking
from masking.color import ColorMasking
from masking.hard_patches import HardPatches
from masking.mask import Mask, mask_from_scores, predict_part, remove_highest
from masking.replaced import Ratios, Replaced, check_ratios, draw_ratio, replace
from masking.salience import SBAM, SBAMAdaptive, adaptive_mask_ratio, token_salience
from masking.schedule import ScheduledRatio
from masking.uniform import RandomMasking

__all__ = [
    "NEEDS",
    "SBAM",
    "AttMaskHigh",
    "AttMaskHint",
    "AttMaskLow",
    "AttentionMasking",
    "AttentionThrowing",
    "BlockMasking",
    "ColorMasking",
    "HardPatches",
    "InverseBlockMasking",
    "Mask",
    "RandomMasking",
    "Ratios",
    "Replaced",
    "SBAMAdaptive",
    "ScheduledRatio",
    "adaptive_mask_ratio",
    "attention_map",
    "available",
    "call",
    "check",
    "check_ratios",
    "create",
    "crop_map",
    "draw_noise",
    "draw_ratio",
    "keep_count",
    "mask_from_scores",
    "predict_part",
    "reads_tokens",
    "register",
    "remove_highest",
    "replace",
    "token_salience",
]
