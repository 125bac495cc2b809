"""Semantic segmentation by a linear layer and by k-NN on frozen patch tokens, as DINOv2 and CAPI measure encoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from evaluation import features, measure, probes
from evaluation.checkpoints import Opened, check_pictures
from evaluation.label_masks import IGNORED, Classes, Sample, check_classes, find, load

Scorer = Callable[[torch.Tensor], torch.Tensor]  # patch tokens (n, L, D) -> scores of the classes (n, L, C)

_BATCH = 16  # images
_STEPS, _EPOCHS = 1000, 10  # the linear layer is trained for at least so many
_SIMILARITIES = 2**28  # of tokens, in memory at a time


def segment(
    opened: Opened,
    *,
    num_classes: int | None = None,
    ignored: tuple[int, ...] = (IGNORED,),
    neighbours: int = 10,
    train_images: int | None = None,
    val_images: int | None = None,
    threads: int = 1,
) -> dict[str, int | float | list[float | None]]:
    """Measure how well patch tokens tell the classes of pixels, on the folder `data_path` of the model's settings.

    Images are squashed to the model's size, scores of patches upsampled to the label mask's, so that all of its pixels
    count.

    Args:
        opened: from `open_checkpoint` or `untrained`.
        num_classes: the first so many labels that are not `ignored`; None: those that the training masks have.
        ignored: labels of pixels that do not count.
        neighbours: k of k-NN.
        train_images, val_images: at most so many, evenly spread; all if None.
        threads: that read files.

    Returns:
        `miou_linear` and `miou_knn` in percent; `iou_linear` and `iou_knn` of each class, None for one that is neither
        in a mask nor predicted; the numbers of classes and images.

    Raises:
        ValueError: impossible numbers, files that are missing or do not fit, or too many tokens for the memory.
    """
    measure.check_numbers(neighbours=neighbours, train_images=train_images, val_images=val_images)
    check_classes(ignored, num_classes)
    check_pictures(opened.settings)
    limits = {"train": train_images, "val": val_images}
    pairs = {split: find(opened.settings.data_path, split, most) for split, most in limits.items()}
    measure.check_cache(opened, len(pairs["train"]), "segmentation")
    read = partial(load, size=opened.size, channels=opened.settings.in_chans, threads=threads)
    train, val = (read(pairs[split]) for split in ("train", "val"))
    classes = Classes(train, ignored, num_classes)
    classes.check(val)

    labels = torch.stack([_shrink(classes.number(sample.labels), opened.size) for sample in train])  # (n, h, w)
    if (patch_labels(labels, opened.model.patch_embed.grid_size) == IGNORED).all():
        raise ValueError(
            f"{train[0].mask}: as in the other training masks, most pixels of each patch are of --ignore_index, so no "
            "patch has a label; take masks with labelled areas"
        )
    tokens = torch.cat([encode(opened, batch).cpu() for batch in _batches(train)])  # (n, L, D)
    scorers = {
        "linear": fit_linear(opened, tokens, labels, len(classes)),
        "knn": nearest_patches(opened, tokens, labels, len(classes), neighbours),
    }
    result = {"train_images": len(train), "val_images": len(val), "num_classes": len(classes)}
    for name, counts in confusions(opened, scorers, val, classes).items():
        iou = intersections_over_unions(counts)
        result |= {f"miou_{name}": iou.nanmean().item(), f"iou_{name}": _rounded(iou)}
    return result


def encode(opened: Opened, samples: list[Sample]) -> torch.Tensor:
    """Return the patch tokens (n, L, D) of the samples' images, on the device."""
    pixels = torch.stack([sample.pixels for sample in samples]).to(opened.normalize.shift.device)
    return features.encode_images(opened.model, opened.normalize(pixels), "tokens")


def fit_linear(opened: Opened, tokens: torch.Tensor, labels: torch.Tensor, classes: int) -> Scorer:
    """Train a linear layer on standardised tokens, by the cross entropy of its upsampled scores with each pixel.

    Args:
        opened: the model.
        tokens: (n, L, D).
        labels: (n, h, w) uint8, of the model's size; 255 does not count.
        classes: how many.
    """
    counting = (labels != IGNORED).flatten(1).any(dim=1)
    tokens, labels = tokens[counting], labels[counting]

    def loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(upsample(opened, scores, labels.shape[1:]), labels.long(), ignore_index=IGNORED)

    epochs = max(_EPOCHS, math.ceil(_STEPS / math.ceil(len(tokens) / _BATCH)))
    options = {"epochs": epochs, "lr": 1e-2, "batch_size": _BATCH, "device": opened.normalize.shift.device}
    return probes.fit_head(lambda: nn.Linear(tokens.shape[-1], classes), tokens, labels, loss=loss, **options)


def nearest_patches(
    opened: Opened, tokens: torch.Tensor, labels: torch.Tensor, classes: int, neighbours: int
) -> Scorer:
    """Let the nearest patches of the training images vote, each for its label; see `patch_labels`."""
    device = opened.normalize.shift.device
    voting = patch_labels(labels, opened.model.patch_embed.grid_size).flatten()  # (n * L,)
    counting = voting != IGNORED
    known = F.normalize(tokens.flatten(0, 1)[counting], dim=-1).to(device), voting[counting].long().to(device)
    rows = max(1, _SIMILARITIES // len(known[1]))

    def votes(queries: torch.Tensor) -> torch.Tensor:
        parts = queries.flatten(0, 1).split(rows)
        found = torch.cat([features.class_votes(part, known, classes, [neighbours])[0] for part in parts])
        return found.unflatten(0, queries.shape[:2])

    return votes


def patch_labels(labels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return the most frequent label of each patch, the smaller of two: (n, h, w) -> (n, L)."""
    rows, columns = grid
    patches = labels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3)  # (n, rows, columns, ...)
    return patches.flatten(3).mode(dim=-1).values.flatten(1)


def upsample(opened: Opened, scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Upsample scores of patches (n, L, C) bilinearly to pixels (n, C, H, W)."""
    image = scores.transpose(1, 2).unflatten(2, opened.model.patch_embed.grid_size)  # (n, C, rows, columns)
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def confusions(
    opened: Opened, scorers: dict[str, Scorer], samples: list[Sample], classes: Classes
) -> dict[str, torch.Tensor]:
    """Count the pixels of each class that each scorer gives to each class: (C, C), true classes down."""
    size = len(classes)
    counts = {name: torch.zeros(size * size, dtype=torch.int64) for name in scorers}
    for batch in _batches(samples):
        tokens = encode(opened, batch)
        for name, scorer in scorers.items():
            for sample, scores in zip(batch, scorer(tokens), strict=True):
                predicted = upsample(opened, scores[None], sample.labels.shape)[0].argmax(dim=0).cpu()  # (H, W)
                true = classes.number(sample.labels).long()
                pairs = (true * size + predicted)[true != IGNORED]
                counts[name] += torch.bincount(pairs, minlength=size * size)
    return {name: found.view(size, size) for name, found in counts.items()}


def intersections_over_unions(confusion: torch.Tensor) -> torch.Tensor:
    """Return the intersection over union of each class in percent, (C, C) -> (C,); NaN for one that does not occur."""
    intersection = confusion.diagonal().double()
    return 100 * intersection / (confusion.sum(dim=0) + confusion.sum(dim=1) - intersection)


def _batches(samples: list[Sample]) -> Iterator[list[Sample]]:
    return (samples[start : start + _BATCH] for start in range(0, len(samples), _BATCH))


def _shrink(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return classes (H, W) uint8 at the model's size: each pixel gets the class of the nearest one."""
    return F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0]


def _rounded(iou: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 2) for value in iou.tolist()]
