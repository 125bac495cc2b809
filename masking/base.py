"""The strategy contract, `Mask`, and the registry. A strategy ranks and counts; everything else is shared."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from masking.kept import KeptTokens
from util.suggest import nearest

Strategy = Callable[..., "Mask"]  # (tokens (N, L, D), noise (N, L) or None) -> Mask

_REGISTRY: dict[str, type] = {}


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
    """

    mask: torch.Tensor
    num_keep: torch.Tensor
    ids_keep: torch.Tensor
    ids_restore: torch.Tensor
    keep_lengths: tuple[int, ...] | None = None
    stats: dict[str, torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def kept(self) -> KeptTokens:
        """Where the kept tokens lie, for the encoder and the decoder."""
        return KeptTokens.locate(self.ids_keep, self.num_keep, self.mask.shape[1], self.keep_lengths)


def mask_from_scores(scores: torch.Tensor, num_keep: int | torch.Tensor, stats: dict | None = None) -> Mask:
    """Keep the `num_keep` lowest-scored tokens of each image; equal scores keep their order.

    Args:
        scores: (N, L), ascending: the first are kept.
        num_keep: one int for all images, or (N,) integers. Between 1 and L - 1.
        stats: diagnostics handed through to `Mask.stats`.

    Raises:
        ValueError: if an image would keep none or all of its tokens, or shapes do not fit.
    """
    num_images, num_tokens = scores.shape
    ids_shuffle = torch.argsort(scores, dim=1, stable=True)  # (N, L)
    place = torch.arange(num_tokens, device=scores.device)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, place.expand_as(ids_shuffle))
    if isinstance(num_keep, torch.Tensor):
        if num_keep.shape != (num_images,):
            raise ValueError(f"num_keep has shape {tuple(num_keep.shape)}; one count for each of {num_images} images")
        # The one host transfer of a step whose images differ: the packed length is a shape, so the host must know it.
        counts = tuple(int(count) for count in num_keep.tolist())
        num_keep = num_keep.to(device=scores.device, dtype=torch.int64)
    else:
        counts = (int(num_keep),) * num_images
        num_keep = torch.full((num_images,), int(num_keep), dtype=torch.int64, device=scores.device)
    if counts and not 1 <= min(counts) <= max(counts) < num_tokens:
        raise ValueError(
            f"{min(counts)} to {max(counts)} of {num_tokens} tokens would be kept; "
            "at least one must be kept and one removed: change the mask ratio, the patch size or the image size"
        )
    stats = stats or {}
    if len(set(counts)) <= 1:
        first = counts[0] if counts else 0
        return Mask(ids_restore >= first, num_keep, ids_shuffle[:, :first], ids_restore, None, stats)
    total = sum(counts)  # a boolean index would make the host wait once more
    image = torch.repeat_interleave(torch.arange(num_images, device=scores.device), num_keep, output_size=total)
    start = num_keep.cumsum(0) - num_keep  # (N,) where each image begins
    rank = torch.arange(total, device=scores.device) - start[image]
    return Mask(ids_restore >= num_keep[:, None], num_keep, ids_shuffle[image, rank], ids_restore, counts, stats)


def keep_count(num_tokens: int, mask_ratio: float | Fraction) -> int:
    """K = ceil(L (1 - ratio)), in exact arithmetic on the decimal the user wrote: L=100, ratio=0.7 keeps 30."""
    ratio = mask_ratio if isinstance(mask_ratio, Fraction) else Fraction(str(float(mask_ratio)))
    return math.ceil(num_tokens * (1 - ratio))


def check_ratio(name: str, value: float) -> float:
    """`value` as a float, if it is strictly between 0 and 1; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a number between 0 and 1, both excluded")
    return float(value)


def check_number(name: str, value: float, *, minimum: float = 0.0, exclusive: bool = False) -> float:
    """`value` as a finite float of at least (`exclusive`: above) `minimum`; ValueError otherwise."""
    fits = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not fits or value < minimum or (exclusive and value == minimum):
        raise ValueError(
            f"{name} is {value!r}; it must be a number {'above' if exclusive else 'of at least'} {minimum:g}"
        )
    return float(value)


def draw_noise(tokens: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """The strategy's uniform draw: `noise` if given, else U[0, 1) of shape (N, L), fp32, on the tokens' device."""
    if noise is None:
        return torch.rand(tokens.shape[:2], device=tokens.device)
    if noise.shape != tokens.shape[:2]:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; the tokens need {tuple(tokens.shape[:2])}")
    return noise.to(tokens.device)


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a strategy available as `--masking name`. A name that is taken is an error."""

    def add(strategy: type) -> type:
        if name in _REGISTRY:
            raise ValueError(f"the masking strategy {name!r} is registered already, by {_REGISTRY[name].__qualname__}")
        _REGISTRY[name] = strategy
        return strategy

    return add


def available() -> list[str]:
    """Names of the registered strategies."""
    return sorted(_REGISTRY)


def create(name: str, **options) -> Strategy:
    """Build a strategy from its registered name or from `package.module:Class`.

    Args:
        name: one of `available()`, or an import path; the current folder is importable.
        options: the strategy's own hyper-parameters.

    Raises:
        ValueError: unknown name (with the nearest one), import failure, unknown or impossible option.
    """
    factory = _load(name) if ":" in name else _lookup(name)
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in parameters:
                hint = nearest(option, parameters)
                raise ValueError(
                    f"the masking strategy {name!r} has no option {option!r}{hint}; it has {_join(parameters)}"
                )
    try:
        return factory(**options)
    except TypeError as error:
        raise ValueError(f"the masking strategy {name!r} cannot be made from {_join(options)}: {error}") from error


def check(strategy: Strategy, num_tokens: int, embed_dim: int = 8) -> None:
    """Call `strategy` once on blank tokens of one image; ValueError if it cannot mask `num_tokens` tokens."""
    tokens = torch.zeros(1, num_tokens, embed_dim)
    try:
        result = strategy(tokens, noise=torch.linspace(0, 0.999, num_tokens)[None])
    except ValueError:
        raise
    except Exception as error:  # a user's own code may fail in any way
        raise ValueError(f"the masking strategy failed on blank tokens: {type(error).__name__}: {error}") from error
    if not isinstance(result, Mask):
        raise ValueError(f"the masking strategy returned {type(result).__name__}; it must return masking.Mask")


def _lookup(name: str) -> type:
    if name not in _REGISTRY:
        raise ValueError(
            f"there is no masking strategy {name!r}{nearest(name, _REGISTRY)}; "
            f"available: {', '.join(available())}, or your own as package.module:Class"
        )
    return _REGISTRY[name]


def _load(path: str) -> type:
    module_name, _, class_name = path.partition(":")
    if os.getcwd() not in sys.path:  # torchrun and `python path/main.py` do not put it there
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # importing runs the user's code, which may fail in any way
        raise ValueError(
            f"the masking strategy {path!r} cannot be imported ({error}); write package.module:Class"
        ) from error


def _join(names) -> str:
    return ", ".join(names) or "none"
