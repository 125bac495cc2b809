"""What to watch while a masked autoencoder trains: k-NN accuracy, effective rank, salience, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import masking
import views
from util import datasets, features, sources, transforms, visualize
from util.config import PretrainSettings
from util.log import RunLog

# Enough for a trend, and a minute at most on a GPU: images whose features the monitors take.
TRAIN_IMAGES, VAL_IMAGES, SHOWN_IMAGES = 20_000, 5_000, 6
RATIO_BINS = 20  # of the histogram of mask ratios, over 0..1


def ratio_histogram(ratios: torch.Tensor) -> list[int]:
    """How many mask ratios (N,) fall into each of the 20 bins [0, 0.05), ... [0.95, 1]."""
    return torch.histc((ratios.float().cpu() + 1e-6).clamp(max=1), RATIO_BINS, 0, 1).int().tolist()


@dataclass
class ImageSets:
    """What the monitors look at: evenly spread subsets, resized and cropped without randomness.

    Attributes:
        train: for k-NN; None without labels.
        val: whose features, salience and pictures are looked at: validation images where there are some.
    """

    train: datasets.SeededImages | None
    val: datasets.SeededImages


def open_sets(settings: PretrainSettings, size: tuple[int, int], train_images: int, val_images: int) -> ImageSets:
    """The labelled images of the run's data set, else its unlabelled ones without k-NN. ValueError: there are none."""
    name, path, channels = settings.dataset, settings.data_path, settings.in_chans
    transform = transforms.evaluation_transform(size, 1.0)

    def subset(images: datasets.ImageSet, most: int) -> datasets.SeededImages:
        chosen = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)
        source = sources.Chosen(images.source, chosen.tolist())
        return datasets.SeededImages(
            dataclasses.replace(images, source=source, labels=images.labels[chosen]), transform
        )

    try:
        train = datasets.open_labelled(name, path, "train", channels)
        val = datasets.open_labelled(name, path, "val", channels)
        val = val if val.classes == train.classes else val.relabelled(train.classes)
    except ValueError:  # no class folders, or others in val/ than in train/
        return ImageSets(None, subset(datasets.open_unlabelled(name, path, channels), val_images))
    return ImageSets(subset(train, train_images), subset(val, val_images))


@dataclass
class Monitor:
    """Looks at a model between epochs, on the first process only, and leaves no trace in the training.

    The other processes go on and wait for the first at their next exchange.

    Attributes:
        settings: of the run.
        strategy: the run's masking.
        normalize: pixels -> the model's input, on its device.
        size: height and width of the model's images.
        log: where numbers and pictures go.
    """

    settings: PretrainSettings
    strategy: masking.base.Strategy
    normalize: transforms.Normalize
    size: tuple[int, int]
    log: RunLog
    _sets: ImageSets = field(init=False)

    def __post_init__(self):
        self._sets = open_sets(self.settings, self.size, TRAIN_IMAGES, VAL_IMAGES)

    def look(self, model: nn.Module, epoch: int, step: int) -> dict:
        """What is due after `epoch`: numbers for log.txt, and pictures and numbers for TensorBoard."""
        line = {}
        with undisturbed(model):
            if is_due(self.settings.eval_every, epoch, self.settings.epochs):
                line = self.evaluate(model, step)
            if is_due(self.settings.vis_every, epoch, self.settings.epochs):
                self.log.figure("monitor/masks", self.picture(model), step)
        return line

    def evaluate(self, model: nn.Module, step: int) -> dict:
        """k-NN accuracy where there are labels, RankMe, salience; `monitor_*` for log.txt."""
        val = self._features(model, self._sets.val)
        values = {"rank_me": features.rank_me(val[0])}
        if self._sets.train is not None:
            values["knn"] = features.knn_accuracy(self._features(model, self._sets.train), val)
        found = salience_of_set(model, self._sets.val, self.normalize, self.strategy, self.settings.num_workers)
        values |= {name: ratios.mean().item() for name, ratios in found.items()}
        self.log.scalars({f"monitor/{name}": value for name, value in values.items()}, step)
        self.log.histogram("monitor/mask_ratio", found["mask_ratio"], step)
        histogram = {"mask_ratio_histogram": ratio_histogram(found["mask_ratio"])}
        return {f"monitor_{name}": value for name, value in (values | histogram).items()}

    def picture(self, model: nn.Module) -> Figure:
        """The fixed images as the model sees them now."""
        images = self._sets.val
        count = min(SHOWN_IMAGES, len(images))
        pixels = torch.stack([images[0, index * len(images) // count][0] for index in range(count)])
        strategies = views.standard_strategies(self.settings, self.strategy, model.num_patches)
        rebuilt = views.own_name(self.settings)
        return visualize.draw(views.columns(model, pixels, self.normalize, strategies, rebuilt=rebuilt))

    def _features(self, model: nn.Module, images: datasets.SeededImages) -> tuple[torch.Tensor, torch.Tensor]:
        return features.extract_features(model, images, self.normalize, num_workers=self.settings.num_workers)


def salience_of_set(
    model: nn.Module,
    images: datasets.SeededImages,
    normalize: transforms.Normalize,
    strategy: masking.base.Strategy,
    num_workers: int = 0,
) -> dict[str, torch.Tensor]:
    """`views.salience_statistics` of all images of a set, (n,) each, on the CPU."""
    found: dict[str, list[torch.Tensor]] = {}
    for pixels, _ in features.in_order(images, num_workers=num_workers):
        batch = views.salience_statistics(model, normalize(pixels.to(normalize.shift.device)), strategy)
        for name, values in batch.items():
            found.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def is_due(every: int | None, epoch: int, epochs: int) -> bool:
    """True after every `every`-th epoch and after the last."""
    return every is not None and ((epoch + 1) % every == 0 or epoch + 1 == epochs)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; the model's mode and all random states are given back after."""
    training, before = model.training, (random.getstate(), np.random.get_state())
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            random.setstate(before[0])
            np.random.set_state(before[1])
