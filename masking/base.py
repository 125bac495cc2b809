"""The strategy contract, `Mask`, and the registry. A strategy ranks and counts; everything else is shared.

A strategy is a callable `(tokens, noise=None) -> Mask`. One that needs more names it in its attribute `needs`, and is
called with just that, by name. What there is to need stands in `NEEDS`; a method gives what it has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from masking.kept import KeptTokens
from util.ratios import exact_ratio
from util.registry import Registry, join
from util.suggest import nearest

Strategy = Callable[..., "Mask"]  # (tokens (N, L, D), noise (N, L) or None, and what it needs) -> Mask

NEEDS = {
    "grid": "(rows, columns) of the patches",
    "progress": "share of the training that is over, from 0 to 1",
    "attention": "(N, heads, L) attention of the teacher's class token to the patches, after the softmax",
    "maps": "(N, rows, columns) an attention map of each whole image, in [0, 1]",
    "boxes": "(N, 7) top, left, height, width of the crop; height, width of the image, in pixels; 1 where flipped",
    "patch_loss": "(N, L) loss of each patch that the teacher predicts",
}

_REGISTRY = Registry("masking strategy")
register, available, create = _REGISTRY.register, _REGISTRY.available, _REGISTRY.create


@dataclass(frozen=True)
class Mask:
    """Which tokens of each image are removed.

    Attributes:
        mask: (N, L) bool, True = removed, False = kept.
        num_keep: (N,) int64, kept tokens of each image.
        ids_keep: kept positions, lowest score first: (N, K) where every image keeps K, else packed image by image
            into (sum(num_keep),).
        ids_restore: (N, L) int64, the place of each token in the ranking, as in MAE.
        keep_lengths: `num_keep` on the host, where the images differ; None where all keep the same number.
        stats: per-image diagnostics (N,) by name, for the log only.
        thrown: (N, L) bool, removed tokens that are not predicted either; None where all removed ones are predicted.
    """

    mask: torch.Tensor
    num_keep: torch.Tensor
    ids_keep: torch.Tensor
    ids_restore: torch.Tensor
    keep_lengths: tuple[int, ...] | None = None
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    thrown: torch.Tensor | None = None

    @property
    def predicted(self) -> torch.Tensor:
        """Return (N, L) bool, True for the removed tokens that the decoder predicts."""
        return self.mask if self.thrown is None else self.mask & ~self.thrown

    @functools.cached_property
    def kept(self) -> KeptTokens:
        """Where the kept tokens lie, for the encoder and the decoder."""
        return KeptTokens.locate(self.ids_keep, self.num_keep, self.mask.shape[1], self.keep_lengths)


def mask_from_scores(
    scores: torch.Tensor,
    num_keep: int | torch.Tensor,
    stats: dict | None = None,
    num_thrown: int | torch.Tensor = 0,
) -> Mask:
    """Keep the `num_keep` lowest-scored tokens of each image; equal scores keep their order.

    Args:
        scores: (N, L), ascending: the first are kept.
        num_keep: one int for all images, or (N,) integers. Between 1 and L - 1.
        stats: diagnostics handed through to `Mask.stats`.
        num_thrown: how many of the next-lowest are thrown: removed, and not predicted. One int, or (N,) integers.

    Raises:
        ValueError: an image would keep none or all of its tokens, or have none to predict, or shapes do not fit.
    """
    num_images, num_tokens = scores.shape
    ids_shuffle = torch.argsort(scores, dim=1, stable=True)  # (N, L)
    place = torch.arange(num_tokens, device=scores.device)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, place.expand_as(ids_shuffle))
    counts, num_keep = _counts("num_keep", num_keep, num_images, scores.device)
    if counts and not 1 <= min(counts) <= max(counts) < num_tokens:
        raise ValueError(
            f"{min(counts)} to {max(counts)} of {num_tokens} tokens would be kept; "
            "at least one must be kept and one removed: change the mask ratio, the patch size or the image size"
        )
    thrown = _thrown(ids_restore, num_keep, counts, num_thrown)
    stats = stats or {}
    if len(set(counts)) <= 1:
        first = counts[0] if counts else 0
        return Mask(ids_restore >= first, num_keep, ids_shuffle[:, :first], ids_restore, None, stats, thrown)
    total = sum(counts)  # a boolean index would make the host wait once more
    image = torch.repeat_interleave(torch.arange(num_images, device=scores.device), num_keep, output_size=total)
    start = num_keep.cumsum(0) - num_keep  # (N,) where each image begins
    rank = torch.arange(total, device=scores.device) - start[image]
    mask = ids_restore >= num_keep[:, None]
    return Mask(mask, num_keep, ids_shuffle[image, rank], ids_restore, counts, stats, thrown)


def remove_highest(scores: torch.Tensor, num_removed: int | torch.Tensor) -> torch.Tensor:
    """Mark the `num_removed` highest-scored tokens of each image: (N, L) bool, True = removed.

    For methods that replace tokens instead of dropping them: an image may lose none of its tokens, or all. Of equal
    scores the later tokens are removed first, as in `mask_from_scores`.

    Args:
        scores: (N, L).
        num_removed: one int for all images, or (N,) integers, from 0 to L. The host does not wait for them.
    """
    num_images, num_tokens = scores.shape
    if not isinstance(num_removed, torch.Tensor):
        num_removed = torch.full((num_images,), num_removed)
    if num_removed.shape != (num_images,):
        raise ValueError(f"num_removed has shape {tuple(num_removed.shape)}; one count for each of {num_images} images")
    order = torch.argsort(scores, dim=1, stable=True)
    place = torch.arange(num_tokens, device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return rank >= num_tokens - num_removed.to(scores.device)[:, None]


def _counts(
    name: str, number: int | torch.Tensor, num_images: int, device: torch.device
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Return a count for each image, on the host and as (N,) int64 on the device."""
    if not isinstance(number, torch.Tensor):
        return (int(number),) * num_images, torch.full((num_images,), int(number), dtype=torch.int64, device=device)
    if number.shape != (num_images,):
        raise ValueError(f"{name} has shape {tuple(number.shape)}; one count for each of {num_images} images")
    # The one host transfer of a step whose images differ: the packed length is a shape, so the host must know it.
    return tuple(int(count) for count in number.tolist()), number.to(device=device, dtype=torch.int64)


def _thrown(
    ids_restore: torch.Tensor, num_keep: torch.Tensor, kept: tuple[int, ...], num_thrown: int | torch.Tensor
) -> torch.Tensor | None:
    """Return (N, L) bool for the tokens ranked right after the kept ones; None if none is thrown."""
    if not isinstance(num_thrown, torch.Tensor) and num_thrown == 0:
        return None
    num_images, num_tokens = ids_restore.shape
    counts, num_thrown = _counts("num_thrown", num_thrown, num_images, ids_restore.device)
    if any(thrown < 0 or keep + thrown >= num_tokens for keep, thrown in zip(kept, counts, strict=True)):
        raise ValueError(
            f"up to {max(counts)} of {num_tokens} tokens would be thrown, and none be left to predict: "
            "lower the share that is thrown or the mask ratio"
        )
    return (ids_restore >= num_keep[:, None]) & (ids_restore < (num_keep + num_thrown)[:, None])


def keep_count(num_tokens: int, mask_ratio: float | str | Fraction, rounding: str = "kept") -> int:
    """Return K = ceil(L (1 - ratio)), in exact arithmetic on what the user wrote: L=100, ratio=0.7 keeps 30.

    With `rounding` "removed" the number of removed tokens is rounded up instead: K = L - ceil(L ratio).
    """
    kept = num_tokens * (1 - exact_ratio(mask_ratio))
    return math.ceil(kept) if rounding == "kept" else math.floor(kept)


def check_rounding(rounding: str) -> str:
    """Return `rounding` if it is "kept" or "removed"; ValueError otherwise."""
    if rounding not in ("kept", "removed"):
        raise ValueError(f"rounding is {rounding!r}; choose which number is rounded up: kept or removed")
    return rounding


def check_ratio(name: str, value: float | str | Fraction) -> Fraction:
    """Return `value` exactly, if it is strictly between 0 and 1; ValueError otherwise."""
    try:
        ratio = exact_ratio(value)
    except ValueError:
        ratio = None
    if ratio is None or not 0 < ratio < 1:
        raise ValueError(f"{name} is {value!r}; it must be a number between 0 and 1, both excluded")
    return ratio


def check_number(name: str, value: float, *, minimum: float = 0.0, exclusive: bool = False) -> float:
    """`value` as a finite float of at least (`exclusive`: above) `minimum`; ValueError otherwise."""
    fits = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not fits or value < minimum or (exclusive and value == minimum):
        raise ValueError(
            f"{name} is {value!r}; it must be a number {'above' if exclusive else 'of at least'} {minimum:g}"
        )
    return float(value)


def draw_noise(tokens: torch.Tensor, noise: torch.Tensor | None, count: int | None = None) -> torch.Tensor:
    """Return the strategy's uniform draw: `noise` if given, else U[0, 1), fp32, on the tokens' device.

    Args:
        tokens: (N, L, D).
        noise: (N, L) in [0, 1), or None.
        count: numbers that are needed for each image; L if None. Of given noise the first `count` are taken.
    """
    shape = (len(tokens), tokens.shape[1] if count is None else count)
    if noise is None:
        return torch.rand(shape, device=tokens.device)
    if noise.ndim != 2 or len(noise) != len(tokens) or noise.shape[1] not in (shape[1], tokens.shape[1]):
        raise ValueError(f"noise has shape {tuple(noise.shape)}; the tokens need {tuple(tokens.shape[:2])}")
    return noise[:, : shape[1]].to(tokens.device)


def call(strategy: Strategy, tokens: torch.Tensor, noise: torch.Tensor | None = None, **offered) -> Mask:
    """Call `strategy` with what it needs of `offered`, by name.

    Raises:
        ValueError: it needs something that is not offered.
    """
    check_needs(strategy, offered)
    return strategy(tokens, noise=noise, **{name: offered[name] for name in needs(strategy)})


def needs(strategy: Strategy) -> frozenset[str]:
    """Return what a strategy needs besides tokens and noise."""
    return frozenset(getattr(strategy, "needs", ()))


def reads_tokens(strategy: Strategy) -> bool:
    """Return whether a strategy looks at the tokens' values; if not, they need not be computed.

    One that declares to need nothing does not, unless its attribute `reads_tokens` says otherwise; every other does.
    """
    declared = getattr(strategy, "needs", None)
    return getattr(strategy, "reads_tokens", declared is None or len(declared) > 0)


def check_needs(strategy: Strategy, offered: Iterable[str], giver: str = "this method") -> None:
    """ValueError if `strategy` needs something that does not exist, or that `giver` does not offer."""
    name, wanted = getattr(strategy, "registered_name", type(strategy).__name__), needs(strategy)
    for unknown in sorted(wanted - set(NEEDS)):
        raise ValueError(
            f"the masking strategy {name} needs {unknown!r}{nearest(unknown, NEEDS)}; there is {join(NEEDS)}"
        )
    missing = sorted(wanted - set(offered))
    if missing:
        raise ValueError(
            f"--masking {name}: needs {join(missing)}, which {giver} does not give; choose another of the two"
        )


def check(
    strategy: Strategy,
    num_tokens: int,
    embed_dim: int = 8,
    *,
    grid: tuple[int, int] | None = None,
    offers: Iterable[str] = ("grid", "progress"),
    giver: str = "this method",
) -> None:
    """Call `strategy` once on blank tokens of one image.

    Args:
        num_tokens, embed_dim: L and D.
        grid: rows and columns of the patches; a square one if None.
        offers: what will be offered to it.
        giver: who offers, for the message.

    Raises:
        ValueError: it cannot mask `num_tokens` tokens, or needs what is not offered.
    """
    check_needs(strategy, offers, giver)
    grid = grid or (math.isqrt(num_tokens), num_tokens // max(math.isqrt(num_tokens), 1))
    blank = {
        "grid": grid,
        "progress": 0.0,
        "attention": torch.full((1, 1, num_tokens), 1 / num_tokens),
        "maps": torch.ones(1, *grid),
        "boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]),
        "patch_loss": torch.zeros(1, num_tokens),
    }
    tokens, noise = torch.zeros(1, num_tokens, embed_dim), torch.linspace(0, 0.999, num_tokens)[None]
    try:
        result = call(strategy, tokens, noise, **blank)
    except ValueError:
        raise
    except Exception as error:  # a user's own code may fail in any way
        raise ValueError(f"the masking strategy failed on blank tokens: {type(error).__name__}: {error}") from error
    if not isinstance(result, Mask):
        raise ValueError(f"the masking strategy returned {type(result).__name__}; it must return masking.Mask")
