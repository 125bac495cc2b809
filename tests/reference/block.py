"""Block-wise masks from the seeds of a `block_masks` file, the proposals they were made of, and their statistics."""

from __future__ import annotations

import json
import random

import numpy as np
from scipy import ndimage

from masking.block import draw_blocks


class Recorder(random.Random):
    """Python's generator, which remembers the proposals that are drawn from it."""

    proposals: list[list[float]]

    def uniform(self, a: float, b: float) -> float:
        value = super().uniform(a, b)
        if not self.proposals or len(self.proposals[-1]) > 1:  # an area begins a proposal, its aspect ratio follows
            self.proposals.append([])
        self.proposals[-1].append(value)
        return value

    def randint(self, a: int, b: int) -> int:
        value = super().randint(a, b)
        self.proposals[-1].append(value)
        return value


def compute(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Draw the masks of every setting in `golden["config"]`; the results have the file's own keys."""
    results = {}
    for name, setting in json.loads(str(golden["config"])).items():
        found = one_setting(setting)
        results |= {f"{name}/{key}": value for key, value in found.items()}
    return results


def one_setting(setting: dict) -> dict[str, np.ndarray]:
    """Compute all keys of one setting."""
    grid, target = tuple(setting["input_size"]), setting["num_masking_patches"]
    options = {
        "min_patches": setting["min_num_patches"],
        "max_patches": setting["max_num_patches"],
        "attempts": setting["attempts_per_block"],
        "aspect": next((setting[key] for key in ("min_aspect", "aspect") if key in setting), 0.3),
    }
    masks, proposals = [], []
    for number, seed in enumerate(setting["seeds"]):
        generator = Recorder(seed)
        generator.proposals = []
        masks.append(draw_blocks(grid, target, generator, **options))
        proposals += [[number, *proposal, -1, -1][:5] for proposal in generator.proposals]
    stream = random.Random(setting["seeds"][0])
    many = random.Random(setting["statistics_seed"])
    drawn = np.stack([draw_blocks(grid, target, many, **options) for _ in range(setting["statistics_masks"])])
    return {
        "masks": np.stack(masks),
        "proposals": np.array(proposals, dtype=np.float64).reshape(-1, 5),
        "stream": np.stack([draw_blocks(grid, target, stream, **options) for _ in range(4)]),
    } | {f"stat/{key}": np.asarray(value) for key, value in statistics(drawn, target).items()}


def statistics(masks: np.ndarray, target: int) -> dict:
    """Describe masks (M, rows, columns): counts, places, neighbours, connected components."""
    counts = masks.sum(axis=(1, 2))
    values, numbers = np.unique(counts, return_counts=True)
    across, down = masks[:, :, 1:] == masks[:, :, :-1], masks[:, 1:] == masks[:, :-1]
    pairs = across[0].size + down[0].size
    equal = (across.sum(axis=(1, 2)) + down.sum(axis=(1, 2))) / pairs
    return {
        "count_values": values,
        "count_share": numbers / len(masks),
        "count_mean": counts.mean(),
        "count_std": counts.std(),
        "position_frequency": masks.mean(axis=0).astype(np.float32),
        "same_neighbour_mean": equal.mean(),
        "same_neighbour_std": equal.std(),
        "masked_components_mean": np.mean([ndimage.label(mask)[1] for mask in masks[:1000]]),
        "visible_components_mean": np.mean([ndimage.label(~mask)[1] for mask in masks[:1000]]),
        "exact_share": (counts == target).mean(),
    }
