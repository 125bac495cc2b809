"""The end of scripts/demo.sh: table, picture, and whether pre-training helped.

Usage: demo_report.py OUTPUT_DIR STRATEGY...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import masking
import models_mae
from util import checkpoint, datasets, features, transforms, visualize

SIZE = (16, 16)
STATISTICS = transforms.channel_statistics(1, None, None)


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
        draw(load(output / name / "pretrain"), path)
        print(f"picture: {path}")
    failed = [name for name in strategies if not helped(rows["untrained"], rows[name])]
    if failed:
        print(f"FAILED: pre-training with {', '.join(failed)} did not help on both k-NN and linear accuracy")
    return 1 if failed else 0


def helped(untrained: tuple, trained: tuple) -> bool:
    """Both accuracies rose by more than chance could explain: 3 points are 11 of the 359 digits."""
    return all(after > before + 3 for before, after in zip(untrained[:2], trained[:2], strict=True))


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}%"


def load(run: Path) -> models_mae.MaskedAutoencoderViT:
    """The model of a pre-training run."""
    content = checkpoint.load(run / checkpoint.LAST)
    model = models_mae.create_model(checkpoint.arguments(content)["model"], in_chans=1, img_size=SIZE)
    model.load_state_dict(content["model"])
    return model.eval()


def knn(run: Path) -> float:
    """k-NN accuracy of a run's encoder, mean of the patch tokens."""
    model, transform = load(run), transforms.evaluation_transform(SIZE, 1.0)
    sets = [datasets.SeededImages(datasets.open_labelled("digits", None, s, 1), transform) for s in ("train", "val")]
    return features.knn_accuracy(
        *(features.extract_features(model, s, transforms.Normalize(*STATISTICS)) for s in sets)
    )


def last_accuracy(run: Path) -> float:
    """Accuracy after the last epoch, not the best."""
    return json.loads((run / "log.txt").read_text().splitlines()[-1])["test_acc1"]


@torch.no_grad()
def draw(model: models_mae.MaskedAutoencoderViT, path: Path, num_images: int = 6) -> None:
    """Images, salience, the three masks, and the reconstruction under AMR."""
    data = datasets.SeededImages(
        datasets.open_labelled("digits", None, "val", 1), transforms.evaluation_transform(SIZE, 1.0)
    )
    pixels = torch.stack([data[0, index][0] for index in range(num_images)])
    normalized, images = transforms.Normalize(*STATISTICS)(pixels), pixels / 255
    grid = model.patch_embed.grid_size
    tokens = model.embed(normalized)
    noise = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(0))
    columns = [
        visualize.Column("image", images),
        visualize.Column("salience", masking.token_salience(tokens).view(-1, *grid)),
    ]
    for name in ("random", "sbam", "sbam_amr"):
        mask = masking.create(name)(tokens, noise=noise)
        ratios = mask.mask.float().mean(dim=1).tolist()
        columns.append(
            visualize.Column(name, visualize.hide(images, mask.mask, grid), tuple(f"{r:.0%} removed" for r in ratios))
        )
    latent = model.encode(tokens, mask)
    pred = model.unpatchify(model.forward_decoder(latent, mask))
    reconstruction = (pred * STATISTICS[1][0] + STATISTICS[0][0]).clamp(0, 1)
    columns.append(visualize.Column("reconstruction", reconstruction))
    columns.append(visualize.Column("pasted", visualize.paste(images, reconstruction, mask.mask, grid)))
    visualize.draw(columns, path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
