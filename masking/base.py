"""The strategy contract and the registry. A strategy ranks and counts; everything else is shared.

A strategy is a callable `(tokens, noise=None) -> Mask`. One that needs more names it in its attribute `needs`, and is
called with just that, by name. What there is to need stands in `NEEDS`; a method gives what it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import torch

from masking.mask import Mask
from util.ratios import exact_ratio
from util.registry import Registry, join
from util.suggest import nearest

Strategy = Callable[..., "Mask"]  # (tokens (N, L, D), noise (N, L) or None, and what it needs) -> Mask

NEEDS = {
    "grid": "(rows, columns) of the patches",
    "patch_size": "(height, width) of a patch in pixels",
    "progress": "share of the training that is over, from 0 to 1",
    "epoch": "(0-based epoch, length of the schedule in epochs)",
    "draw": "one number in [0, 1) for all images of a step, a function of (seed, step)",
    "attention": "(N, heads, L) attention of the teacher's class token to the patches, after the softmax",
    "maps": "(N, rows, columns) an attention map of each whole image, in [0, 1]",
    "boxes": "(N, 7) top, left, height, width of the crop; height, width of the image, in pixels; 1 where flipped",
    "patch_loss": "(N, L) loss of each patch that the teacher predicts",
}

_REGISTRY = Registry("masking strategy")
register, available, create = _REGISTRY.register, _REGISTRY.available, _REGISTRY.create


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
    """Return `value` as a finite float of at least (`exclusive`: above) `minimum`; ValueError otherwise."""
    fits = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not fits or value < minimum or (exclusive and value == minimum):
        raise ValueError(
            f"{name} is {value!r}; it must be a number {'above' if exclusive else 'of at least'} {minimum:g}"
        )
    return float(value)


def check_share(name: str, value: float) -> float:
    """Return `value` if it is a number from 0 to 1, both included; ValueError otherwise."""
    if check_number(name, value) > 1:
        raise ValueError(f"{name} is {value!r}; it must be a number from 0 to 1")
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
    """Raise ValueError if `strategy` needs something that does not exist, or that `giver` does not offer."""
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
    offers: Iterable[str] = ("grid", "patch_size", "progress", "epoch", "draw"),
    giver: str = "this method",
) -> Mask:
    """Call `strategy` once on blank tokens of one image, and return its mask.

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
    with torch.device("cpu"):  # also where a model is only being built on the meta device
        tokens, noise = torch.zeros(1, num_tokens, embed_dim), torch.linspace(0, 0.999, num_tokens)[None]
        try:
            result = call(strategy, tokens, noise, **_blank(num_tokens, grid))
        except ValueError:
            raise
        except Exception as error:  # a user's own code may fail in any way
            raise ValueError(f"the masking strategy failed on blank tokens: {type(error).__name__}: {error}") from error
    if not isinstance(result, Mask):
        raise ValueError(f"the masking strategy returned {type(result).__name__}; it must return masking.Mask")
    return result


def _blank(num_tokens: int, grid: tuple[int, int]) -> dict:
    """Return all that a strategy may need, of one image without content."""
    return {
        "grid": grid,
        "patch_size": (2, 2),
        "progress": 0.0,
        "epoch": (0, 1),
        "draw": 0.5,
        "attention": torch.full((1, 1, num_tokens), 1 / num_tokens),
        "maps": torch.ones(1, *grid),
        "boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]),
        "patch_loss": torch.zeros(1, num_tokens),
    }
