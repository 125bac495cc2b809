"""Masks for methods that replace tokens in place of dropping them: each image at a ratio of its own, 0 included."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from masking.base import Strategy, check_needs, check_number, needs
from masking.mask import on_device


class Ratios(NamedTuple):
    """Mask ratios, drawn on the host.

    Attributes:
        rows: of each image, from 0 to 1.
        second: one more, for all images of a step: what of the masked tokens AttMask-Hint reveals.
    """

    rows: tuple[float, ...]
    second: float = 0.0


class Replaced(NamedTuple):
    """Which tokens are replaced.

    Attributes:
        mask: (N, L) bool, True = replaced. An image may lose none of its tokens, or all.
        total: number of replaced tokens, where the host knows it without waiting for the device; else None.
        stats: numbers (N,) of each image for the log.
    """

    mask: torch.Tensor
    total: int | None = None
    stats: dict[str, torch.Tensor] | None = None

    def places(self) -> torch.Tensor:
        """Return (total,) where the replaced tokens lie among all N * L, in ascending order."""
        flat = self.mask.flatten()
        if self.total is None:
            return flat.nonzero()[:, 0]
        return torch.argsort(~flat, stable=True)[: self.total]  # its size is known: the host need not wait


def draw_ratio(generator: random.Random, means: Sequence[float], deviations: Sequence[float]) -> float:
    """Draw the mask ratio of one view (iBOT): one of several uniform ones, each as likely.

    Args:
        generator: its `uniform` is called for each deviation above 0, then its `choice` if there are several means.
        means: the centres of the ratios.
        deviations: half the width of the range around each; 0 for the mean itself.
    """
    drawn = [generator.uniform(m - d, m + d) if d > 0 else m for m, d in zip(means, deviations, strict=True)]
    return generator.choice(drawn) if len(drawn) > 1 else drawn[0]


def check_ratios(means, deviations, ratio_per: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what `draw_ratio` takes, as many means as deviations.

    Args:
        means: a number or several. By default iBOT's 0 and 0.3 +- 0.2, or AttMask's 0.3 +- 0.2.
        deviations: as many, or one for all; 0 by default where means are given.
        ratio_per: "view" for iBOT's default, "step" for AttMask's.

    Raises:
        ValueError: their numbers differ, or a ratio could lie outside [0, 1].
    """
    if means is None:
        means = (0.0, 0.3) if ratio_per == "view" else (0.3,)
        deviations = tuple(min(0.2, mean) for mean in means) if deviations is None else deviations
    means = tuple(means) if isinstance(means, (list, tuple)) else (means,)
    deviations = 0.0 if deviations is None else deviations
    deviations = tuple(deviations) if isinstance(deviations, (list, tuple)) else (deviations,) * len(means)
    if not means or len(means) != len(deviations):
        raise ValueError(f"pred_ratio_var has {len(deviations)} numbers, pred_ratio {len(means)}; give as many of each")
    for mean, deviation in zip(means, deviations, strict=True):
        low, high = check_number("pred_ratio", mean), check_number("pred_ratio_var", deviation)
        if low < high or low + high > 1:
            raise ValueError(
                f"pred_ratio {mean:g} with pred_ratio_var {deviation:g} gives ratios from {mean - deviation:g} to "
                f"{mean + deviation:g}; all must lie from 0 to 1: change one of them"
            )
    return means, deviations


def highest(rank: torch.Tensor, counts: Sequence[int] | torch.Tensor, stats: dict | None = None) -> Replaced:
    """Replace the `counts` (N,) highest of each row of ranks (N, L), which are 0 to L - 1."""
    total = None if isinstance(counts, torch.Tensor) else sum(counts)
    counts = on_device(counts, torch.int64, rank.device)
    return Replaced(rank >= rank.shape[1] - counts[:, None], total, stats)


def replace(
    strategy: Strategy, tokens: torch.Tensor, ratios: Ratios, noise: torch.Tensor | None = None, **offered
) -> Replaced:
    """Ask a strategy which tokens to replace.

    A strategy whose number of tokens is not floor(L * ratio) of its own ranking has a method `at_ratios`.

    Args:
        strategy: any that ranks.
        tokens: (N, L, D).
        ratios: of the N images.
        noise: (N, L) in [0, 1).
        offered: what a strategy may need, see `masking.NEEDS`.
    """
    check_needs(strategy, offered)
    needed = {name: offered[name] for name in needs(strategy)}
    if hasattr(strategy, "at_ratios"):
        return strategy.at_ratios(tokens, ratios, noise=noise, **needed)
    mask = strategy(tokens, noise=noise, **needed)
    # A hair for ratios such as 0.29, of which 100 tokens would make 28.999999999999996.
    return highest(mask.ids_restore, [int(tokens.shape[1] * r + 1e-9) for r in ratios.rows], mask.stats)
