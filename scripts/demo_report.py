"""The end of scripts/demo.sh: table, picture, and whether pre-training helped.

Usage: demo_report.py OUTPUT_DIR STRATEGY...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from evaluation import checkpoints, drawing, figures, measure, monitor
from util.training import checkpoint


def main(output: Path, strategies: list[str]) -> int:
    """Print the table, draw the pictures; 1 if a pre-trained encoder is no better than the untrained one."""
    rows = {"untrained": (knn(output / "untrained"), last_accuracy(output / "untrained_probe"), None)}
    for name in strategies:
        run = output / name
        rows[name] = (knn(run / "pretrain"), last_accuracy(run / "probe"), last_accuracy(run / "finetune"))
    print(f"\n{'accuracy on 359 held-out digits':34}{'k-NN':>8}{'linear':>9}{'fine-tuned':>12}")
    for name, values in rows.items():
        label = "untrained encoder" if name == "untrained" else f"pre-trained with {name}"
        print(
            f"{label:34}"
            + "".join(f"{percent(value):>{width}}" for value, width in zip(values, (8, 9, 12), strict=True))
        )
    print()
    for name in strategies:
        path = output / name / "masks.png"
        draw(output / name / "pretrain", path)
        print(f"picture: {path}")
    failed = [name for name in strategies if not helped(rows["untrained"], rows[name])]
    if failed:
        print(f"FAILED: pre-training with {', '.join(failed)} did not help on both k-NN and linear accuracy")
    return 1 if failed else 0


def helped(untrained: tuple, trained: tuple) -> bool:
    """Return whether both accuracies rose by more than chance explains: 3 points are 11 of the 359 digits."""
    return all(after > before + 3 for before, after in zip(untrained[:2], trained[:2], strict=True))


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}%"


def knn(run: Path) -> float:
    """Return the k-NN accuracy of a run's encoder, mean of the patch tokens."""
    return measure.measure(checkpoints.open_checkpoint(run / checkpoint.LAST), ("knn",))["knn"]


def last_accuracy(run: Path) -> float:
    """Return the accuracy after the last epoch, not the best."""
    return json.loads((run / "log.txt").read_text().splitlines()[-1])["test_acc1"]


def draw(run: Path, path: Path, num_images: int = 6) -> None:
    """Draw images, salience, the three masks, and the reconstruction under AMR."""
    opened = checkpoints.open_checkpoint(run / checkpoint.LAST)
    images = monitor.open_sets(opened.settings, opened.size, 1, num_images).val
    pixels = torch.stack([images[0, index][0] for index in range(num_images)])
    strategies = figures.standard_strategies(opened.settings, opened.strategy, opened.model.num_patches)
    temperature = figures.temperature_of(opened.strategy)
    columns = figures.columns(
        opened.model, pixels, opened.normalize, strategies, temperature=temperature, rebuilt="sbam_amr"
    )
    drawing.save(drawing.draw(columns), path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
