"""`Mask`, and how scores and counts become one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch

from masking.sequences import Sequences
from util.ratios import exact_ratio


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
        thrown_lengths: how many are thrown of each image, on the host; None where `thrown` is.
        weight: (N,) what each predicted token of an image counts in the loss; None where all count 1.
    """

    mask: torch.Tensor
    num_keep: torch.Tensor
    ids_keep: torch.Tensor
    ids_restore: torch.Tensor
    keep_lengths: tuple[int, ...] | None = None
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    thrown: torch.Tensor | None = None
    thrown_lengths: tuple[int, ...] | None = None
    weight: torch.Tensor | None = None

    @property
    def predicted(self) -> torch.Tensor:
        """Return (N, L) bool, True for the removed tokens that the decoder predicts."""
        return self.mask if self.thrown is None else self.mask & ~self.thrown

    @property
    def loss_weight(self) -> torch.Tensor:
        """Return (N, L), what each token counts in the loss, 0 unless it is predicted; the sum is the count."""
        return self.predicted if self.weight is None else self.predicted * self.weight[:, None]

    @functools.cached_property
    def host_thrown(self) -> tuple[int, ...]:
        """Return how many tokens of each image are thrown. The host waits only for a mask without `thrown_lengths`."""
        if self.thrown is None:
            return (0,) * len(self.mask)
        return self.thrown_lengths or tuple(self.thrown.sum(dim=1).tolist())

    @functools.cached_property
    def kept(self) -> Sequences:
        """Locate the kept tokens: the encoder's sequences."""
        return Sequences.locate(self.ids_keep, self.num_keep, self.mask.shape[1], self.keep_lengths)

    @functools.cached_property
    def decoded(self) -> Sequences | None:
        """Locate the kept and the predicted tokens, in raster order: the decoder's sequences; None for all L."""
        if self.thrown is None:
            return None
        num_tokens = self.mask.shape[1]
        lengths = tuple(num_tokens - number for number in self.host_thrown)
        order = torch.argsort(self.thrown, dim=1, stable=True)  # what is decoded comes first, in raster order
        counts = num_tokens - self.thrown.sum(dim=1)
        if len(set(lengths)) <= 1:
            return Sequences.locate(order[:, : lengths[0] if lengths else 0], counts, num_tokens)
        return Sequences.locate(_first(order, counts, sum(lengths)), counts, num_tokens, lengths)


def _first(order: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
    """Return the first `counts` (N,) entries of each row of `order` (N, L), packed into (total,)."""
    # A boolean index would make the host wait for the number of its entries.
    image = torch.repeat_interleave(torch.arange(len(order), device=order.device), counts, output_size=total)
    start = counts.cumsum(0) - counts  # (N,) where each image begins
    return order[image, torch.arange(total, device=order.device) - start[image]]


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Return the place of each token in the ascending order of its image's scores: (N, L) -> (N, L) int64.

    Equal scores keep their order.
    """
    return _inverse(torch.argsort(scores, dim=1, stable=True))


def _inverse(order: torch.Tensor) -> torch.Tensor:
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def mask_from_scores(
    scores: torch.Tensor,
    num_keep: int | Sequence[int] | torch.Tensor,
    stats: dict | None = None,
    num_thrown: int | torch.Tensor = 0,
) -> Mask:
    """Keep the `num_keep` lowest-scored tokens of each image; equal scores keep their order.

    Args:
        scores: (N, L), ascending: the first are kept.
        num_keep: one int for all images, or (N,) integers, a tensor or any sequence. Between 1 and L - 1.
        stats: diagnostics handed through to `Mask.stats`.
        num_thrown: how many of the next-lowest are thrown: removed, and not predicted. One int, or (N,) integers.

    Raises:
        ValueError: an image would keep none or all of its tokens, or have none to predict, or shapes do not fit.
    """
    num_images, num_tokens = scores.shape
    ids_shuffle = torch.argsort(scores, dim=1, stable=True)  # (N, L)
    ids_restore = _inverse(ids_shuffle)
    counts, num_keep = _counts("num_keep", num_keep, num_images, scores.device)
    if counts and not 1 <= min(counts) <= max(counts) < num_tokens:
        raise ValueError(
            f"{min(counts)} to {max(counts)} of {num_tokens} tokens would be kept; "
            "at least one must be kept and one removed: change the mask ratio, the patch size or the image size"
        )
    thrown, thrown_lengths = _thrown(ids_restore, num_keep, counts, num_thrown)
    equal, mask = len(set(counts)) <= 1, ids_restore >= num_keep[:, None]
    ids_keep = ids_shuffle[:, : counts[0] if counts else 0] if equal else _first(ids_shuffle, num_keep, sum(counts))
    lengths = None if equal else counts
    return Mask(mask, num_keep, ids_keep, ids_restore, lengths, stats or {}, thrown, thrown_lengths)


def predict_part(mask: Mask, share: float | str | Fraction, noise: torch.Tensor | None = None) -> Mask:
    """Leave only a random `share` of the predicted tokens to predict, and throw the others.

    Of n predicted tokens floor(n * share) stay in each image, at least one. `Mask.weight` makes up for the rounding:
    the loss is an unbiased estimate of that over all n.

    Args:
        mask: what is removed.
        share: in (0, 1].
        noise: (N, L) in [0, 1) that draws them; drawn if None.
    """
    num_images, num_tokens = mask.mask.shape
    kept = mask.keep_lengths or (mask.ids_keep.shape[-1],) * num_images
    thrown = mask.host_thrown
    before = tuple(num_tokens - k - t for k, t in zip(kept, thrown, strict=True))
    after = tuple(max(1, math.floor(n * exact_ratio(share))) for n in before)
    if before == after:
        return mask
    noise = torch.rand(mask.mask.shape, device=mask.mask.device) if noise is None else noise
    stay = on_device(after, torch.int64, mask.mask.device)
    rank = ranks(noise.masked_fill(~mask.predicted, 2.0))
    now_thrown = mask.mask & (rank >= stay[:, None])
    lengths = tuple(t + b - a for t, b, a in zip(thrown, before, after, strict=True))
    weight = on_device(before, torch.int64, mask.mask.device) / stay
    return replace(mask, thrown=now_thrown, thrown_lengths=lengths, weight=weight)


def on_device(values: Sequence | np.ndarray | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Put numbers on a device; the host does not wait."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
        num_removed = torch.full((num_images,), num_removed, device=scores.device)
    if num_removed.shape != (num_images,):
        raise ValueError(f"num_removed has shape {tuple(num_removed.shape)}; one count for each of {num_images} images")
    return ranks(scores) >= num_tokens - num_removed.to(scores.device)[:, None]


def _counts(
    name: str, number: int | Sequence[int] | torch.Tensor, num_images: int, device: torch.device
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Return a count for each image, on the host and as (N,) int64 on the device."""
    number = number if isinstance(number, int) else torch.as_tensor(number)
    if isinstance(number, int) or number.ndim == 0:
        return (int(number),) * num_images, torch.full((num_images,), int(number), dtype=torch.int64, device=device)
    if number.shape != (num_images,):
        raise ValueError(f"{name} has shape {tuple(number.shape)}; one count for each of {num_images} images")
    # The one host transfer of a step whose images differ: the packed length is a shape, so the host must know it.
    return tuple(int(count) for count in number.tolist()), number.to(device=device, dtype=torch.int64)


def _thrown(
    ids_restore: torch.Tensor, num_keep: torch.Tensor, kept: tuple[int, ...], num_thrown: int | torch.Tensor
) -> tuple[torch.Tensor | None, tuple[int, ...] | None]:
    """Return (N, L) bool for the tokens ranked right after the kept ones, and how many; None if none is thrown."""
    if not isinstance(num_thrown, torch.Tensor) and num_thrown == 0:
        return None, None
    num_images, num_tokens = ids_restore.shape
    counts, num_thrown = _counts("num_thrown", num_thrown, num_images, ids_restore.device)
    if any(thrown < 0 or keep + thrown >= num_tokens for keep, thrown in zip(kept, counts, strict=True)):
        raise ValueError(
            f"up to {max(counts)} of {num_tokens} tokens would be thrown, and none be left to predict: "
            "lower the share that is thrown or the mask ratio"
        )
    thrown = (ids_restore >= num_keep[:, None]) & (ids_restore < (num_keep + num_thrown)[:, None])
    return thrown, counts
