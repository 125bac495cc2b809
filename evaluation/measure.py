"""Measurements of an opened model's features: k-NN, RankMe, probes, salience."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from evaluation import features, monitor, probes
from evaluation.checkpoints import Opened, check_pictures
from util.data import datasets, sources, transforms

METRICS = ("knn", "rank_me", "salience", "linear", "attentive", "voting")
_LABELLED = {"knn", "linear", "attentive", "voting"}
CACHE_GB = 16  # the attentive probe and segmentation keep all patch tokens of their images in memory


class Named(Dataset):
    """`dataset[0, index]` -> image `index`, (C, H, W), and class 0. OSError names a file that cannot be decoded.

    Unlike in a data set, no other image takes its place.

    Args:
        images: the images.
        transform: PIL image -> tensor (C, H, W).
    """

    def __init__(self, images: datasets.ImageSet, transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        return self.transform(self.images.picture(key[1])), 0


def image_features(opened: Opened, pictures: list[str | Path], pool: str = "mean") -> torch.Tensor:
    """Compute features of image files, whole and unmasked: (n, embed_dim), or (n, L, embed_dim) with pool "tokens".

    Each is resized and centre-cropped to the model's size.

    Raises:
        ValueError: the images of the model cannot be resized here.
        OSError: names a file that cannot be read or decoded.
    """
    check_pictures(opened.settings)
    source = sources.Files(str(path) for path in pictures)
    images = datasets.ImageSet(source, np.zeros(len(source), dtype=np.int64), (), opened.settings.in_chans)
    named = Named(images, transforms.evaluation_transform(opened.size, 1.0))
    return features.extract_features(opened.model, named, opened.normalize, pool=pool)[0]


def measure(
    opened: Opened,
    metrics: tuple[str, ...],
    *,
    neighbours: int = 10,
    train_images: int | None = None,
    val_images: int | None = None,
    num_workers: int = 0,
    pool: str = "mean",
    crop_pct: float = 1.0,
) -> dict[str, float | int | list[int]]:
    """Measure the encoder on the data set of its settings.

    Args:
        opened: from `open_checkpoint` or `untrained`.
        metrics: of `METRICS`.
        neighbours: k of k-NN.
        train_images, val_images: at most so many, evenly spread; all if None.
        num_workers: of the loading.
        pool: "mean" or "cls", for k-NN, RankMe and the linear probe.
        crop_pct: centre crop over resized side of the images.

    Returns:
        The metrics, the numbers of images, and of bad ones, which are named on stderr; the next good one replaces each.

    Raises:
        ValueError: impossible numbers, no labels, more memory than `CACHE_GB`, or what a checkpoint may not choose.
        SystemExit: not one image can be decoded.
    """
    check_numbers(neighbours=neighbours, train_images=train_images, val_images=val_images)
    check_crop(crop_pct)
    sets = _open_sets(opened, metrics, train_images, val_images, crop_pct)
    device = opened.normalize.shift.device
    extract = partial(_extract, opened, num_workers)
    result: dict = {"train_images": len(sets.train) if sets.train is not None else 0, "val_images": len(sets.val)}
    if {"knn", "rank_me", "linear"} & set(metrics):
        val = extract(sets.val, pool)
        train = extract(sets.train, pool) if {"knn", "linear"} & set(metrics) else None
        if "knn" in metrics:
            result["knn"] = features.knn_accuracy(train, val, neighbours)
        if "linear" in metrics:
            result["linear"] = probes.linear_probe(train, val, device=device)
        if "rank_me" in metrics:
            result["rank_me"] = features.rank_me(val[0])
    if "voting" in metrics:  # of class tokens, as DINO and iBOT measure
        result |= features.class_token_accuracies(extract(sets.train, "cls"), extract(sets.val, "cls"))
    if "attentive" in metrics:
        tokens = extract(sets.train, "tokens"), extract(sets.val, "tokens")
        result["attentive"] = probes.attentive_probe(*tokens, device=device)
    if "salience" in metrics:
        result |= _salience(opened, sets, num_workers)
    read = (sets.val, sets.train) if _LABELLED & set(metrics) else (sets.val,)
    return result | {"bad_images": sum(images.bad.collect(device) for images in read)}


def _open_sets(
    opened: Opened, metrics: tuple[str, ...], train_images: int | None, val_images: int | None, crop_pct: float
) -> monitor.ImageSets:
    """Open the data set of a model's settings. ValueError: it cannot give what the metrics need."""
    opened.require("dataset", *["masking"] * ("salience" in metrics))
    check_pictures(opened.settings)
    unlimited = 2**62
    numbers = train_images or unlimited, val_images or unlimited
    sets = monitor.open_sets(opened.settings, opened.size, *numbers, crop_pct)
    labelled = [name for name in metrics if name in _LABELLED]
    if labelled and sets.train is None:
        raise ValueError(
            f"--metrics {' '.join(labelled)}: need labels, --data_path with train/<class>/ and val/<class>/; "
            f"{sets.without_labels}"
        )
    if "attentive" in metrics:
        check_cache(opened, len(sets.train) + len(sets.val), "attentive")
    return sets


def _extract(opened: Opened, num_workers: int, images: Dataset, pool: str) -> tuple[torch.Tensor, torch.Tensor]:
    return features.extract_features(opened.model, images, opened.normalize, pool=pool, num_workers=num_workers)


def _salience(opened: Opened, sets: monitor.ImageSets, num_workers: int) -> dict[str, float | list[int]]:
    found = monitor.salience_of_set(opened.model, sets.val, opened.normalize, opened.strategy, num_workers)
    means = {name: values.mean().item() for name, values in found.items()}
    if "mask_ratio" not in found:
        return means
    return means | {"mask_ratio_histogram": monitor.ratio_histogram(found["mask_ratio"])}


def check_numbers(**numbers: int | None) -> None:
    """Raise ValueError for a number below 1; they have the names of flags."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")


def check_crop(crop_pct: float) -> None:
    """Raise ValueError for a share of the resized side of which no image can be made."""
    if not 0 < crop_pct <= 1:
        raise ValueError(f"--crop_pct {crop_pct}: must be above 0 and at most 1")


def check_cache(opened: Opened, images: int, metric: str) -> None:
    """Raise ValueError if the patch tokens of so many images take more memory than `CACHE_GB`."""
    size = images * opened.model.num_patches * opened.model.cls_token.shape[-1] * 4 / 1e9
    if size > CACHE_GB:
        raise ValueError(
            f"--metrics {metric}: the patch tokens of {images} images are {size:.0f} GB; "
            f"lower --train_images and --val_images to below {CACHE_GB} GB, or leave it out"
        )
