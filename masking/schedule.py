"""A mask ratio that changes over the training, or from step to step, for any registered strategy."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import torch

from masking import base
from masking.base import check_ratio, register
from masking.mask import Mask
from util.suggest import check_known

_LEVELS = 1000  # a ratio is a whole number of thousandths of the way: alike on every machine, and few to prepare


@register("schedule")
class ScheduledRatio:
    """Mask as another strategy does, with a ratio that goes from `mask_ratio` to `end`.

    Args:
        mask_ratio: ratio at the beginning, in (0, 1), or the smallest that is drawn.
        end: ratio at the end, or the largest that is drawn; that of the beginning if None.
        of: name of the strategy.
        shape: "linear" or "cosine" (slow, fast, slow) over the training; "drawn" draws it anew for each step, uniform
            between the two, the same for all images and processes.
        options: of the other strategy.
    """

    varies = True

    def __init__(
        self,
        mask_ratio: float | str | Fraction = 0.75,
        end: float | str | Fraction | None = None,
        of: str = "random",
        shape: str = "linear",
        **options,
    ):
        check_known("masking strategy", of, base.available())  # by name only: a checkpoint's options run no code
        if of == "schedule":
            raise ValueError("of is schedule; choose the strategy that masks")
        if shape not in ("linear", "cosine", "drawn"):
            raise ValueError(f"shape is {shape!r}; choose linear, cosine or drawn")
        self.mask_ratio = check_ratio("mask_ratio", mask_ratio)
        self.end = check_ratio("end", mask_ratio if end is None else end)
        self.of, self.shape, self.options = of, shape, options
        self._at = functools.lru_cache(maxsize=64)(self._create)
        first, _ = self._at(self.mask_ratio), self._at(self.end)  # ValueError now, not after days
        self.needs = base.needs(first) | ({"draw"} if shape == "drawn" else {"progress"})
        self.reads_tokens = base.reads_tokens(first)
        for name in ("cell", "rounding", "warmup_ratio", "refresh_epochs"):  # what a method reads of a strategy
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))

    def __call__(self, tokens: torch.Tensor, noise: torch.Tensor | None = None, **needed) -> Mask:
        """Mask tokens (N, L, D) with the ratio of this step."""
        strategy = self._at(self.ratio(needed.get("progress", 0.0), needed.get("draw", 0.0)))
        return base.call(strategy, tokens, noise, **needed)

    def ratio(self, progress: float, draw: float = 0.0) -> Fraction:
        """Return the ratio at `progress` of the training, from 0 to 1; for "drawn", at `draw` of the way."""
        way = draw if self.shape == "drawn" else min(progress, 1.0)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.mask_ratio + (self.end - self.mask_ratio) * Fraction(round(way * _LEVELS), _LEVELS)

    def _create(self, ratio: Fraction) -> base.Strategy:
        return base.create(self.of, mask_ratio=ratio, **self.options)
