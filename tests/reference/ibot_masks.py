"""iBOT's block masks from the recorded random numbers of an `ibot_masks` file, and their statistics."""

from __future__ import annotations

import json
import random

import numpy as np
from timm.layers import to_2tuple

from masking import check_ratios, draw_ratio
from masking.block import blocks_at_ratio


class Replay:
    """Gives recorded numbers in place of a generator's."""

    def __init__(self, draws: np.ndarray):
        self.left = list(draws)

    def uniform(self, a: float, b: float) -> float:
        return float(self.left.pop(0))

    def randint(self, a: int, b: int) -> int:
        return int(self.left.pop(0))

    def choice(self, values: list):
        return values[int(self.left.pop(0))]


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Draw the mask of every case, and the statistics that `golden["statistics"]` names."""
    results = {}
    for case in json.loads(str(golden["cases"])):
        name, grid = f"block{case['index']:02d}", to_2tuple(case["grid"])
        ratios = check_ratios(case["pred_ratio"], case["pred_ratio_var"], "view")
        recorded = golden.get(f"{name}/draws")
        generator = random.Random(case["python_seed"]) if recorded is None else Replay(recorded)
        results[f"{name}/mask"] = blocks_at_ratio(grid, draw_ratio(generator, *ratios), generator)
    return results


def statistics(ratios: tuple, grid: tuple[int, int], count: int, seed: int) -> dict[str, float]:
    """Return what the file tells of many masks: mean and deviation of the count, share of empty ones."""
    generator = random.Random(seed)
    masks = np.stack([blocks_at_ratio(grid, draw_ratio(generator, *ratios), generator) for _ in range(count)])
    counts = masks.sum(axis=(1, 2))
    middle = slice(grid[0] // 2 - 2, grid[0] // 2 + 2)
    return {
        "mean": counts.mean(),
        "std": counts.std(),
        "share_empty": (counts == 0).mean(),
        "centre_4x4_frequency": masks[:, middle, middle].mean(),
        "corner_frequency": masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(),
    }
