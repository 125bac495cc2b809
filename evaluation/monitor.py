"""What to watch while a masked autoencoder trains: k-NN accuracy, effective rank, salience, figures."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

import masking
from evaluation import drawing, features, figures
from util.config import PretrainSettings
from util.data import datasets, sources, transforms
from util.data.step_loader import evaluation_loader
from util.training.log import RunLog
from util.training.step import At

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from methods import Method

# Enough for a trend, and a minute at most on a GPU: images whose features the monitors take.
TRAIN_IMAGES, VAL_IMAGES, SHOWN_IMAGES = 20_000, 5_000, 6
RATIO_BINS = 20  # of the histogram of mask ratios, over 0..1


def ratio_histogram(ratios: torch.Tensor) -> list[int]:
    """Return how many mask ratios (N,) fall into each of the 20 bins [0, 0.05), ... [0.95, 1]."""
    return torch.histc((ratios.float().cpu() + 1e-6).clamp(max=1), RATIO_BINS, 0, 1).int().tolist()


@dataclass
class ImageSets:
    """What the monitors look at: evenly spread subsets, resized and cropped without randomness.

    Attributes:
        train: for k-NN; None without labels.
        val: whose features, salience and images are looked at: validation images where there are some.
        without_labels: why there are none, in a sentence.
    """

    train: datasets.SeededImages | None
    val: datasets.SeededImages
    without_labels: str = ""


def open_sets(
    settings: PretrainSettings, size: tuple[int, int], train_images: int, val_images: int, crop_pct: float = 1.0
) -> ImageSets:
    """Open the labelled images of the run's data set, else its unlabelled ones, without k-NN. ValueError: none.

    Args:
        settings: of the run.
        size: height and width of an image.
        train_images, val_images: at most so many.
        crop_pct: centre crop over resized side.
    """
    name, path, channels = settings.dataset, settings.data_path, settings.in_chans
    transform = transforms.evaluation_transform(size, crop_pct)

    def subset(images: datasets.ImageSet, most: int) -> datasets.SeededImages:
        images.check_pictures(f"--dataset {name}", "the model can be trained further and exported")
        chosen = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)
        source = sources.Chosen(images.source, chosen.tolist())
        images = dataclasses.replace(images, source=source, labels=images.labels[chosen])
        return datasets.SeededImages(images, transform, max_bad_images=1.0)  # who looks names them

    try:
        train = datasets.open_labelled(name, path, "train", channels)
        val = datasets.open_labelled(name, path, "val", channels)
        val = val.relabelled(train.classes, f"--data_path {path}")
        datasets.check_several_classes(train)
    except ValueError as error:
        unlabelled = datasets.open_unlabelled(name, path, channels)
        return ImageSets(None, subset(unlabelled, val_images), str(error))
    return ImageSets(subset(train, train_images), subset(val, val_images))


@dataclass
class Look:
    """What a look at a model found; only what was due.

    Attributes:
        values: numbers by name.
        mask_ratios: (n,), of the images.
        pictures: figures of some images, by name.
    """

    values: dict[str, float] = field(default_factory=dict)
    mask_ratios: torch.Tensor | None = None
    pictures: dict[str, Figure] = field(default_factory=dict)


@dataclass
class Monitor:
    """Looks at a method's model between epochs, on the first process only, and leaves no trace in the training.

    The other processes wait for it.

    Attributes:
        settings: of the run.
        method: what is trained.
        log: where numbers and figures go.
    """

    settings: PretrainSettings
    method: Method
    log: RunLog
    _sets: ImageSets = field(init=False)

    def __post_init__(self):
        self._sets = open_sets(self.settings, self.method.model.patch_embed.img_size, TRAIN_IMAGES, VAL_IMAGES)
        self._named: set[str] = set()
        if self._sets.train is None and self.settings.eval_every:
            self.log.say(f"no k-NN accuracy of the monitors: {self._sets.without_labels}")

    def look(self, epoch: int) -> Look:
        """Find what is due after `epoch`. Writes nothing, so that it can be broken off at any moment."""
        found = Look()
        with undisturbed(self.method.model):
            if is_due(self.settings.eval_every, epoch, self.settings.last_epoch):
                found = self.evaluate(epoch)
            if is_due(self.settings.vis_every, epoch, self.settings.last_epoch):
                found.pictures = self.pictures(epoch)
        return found

    def report(self, found: Look, step: int) -> dict:
        """Write figures and numbers to TensorBoard, name bad images on stderr, return the numbers for log.txt."""
        self.log.scalars({f"monitor/{name}": value for name, value in found.values.items()}, step)
        for name, figure in found.pictures.items():
            self.log.figure(f"monitor/{name}", figure, step)
        line = {f"monitor_{name}": value for name, value in found.values.items()}
        if found.mask_ratios is not None:
            self.log.histogram("monitor/mask_ratio", found.mask_ratios, step)
            line |= {"monitor_mask_ratio_histogram": ratio_histogram(found.mask_ratios)}
        if found.values:
            line |= {"monitor_bad_images": self._name_bad()}
        return line

    def evaluate(self, epoch: int) -> Look:
        """Measure k-NN accuracy where there are labels, RankMe, salience and mask ratios, at the end of `epoch`."""
        method, val = self.method, self._features(self._sets.val)
        values = {"rank_me": features.rank_me(val[0])}
        if self._sets.train is not None:
            values["knn"] = features.knn_accuracy(self._features(self._sets.train), val)
            if method.model.trains_class_token:
                sets = (self._features(images, "cls") for images in (self._sets.train, self._sets.val))
                values |= features.class_token_accuracies(*sets)
        found = salience_of_set(
            method.model,
            self._sets.val,
            method.normalize,
            method.strategy,
            self.settings.num_workers,
            masks=method.strategy_at(At(0, epoch, self.settings.epochs)),  # which is random in the warm-up
            progress=(epoch + 1) / self.settings.epochs,
        )
        values |= {name: numbers.mean().item() for name, numbers in found.items()}
        return Look(values, found.get("mask_ratio"))

    def pictures(self, epoch: int) -> dict[str, Figure]:
        """Draw the fixed images as the model sees them after `epoch`: under the masks, and by the encoder alone."""
        images, model, own = self._sets.val, self.method.model, self.method.strategy
        count = min(SHOWN_IMAGES, len(images))
        pixels = torch.stack([images[0, index * len(images) // count][0] for index in range(count)])
        strategies = figures.standard_strategies(self.settings, own, model.num_patches)
        rebuilt = figures.own_name(self.settings, own) if model.has_decoder else None
        draw = partial(
            figures.columns,
            model,
            pixels,
            self.method.normalize,
            strategies,
            rebuilt=rebuilt,
            temperature=figures.temperature_of(own),
            progress=(epoch + 1) / self.settings.epochs,
        )
        names = {"masks": figures.STANDARD, "encoder": ("attention", "heads", "pca")}
        return {name: drawing.draw(draw(names=shown)) for name, shown in names.items()}

    def _name_bad(self) -> int:
        """Name new images that cannot be decoded on stderr; return how many there are.

        `BadImages.collect` would wait for the other processes, which do not look.
        """
        count = 0
        for images in (self._sets.val, self._sets.train):
            bad = [index for index in range(len(images)) if index in images.bad] if images is not None else []
            count += len(bad)
            for index in bad:
                if images.name(index) not in self._named:
                    self._named.add(images.name(index))
                    print(f"bad picture: {images.bad.describe(index)}; the monitors see the next one", file=sys.stderr)
        return count

    def _features(self, images: datasets.SeededImages, pool: str = "mean") -> tuple[torch.Tensor, torch.Tensor]:
        model, workers = self.method.model, self.settings.num_workers
        return features.extract_features(model, images, self.method.normalize, pool=pool, num_workers=workers)


def salience_of_set(
    model: nn.Module,
    images: datasets.SeededImages,
    normalize: transforms.Normalize,
    strategy: masking.base.Strategy,
    num_workers: int = 0,
    **now,
) -> dict[str, torch.Tensor]:
    """Compute `figures.salience_statistics`, which has `now`, of all images of a set: (n,) each, on the CPU."""
    found: dict[str, list[torch.Tensor]] = {}
    for pixels, _ in evaluation_loader(images, range(len(images)), batch_size=256, num_workers=num_workers):
        batch = figures.salience_statistics(model, normalize(pixels.to(normalize.shift.device)), strategy, **now)
        for name, values in batch.items():
            found.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def due(settings: PretrainSettings, epoch: int) -> bool:
    """Return whether there is something to look at after `epoch`."""
    return any(is_due(every, epoch, settings.last_epoch) for every in (settings.eval_every, settings.vis_every))


def is_due(every: int | None, epoch: int, last_epoch: int) -> bool:
    """Return True after every `every`-th epoch and after the last."""
    return every is not None and ((epoch + 1) % every == 0 or epoch == last_epoch)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradient in the block; the model's mode and all random states are restored after it."""
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
