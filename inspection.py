"""Opening a checkpoint to look at it: the model, how its pictures are prepared, and measurements of its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import main_pretrain
import masking
import models_mae
import monitor
from util import checkpoint, datasets, features, probes, sources, transforms
from util.config import PretrainSettings

METRICS = ("knn", "rank_me", "salience", "linear", "attentive")
CACHE_GB = 16  # the attentive probe keeps all patch tokens of its images in memory
# Settings that say what a model is, and what its pictures are; the others are of its training.
OF_MODEL = ("model", "input_size", "patch_size", "in_chans", "norm_pix_loss", "mean", "std")
OF_MODEL += ("mask_ratio", "masking", "masking_args")
OF_DATA = ("dataset", "data_path", "loader")


@dataclass
class Opened:
    """A model to look at.

    Attributes:
        model: in evaluation mode, on the device.
        settings: of its pre-training, as far as the checkpoint tells.
        strategy: its masking.
        normalize: uint8 images -> the model's input, on the device.
        has_decoder: False for an encoder alone, such as a fine-tuned one.
        trained: False for a model without a checkpoint.
        assumed: a sentence on what had to be assumed because the checkpoint does not tell it, or nothing.
    """

    model: models_mae.MaskedAutoencoderViT
    settings: PretrainSettings
    strategy: masking.base.Strategy
    normalize: transforms.Normalize
    has_decoder: bool = True
    trained: bool = True
    assumed: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's images."""
        return self.model.patch_embed.img_size


def untrained(name: str, device: torch.device | str = "cpu", **changes) -> Opened:
    """A new model of `models_mae`, random weights from seed 0; `changes` are settings, as on the command line."""
    check_device(device)
    settings = PretrainSettings(model=name, **changes)
    settings.check()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = main_pretrain.build_model(settings)
    return _opened(model, settings, device, trained=False)


def open_checkpoint(path: str | Path, device: torch.device | str = "cpu", **changes) -> Opened:
    """The model in a checkpoint of pre-training, fine-tuning or probing, or in one that the MAE authors published.

    The settings come from the checkpoint; what it does not tell (the name of the architecture, the sizes) is read from
    its tensors' shapes.

    Args:
        path: of the checkpoint.
        device: where the model goes.
        changes: settings that override the checkpoint's.

    Raises:
        ValueError: no checkpoint of an architecture in `models_mae`.
    """
    check_device(device)
    content = checkpoint.load(path)
    state = encoder_names(checkpoint.model_state(content, path))
    settings = settings_of(content, state, path, changes)
    assumed = "" if changes.get("input_size") else assumed_shape(content, state)
    with torch.device("meta"):
        model = main_pretrain.build_model(settings)
    wanted = set(model.state_dict())
    has_decoder = any(name.startswith("decoder_blocks.") for name in state)
    needed = {name for name in wanted if has_decoder or not name.startswith(("decoder", "mask_token"))}
    if "norm.weight" not in state:  # fine-tuned on the mean of the patch tokens: the classifier has a norm of its own
        needed -= {"norm.weight", "norm.bias"}
    current = model.state_dict()
    difference = checkpoint.describe_difference({name: current[name] for name in needed}, state)
    if difference:
        raise ValueError(f"{path}: not the architecture {settings.model}, name it with --model: {difference}")
    model = main_pretrain.build_model(settings)
    if "norm.weight" not in state:
        model.norm = nn.Identity()
    model.load_state_dict({name: state[name] for name in needed}, strict=False)
    return _opened(model, settings, device, has_decoder=has_decoder, assumed=assumed)


def _opened(
    model: models_mae.MaskedAutoencoderViT, settings: PretrainSettings, device: torch.device | str, **facts
) -> Opened:
    normalize = transforms.Normalize(*main_pretrain.channel_statistics(settings)).to(device)
    strategy = main_pretrain.create_strategy(settings)
    masking.check(strategy, model.num_patches, model.cls_token.shape[-1])
    return Opened(model.to(device).eval(), settings, strategy, normalize, **facts)


def encoder_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict without what only a classifier has: its head, and the norm in front of it."""
    return {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}


def check_device(device: torch.device | str) -> None:
    """ValueError for a GPU that is not there."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA GPU is visible here; leave it out, or use cpu")


def check_pictures(settings: PretrainSettings) -> None:
    """ValueError unless the pictures of these settings are what can be resized here."""
    if settings.loader is not None and settings.dataset == "folder":
        raise ValueError(
            f"--loader {settings.loader}: the model was trained on the arrays of a loader, and only pictures can be "
            "resized for a look at it; it can be trained further, fine-tuned and exported"
        )
    if settings.in_chans not in (1, 3, 4):
        raise ValueError(
            f"--in_chans {settings.in_chans}: only pictures of 1 (grey), 3 (RGB) or 4 (RGBA) channels can be resized "
            "for a look at a model"
        )


def settings_of(content: dict, state: dict, path: str | Path, changes: dict) -> PretrainSettings:
    """A checkpoint's settings of model and data, over them what its tensors' shapes say, over all `changes`.

    What belongs to its training alone, such as the batch size or where it wrote, is left out.
    """
    known = checkpoint.arguments(content)
    args = {name: known[name] for name in OF_MODEL + OF_DATA if known.get(name) is not None}
    if args.get("model", "").startswith("vit_"):
        args["model"] = f"mae_{args['model']}"
    projection = state.get("patch_embed.proj.weight")
    if projection is None or "pos_embed" not in state:
        raise ValueError(f"{path}: no encoder of this project: patch_embed.proj.weight or pos_embed is missing in it")
    patch = list(projection.shape[2:])
    args["patch_size"], args["in_chans"] = patch, projection.shape[1]
    grid = _grid(content, state, path, changes.get("input_size"))
    args["input_size"] = [side * step for side, step in zip(grid, patch, strict=True)]
    args.setdefault("model", guess_model(state, path) if "model" not in changes else changes["model"])
    settings = PretrainSettings(**(args | changes))
    settings.check()
    return settings


def told_grid(content: dict, state: dict[str, torch.Tensor]) -> tuple[int, int] | None:
    """Rows and columns of patches, if a checkpoint tells them: as `grid`, or by the `input_size` of its settings."""
    if content.get("grid"):
        return tuple(content["grid"])
    size = checkpoint.arguments(content).get("input_size")
    if not size:
        return None
    size = [size] if isinstance(size, int) else size  # a number in MAE's own checkpoints, and at Hugging Face
    rows, columns = (side // step for side, step in zip((size[0], size[-1]), _patch(state), strict=True))
    return (rows, columns) if rows * columns == _places(state) else None


def _grid(content: dict, state: dict, path: str | Path, given: list[int] | None) -> tuple[int, int]:
    """Rows and columns of patches: told by the checkpoint, of `given` images, or square. ValueError: they disagree."""
    told = told_grid(content, state)
    if given:
        rows, columns = (side // step for side, step in zip((given[0], given[-1]), _patch(state), strict=True))
        if rows * columns != _places(state) or (told and told != (rows, columns)):
            shape = f"{told[0]} x {told[1]}" if told else f"{_places(state)}"
            height, width = _patch(state)
            raise ValueError(f"--input_size {given}: {path} is of images of {shape} patches of {height} x {width}")
        return rows, columns
    if told:
        return told
    side = round(_places(state) ** 0.5)
    if side * side != _places(state):
        raise ValueError(
            f"{path}: its position table has {_places(state)} places, not a square, and it does not tell their shape; "
            "give the images' height and width with --input_size"
        )
    return side, side


def assumed_shape(content: dict, state: dict[str, torch.Tensor]) -> str:
    """A sentence where the shape of a model's images is not known, but taken as square; else nothing."""
    if told_grid(content, state):
        return ""
    side = round(_places(state) ** 0.5)
    height, width = (side * step for step in _patch(state))
    return (
        f"the file does not tell the shape of its images: {_places(state)} patches are taken as {side} x {side}, "
        f"images of {height} x {width}; --input_size HEIGHT WIDTH says otherwise"
    )


def _places(state: dict[str, torch.Tensor]) -> int:
    return state["pos_embed"].shape[1] - 1


def _patch(state: dict[str, torch.Tensor]) -> tuple[int, int]:
    return tuple(state["patch_embed.proj.weight"].shape[2:])


def guess_model(state: dict[str, torch.Tensor], path: str | Path) -> str:
    """The architecture whose width and depth a state dict has. ValueError: none, or `--model` is needed."""
    width = state["pos_embed"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for name in models_mae.available_models():
        with torch.device("meta"):
            model = models_mae.create_model(name)
        if (model.pos_embed.shape[-1], len(model.blocks)) == (width, depth):
            return name
    raise ValueError(f"{path}: no architecture here has width {width} and {depth} blocks; name one with --model")


class Named(Dataset):
    """`dataset[0, index]` -> picture `index`, (C, H, W), and class 0. OSError names a file that cannot be decoded.

    Unlike in a data set, no other picture takes its place.

    Args:
        images: the pictures.
        transform: PIL image -> tensor (C, H, W).
    """

    def __init__(self, images: datasets.ImageSet, transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        return self.transform(self.images.picture(key[1])), 0


def image_features(opened: Opened, pictures: list[str | Path], pool: str = "mean") -> torch.Tensor:
    """Features of picture files, whole and unmasked: (n, embed_dim), or (n, L, embed_dim) with pool "tokens".

    Each is resized and centre-cropped to the model's size.

    Raises:
        ValueError: the model is of other images than pictures.
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
) -> dict[str, float | int | list[int]]:
    """Measure the encoder on the data set of its settings.

    Args:
        opened: from `open_checkpoint` or `untrained`.
        metrics: of `METRICS`.
        neighbours: k of k-NN.
        train_images, val_images: at most so many, evenly spread; all if None.
        num_workers: of the loading.
        pool: "mean" or "cls", for k-NN, RankMe and the linear probe.

    Returns:
        The metrics; the numbers of images, and of those of them that could not be decoded. These are named on stderr,
        and the next good one takes the place of each.

    Raises:
        ValueError: no such numbers, a metric needs labels that the data set has not, or more memory than `CACHE_GB`.
        SystemExit: not one picture can be decoded.
    """
    given = {"neighbours": neighbours, "train_images": train_images, "val_images": val_images}
    for name, number in given.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")
    check_pictures(opened.settings)
    unlimited = 2**62
    sets = monitor.open_sets(opened.settings, opened.size, train_images or unlimited, val_images or unlimited)
    labelled = [name for name in metrics if name in ("knn", "linear", "attentive")]
    if labelled and sets.train is None:
        raise ValueError(
            f"--metrics {' '.join(labelled)}: need labels, --data_path with train/<class>/ and val/<class>/; "
            f"{sets.without_labels}"
        )
    if "attentive" in metrics:
        _check_cache(opened, len(sets.train) + len(sets.val))
    device = opened.normalize.shift.device

    def extract(images, pool: str) -> tuple[torch.Tensor, torch.Tensor]:
        return features.extract_features(opened.model, images, opened.normalize, pool=pool, num_workers=num_workers)

    result: dict = {"train_images": len(sets.train) if sets.train is not None else 0, "val_images": len(sets.val)}
    if {"knn", "rank_me", "linear"} & set(metrics):
        val = extract(sets.val, pool)
        train = extract(sets.train, pool) if labelled else None
        if "knn" in metrics:
            result["knn"] = features.knn_accuracy(train, val, neighbours)
        if "linear" in metrics:
            result["linear"] = probes.linear_probe(train, val, device=device)
        if "rank_me" in metrics:
            result["rank_me"] = features.rank_me(val[0])
    if "attentive" in metrics:
        tokens = extract(sets.train, "tokens"), extract(sets.val, "tokens")
        result["attentive"] = probes.attentive_probe(*tokens, device=device)
    if "salience" in metrics:
        found = monitor.salience_of_set(opened.model, sets.val, opened.normalize, opened.strategy, num_workers)
        result |= {name: values.mean().item() for name, values in found.items()}
        result["mask_ratio_histogram"] = monitor.ratio_histogram(found["mask_ratio"])
    read = (sets.val, sets.train) if labelled else (sets.val,)
    return result | {"bad_images": sum(images.bad.collect(device) for images in read)}


def _check_cache(opened: Opened, images: int) -> None:
    size = images * opened.model.num_patches * opened.model.cls_token.shape[-1] * 4 / 1e9
    if size > CACHE_GB:
        raise ValueError(
            f"--metrics attentive: the patch tokens of {images} images are {size:.0f} GB; "
            f"lower --train_images and --val_images to below {CACHE_GB} GB, or leave it out"
        )
