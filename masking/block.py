"""Rectangles: block-wise masks as BEiT and BootMAE draw them, and their inverse, one rectangle that is kept."""

from __future__ import annotations

import functools
import math
import random
from fractions import Fraction

import numpy as np
import torch

from masking.base import check_number, check_ratio, check_rounding, draw_noise, keep_count, register
from masking.mask import Mask, mask_from_scores, ranks
from masking.replaced import Ratios, Replaced

# Proposals in a row that may fail before a mask that must reach its count is completed patch by patch.
_PATIENCE = 1000


def draw_blocks(
    grid: tuple[int, int],
    target: float,
    generator: random.Random,
    *,
    min_patches: float = 16,
    max_patches: float | None = None,
    aspect: float = 0.3,
    attempts: int | None = None,
) -> np.ndarray:
    """Cover `target` patches of a grid with random rectangles.

    Each proposal draws an area between `min_patches` and the number still missing (at most `max_patches`), an aspect
    ratio between `aspect` and its inverse, and, if both sides are shorter than the grid's, a place. It is taken if it
    covers new patches, and no more than are missing.

    Args:
        grid: rows and columns.
        target: patches to cover, also a fraction.
        generator: its `uniform` and `randint` are called, in this order.
        min_patches, max_patches: range of a rectangle's area.
        aspect: smallest height over width.
        attempts: proposals for each rectangle, after which the mask is finished, covered or not (BEiT); None goes on
            until `target` is reached (BootMAE).

    Returns:
        (rows, columns) bool, True = covered.
    """
    rows, columns = grid
    shape, covered, count, failed = _Rectangles(rows, columns), 0, 0, 0
    while count < target and failed < (attempts or _PATIENCE):
        most = min(target - count, max_patches or target)
        area = generator.uniform(min_patches, most)
        ratio = math.exp(generator.uniform(math.log(aspect), -math.log(aspect)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        failed += 1
        if width >= columns or height >= rows:
            continue
        top, left = generator.randint(0, rows - height), generator.randint(0, columns - width)
        new = shape.bits(top, left, height, width) & ~covered
        if 0 < new.bit_count() <= most:
            covered, count, failed = covered | new, count + new.bit_count(), 0
    found = shape.array(covered)
    if attempts is None and count < target:  # rectangles do not fit any more, as on a grid of one row
        missing = generator.sample(np.flatnonzero(~found).tolist(), target - count)
        found.reshape(-1)[missing] = True
    return found


class _Rectangles:
    """Sets of patches as the bits of an integer: a hundred times faster than counting in an array."""

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        self._repeat = [sum(1 << (columns * row) for row in range(height)) for height in range(rows + 1)]

    def bits(self, top: int, left: int, height: int, width: int) -> int:
        """Return the set of the patches of a rectangle."""
        return (((1 << width) - 1) << left) * self._repeat[height] << (self.columns * top)

    def array(self, bits: int) -> np.ndarray:
        """Return a set as (rows, columns) bool."""
        count = self.rows * self.columns
        content = np.frombuffer(bits.to_bytes(-(-count // 8), "little"), dtype=np.uint8)
        return np.unpackbits(content, count=count, bitorder="little").astype(bool).reshape(self.rows, self.columns)


@register("block")
class BlockMasking:
    """Remove random rectangles (BEiT), by default as many patches in every image (BootMAE's rule).

    Args:
        mask_ratio: share of patches removed, in (0, 1).
        min_patches, max_patches: range of a rectangle's area in patches; no largest one if None.
        aspect: smallest height over width; the largest is its inverse.
        attempts: proposals for each rectangle; None goes on until the count is exact. With 10, as in BEiT, a third of
            the masks fall short, and images keep different numbers of patches.
        rounding: "kept" rounds the number of kept patches up, "removed" that of removed ones.
        covered: share of patches that the rectangles cover; the rest of the removed ones is random (BootMAE: 120/196).
            `mask_ratio` if None.
        roll: up to so many of the covered patches are kept, and as many others removed in their place; the number is
            drawn for all images of a step together (BootMAE: 3).
    """

    reads_tokens = False

    def __init__(
        self,
        mask_ratio: float | str | Fraction = 0.75,
        min_patches: int = 16,
        max_patches: int | None = None,
        aspect: float = 0.3,
        attempts: int | None = None,
        rounding: str = "kept",
        covered: float | str | Fraction | None = None,
        roll: int = 0,
    ):
        self.mask_ratio, self.rounding = check_ratio("mask_ratio", mask_ratio), check_rounding(rounding)
        self.covered = None if covered is None else check_ratio("covered", covered)
        if isinstance(roll, bool) or not isinstance(roll, int) or roll < 0:
            raise ValueError(f"roll is {roll!r}; it must be a whole number of at least 0")
        if attempts is not None and (covered is not None or roll):
            raise ValueError("attempts goes with neither covered nor roll; leave it out for an exact number of patches")
        self.roll, self.needs = roll, frozenset({"grid", "draw"} if roll else {"grid"})
        self.min_patches = check_number("min_patches", min_patches, minimum=1)
        self.max_patches = max_patches if max_patches is None else check_number("max_patches", max_patches, minimum=1)
        self.aspect = check_number("aspect", aspect, exclusive=True)
        if self.aspect > 1:
            raise ValueError(f"aspect is {aspect}; it must be at most 1, the smallest height over width of a block")
        if attempts is not None and (isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1):
            raise ValueError(f"attempts is {attempts!r}; it must be a whole number of at least 1, or null for no limit")
        self.attempts, self.varies = attempts, attempts is not None

    def __call__(
        self, tokens: torch.Tensor, noise: torch.Tensor | None = None, *, grid: tuple[int, int], draw: float = 0.0
    ) -> Mask:
        """Mask tokens (N, L, D) on a grid of (rows, columns); noise (N, L) in [0, 1) seeds the rectangles."""
        noise, num_tokens = draw_noise(tokens, noise), tokens.shape[1]
        num_keep = keep_count(num_tokens, self.mask_ratio, self.rounding)
        target = num_tokens - num_keep if self.covered is None else round(num_tokens * self.covered)
        covered = np.stack([self._draw(grid, target, seed) for seed in _seeds(noise)])
        removed = torch.from_numpy(covered).to(tokens.device, non_blocking=True).flatten(1)  # (N, L)
        scores = removed + noise  # which also ranks the covered patches, and the others, among themselves
        if self.roll:
            scores = (ranks(scores) + int(draw * (self.roll + 1))) % num_tokens
        if self.attempts is None:
            return mask_from_scores(scores, num_keep)
        return mask_from_scores(scores, torch.from_numpy(num_tokens - covered.sum(axis=(1, 2)).clip(min=1)))

    def at_ratios(
        self, tokens: torch.Tensor, ratios: Ratios, noise: torch.Tensor | None = None, *, grid: tuple[int, int], **_
    ) -> Replaced:
        """Replace tokens (N, L, D) at the ratio of each image, by iBOT's rule, see `blocks_at_ratio`."""
        seeds = _seeds(draw_noise(tokens, noise))
        drawn = [blocks_at_ratio(grid, r, random.Random(s)) for r, s in zip(ratios.rows, seeds, strict=True)]
        mask = np.stack(drawn).reshape(len(drawn), -1)
        return Replaced(torch.from_numpy(mask).to(tokens.device, non_blocking=True), int(mask.sum()))

    def _draw(self, grid: tuple[int, int], target: int, seed: int) -> np.ndarray:
        options = {"max_patches": self.max_patches, "aspect": self.aspect, "attempts": self.attempts}
        return draw_blocks(grid, target, random.Random(seed), min_patches=self.min_patches, **options)


def blocks_at_ratio(grid: tuple[int, int], ratio: float, generator: random.Random) -> np.ndarray:
    """Cover a share of a grid with rectangles as iBOT does: ten attempts each, so that most masks fall short of it.

    A rectangle has at least (shorter side / 3, rounded down)^2 patches. `generator` draws as for `draw_blocks`.

    Returns:
        (rows, columns) bool, True = covered.
    """
    smallest = (min(grid) // 3) ** 2
    return draw_blocks(grid, ratio * grid[0] * grid[1], generator, min_patches=smallest, attempts=10)


def _seeds(noise: torch.Tensor) -> list[int]:
    """Return a seed of 48 bits for each image, out of its noise (N, L): the one host transfer of a batch."""
    high, low = (noise[:, [0, 1 % noise.shape[1]]].double() * 2**24).long().T.tolist()
    return [first << 24 | second for first, second in zip(high, low, strict=True)]


@register("inverse_block")
class InverseBlockMasking:
    """Keep one rectangle and remove all around it, as in CAPI; every place of it is equally likely.

    The rectangle is shifted cyclically: what leaves the image on one side comes in on the other. Its last row is cut,
    so that the number of kept patches is exact.

    Args:
        mask_ratio: share of patches removed, in (0, 1).
        aspect: smallest height over width of the rectangle; the largest is its inverse. Log-uniform between them.
        rounding: "kept" rounds the number of kept patches up, "removed" that of removed ones.
    """

    needs = frozenset({"grid"})
    reads_tokens = False

    def __init__(self, mask_ratio: float | str | Fraction = 0.75, aspect: float = 0.5, rounding: str = "kept"):
        self.mask_ratio, self.rounding = check_ratio("mask_ratio", mask_ratio), check_rounding(rounding)
        self.aspect = check_number("aspect", aspect, exclusive=True)
        if self.aspect > 1:
            raise ValueError(f"aspect is {aspect}; it must be at most 1, the smallest height over width")

    def __call__(self, tokens: torch.Tensor, noise: torch.Tensor | None = None, *, grid: tuple[int, int]) -> Mask:
        """Mask tokens (N, L, D) on a grid of (rows, columns); noise (N, L) in [0, 1) gives shape and place."""
        (rows, columns), num_tokens = grid, tokens.shape[1]
        num_keep = keep_count(num_tokens, self.mask_ratio, self.rounding)
        noise = draw_noise(tokens, noise)
        # (N, 1) each; of two patches there are but two numbers.
        shape, top, left = (noise[:, place % num_tokens, None] for place in range(3))
        ratio = torch.exp((2 * shape - 1) * -math.log(self.aspect))  # height over width
        width = (num_keep / ratio).sqrt().round().clamp(-(-num_keep // rows), columns)
        row, column = _places(grid, tokens.device)
        down, right = (row - (top * rows).floor()) % rows, (column - (left * columns).floor()) % columns
        # Row by row through the rectangle, then through the rest: the first patches are kept.
        scores = torch.where(right < width, down * width + right, num_tokens + down * columns + right)
        return mask_from_scores(scores, num_keep)


@functools.lru_cache(maxsize=8)
def _places(grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and column of each patch, (L,) each."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
    return rows.repeat_interleave(grid[1]), columns.repeat(grid[0])
