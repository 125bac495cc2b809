"""What a pre-training method is, the registry of methods, and the builders that they share.

A method is one file and one registration: how a picture becomes views, which tokens of them are removed, and what the
loss is. Everything else (data, steps, accumulation, processes, checkpoints, resuming) is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import masking
import models_mae
from methods.attention_maps import AttentionMaps
from models_base import MaskedModel
from util import cli, seeding
from util.config import PretrainSettings
from util.data import transforms
from util.data.step_loader import MicroBatch
from util.distributed import world
from util.ratios import exact_ratio
from util.registry import Registry
from util.training import strategy_state
from util.training.averages import Averages
from util.training.step import At, Loss
from util.training.whole_set import WholeSet

__all__ = ["At", "Inputs", "Loss", "Method", "Plan", "available", "create", "from_settings", "register"]

_REGISTRY = Registry("method")
register, available, create = _REGISTRY.register, _REGISTRY.available, _REGISTRY.create


class Inputs(NamedTuple):
    """A micro-batch on the device.

    Attributes:
        views: (N, C, H_v, W_v) each, normalised. A masked autoencoder has one.
        noise: (N, L) in [0, 1), what the masks draw, a function of (seed, step).
        index: (N,) int64, number of each picture in the data set.
        boxes: (N, 7) crop and flip of the first view, see `masking.NEEDS`.
        draw: one number in [0, 1) for all images of the step.
        decode_noise: (N, L) in [0, 1) that draws which removed tokens are predicted, where only a part is.
        ratios: drawn mask ratios, of methods that replace tokens.
        targets: (N,) classes or (N, classes) probabilities, of labelled images only.
        step_size: images of the step, over all processes, where the method asks for it.
    """

    views: list[torch.Tensor]
    noise: torch.Tensor | None = None
    index: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    draw: float = 0.5
    decode_noise: torch.Tensor | None = None
    ratios: masking.Ratios | None = None
    targets: torch.Tensor | None = None
    step_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is known of a micro-batch before its forward pass. A method may add to it what its forward needs.

    Attributes:
        counts: number of terms of each loss, 0-dim, under the names that `forward` returns.
        mask: which tokens are removed, or None.
        extra: what else `forward` needs, such as a teacher's outputs.
        stats: numbers (N,) of each image for the log.
    """

    counts: dict[str, torch.Tensor]
    mask: masking.Mask | None = None
    extra: dict = field(default_factory=dict)
    stats: dict[str, torch.Tensor] = field(default_factory=dict)

    def log(self, averages: Averages) -> None:
        """Add what the log says of this plan."""
        if self.mask is not None:
            removed, num_tokens = self.mask.mask.sum(dim=1), self.mask.mask.shape[1]  # (N,)
            averages.add_range("mask_ratio", removed / num_tokens)
            averages.add_range("kept_tokens", num_tokens - removed)
        for name, values in self.stats.items():
            averages.add(name, values.sum(), len(values))


class Method(nn.Module):
    """A pre-training method. A subclass implements `choose` and `forward`; the other hooks do nothing by default.

    Everything outside `model` that is a parameter or a buffer (a teacher, centres, heads) is saved in
    `checkpoint["method"]` and restored bit for bit.

    Args:
        model: what is probed, fine-tuned and exported: `model` of the checkpoint.
        strategy: chooses the masks.

    Attributes:
        views: picture -> tuple of tensors, in the loader's workers.
        normalize: pixels -> the model's input, on the device.
        masking_warmup_epochs: epochs of random masking before `strategy` begins.
        may_freeze: parts of the names of parameters that `on_gradients` may freeze from the first step on.
        clip_each: `--clip_grad` limits the norm of each parameter's gradient, not that of the whole.
        model_class: what `model` must be.
        betas: of AdamW.
        decodes_part: whether `--decode_ratio` below 1 makes sense.
        accumulates: whether a step may have several micro-batches.
        changes_colours: whether the views need 8-bit images.
        decode_ratio: share of the removed tokens that are predicted.
        peak_lr, min_lr, warmup_epochs: of the settings, for `schedule`.
        offers: what a strategy may need (`masking.NEEDS`) and this method gives.
        shown: averages that stand in each line on the terminal.
    """

    model_class: type[MaskedModel] = models_mae.MaskedAutoencoderViT
    betas = (0.9, 0.95)
    decodes_part = accumulates = True
    changes_colours = False
    clip_each = False
    may_freeze: tuple[str, ...] = ()
    offers: frozenset[str] = frozenset({"grid", "patch_size", "progress", "epoch", "draw", "maps", "boxes"})
    shown: tuple[str, ...] = ("mask_ratio", "mask_ratio_min", "mask_ratio_max", "grad_norm")

    def __init__(self, model: nn.Module, strategy: masking.base.Strategy | None = None):
        super().__init__()
        self.model = model
        object.__setattr__(self, "strategy", strategy)  # no submodule, whatever it is
        self.views: Callable | None = None
        self.set_normalize(None)
        self.masking_warmup_epochs, self.decode_ratio = 0, 1.0
        self._warmup: masking.base.Strategy | None = None
        self.maps: AttentionMaps | None = None  # where the strategy needs them
        self.amp = "none"
        self.peak_lr, self.min_lr, self.warmup_epochs = 1.0, 0.0, 0.0

    @classmethod
    def from_settings(cls, settings: PretrainSettings, weights: dict | None = None, /, **options) -> Method:
        """Build the method that the settings describe, on the current default device.

        Args:
            settings: of the run.
            weights: tensors of the model to start from, before a teacher is made of it; the others stay new.
            options: the method's own.

        Raises:
            ValueError: it cannot be built, or the strategy needs what it does not give.
        """
        model, strategy = build_model(settings), create_strategy(settings)
        if not isinstance(model, cls.model_class):
            raise ValueError(
                f"--model {settings.model}: is no {cls.model_class.__name__}, which --method {settings.method} trains; "
                "choose another of the two"
            )
        if settings.decode_ratio != 1 and not cls.decodes_part:
            raise ValueError(f"--decode_ratio {settings.decode_ratio}: --method {settings.method} predicts all patches")
        if weights is not None:
            model.load_state_dict(weights, strict=False)
        check_strategy(strategy, model, cls.offers, f"--method {settings.method}")
        method = _REGISTRY.call(settings.method, cls, options, (model, strategy))
        model.set_masking(strategy)
        method.masking_warmup_epochs = settings.masking_warmup_epochs
        if settings.masking_warmup_epochs:
            method._warmup = create_warmup(strategy, settings.mask_ratio)
            check_strategy(method._warmup, model)
        method.decode_ratio = exact_ratio(settings.decode_ratio)
        method.peak_lr = settings.resolved_lr(world.launched_world_size())
        method.min_lr, method.warmup_epochs = settings.min_lr, settings.warmup_epochs
        if "maps" in masking.base.needs(strategy):
            folders = [Path(settings.output_dir), *([Path(settings.resume).parent] if settings.resume else [])]
            every = getattr(strategy, "refresh_epochs", 40)
            method.maps = AttentionMaps(folders, every, settings.epochs, model.patch_embed.grid_size)
        size, scale = model.patch_embed.img_size, tuple(settings.crop_scale)
        method.views = transforms.pretrain_transform(size, scale, settings.hflip, settings.exact_resize)
        method.set_normalize(transforms.Normalize(*channel_statistics(settings)))
        return method

    def set_normalize(self, normalize: transforms.Normalize) -> None:
        """Prepare pixels with `normalize` from now on. It is no submodule: it belongs to the settings."""
        object.__setattr__(self, "normalize", normalize)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of the model's blocks again in the backward pass."""
        self.model.set_grad_checkpointing(enable)

    def compile_parts(self) -> None:
        """Compile what is worth it: the blocks and the loss; flip, conversion and normalisation in one pass."""
        # Each size of micro-batch needs graphs of its own: an epoch ends with two others, a look at the model has more.
        # After torch's eight a run would end; that timm.optim lifts the limit is not to be relied on.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        # It would cut graphs where DDP's buckets are full. Blocks are graphs of their own: gradients are sent in time.
        torch._dynamo.config.optimize_ddp = False
        for module in self.modules():  # a teacher's model, too
            if isinstance(module, MaskedModel):
                module.compile_blocks()
        self.normalize.compile(dynamic=True)

    def inputs(self, micro_batch: MicroBatch, seed: int, device: torch.device) -> Inputs:
        """Put a micro-batch on the device: normalised views, and what the masks draw.

        Args:
            micro_batch: collated `views`, on the host; here pixels (N, H, W, C) uint8, flips (N,) bool, boxes (N, 6).
            seed: of the run.
            device: where to.
        """
        pixels, flips, boxes = (tensor.to(device, non_blocking=True) for tensor in micro_batch.batch[0])
        images = self.normalize(pixels.permute(0, 3, 1, 2).contiguous(), flips)
        return Inputs(
            [images],
            self.noise(micro_batch, seed, device),
            torch.tensor(micro_batch.indices),
            torch.cat([boxes, flips[:, None].to(boxes.dtype)], dim=1),
            draw=seeding.step_draw(seed, micro_batch.step),
            decode_noise=self.noise(micro_batch, seed, device, seeding.DECODE) if self.decode_ratio < 1 else None,
        )

    def noise(
        self, micro_batch: MicroBatch, seed: int, device: torch.device, stream: int = seeding.NOISE
    ) -> torch.Tensor:
        """Draw U[0, 1) for each token: (N, L), a function of (seed, step, place in the step, stream)."""
        places, size, length = micro_batch.places, micro_batch.step_size, self.model.patch_embed.num_patches
        return seeding.step_noise(seed, micro_batch.step, places, size, length, device, stream)

    def strategy_at(self, at: At) -> masking.base.Strategy:
        """Return the strategy of this step: random masking during the warm-up."""
        return self._warmup if at.epoch < self.masking_warmup_epochs else self.strategy

    def offered(self, inputs: Inputs, at: At) -> dict:
        """Return what `offers` names, besides grid and patch size, for the first view of a micro-batch."""
        found = {"progress": at.progress, "epoch": (int(at.epoch), at.epochs), "draw": inputs.draw}
        found["boxes"] = inputs.boxes
        if self.maps is not None:
            found["maps"] = self.maps.of(inputs.index, int(at.epoch), inputs.views[0].device)
        return found

    def choose_mask(self, inputs: Inputs, at: At) -> masking.Mask:
        """Ask the strategy which tokens of the first view to remove, and draw which of them to predict."""
        strategy, offered = self.strategy_at(at), self.offered(inputs, at)
        mask = self.model.choose_mask(inputs.views[0], inputs.noise, strategy, **offered)
        return mask if self.decode_ratio == 1 else masking.predict_part(mask, self.decode_ratio, inputs.decode_noise)

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Choose the masks of a micro-batch, and count the terms of each loss. No gradient, not compiled."""
        raise NotImplementedError

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Compute each loss term of a micro-batch, weights included; under autocast."""
        raise NotImplementedError

    def schedule(self, at: At, lr: float, weight_decay: float) -> tuple[float, float]:
        """Return learning rate and weight decay of this step, given those of the settings; a function of `at`."""
        return lr, weight_decay

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return the optimizer's parameter groups; 1-D tensors and biases are not decayed, tokens are (MAE)."""
        return param_groups_weight_decay(self, weight_decay)

    def on_gradients(self, at: At) -> None:
        """Change the gradients before they are clipped; None in place of one freezes its parameter for this step."""

    def after_step(self, at: At, taken: torch.Tensor) -> None:
        """Move teacher and centres. `taken` is 0-dim, on the device: a step that was skipped must change nothing."""

    def begin(self, epoch: int, num_images: int, amp: str) -> None:
        """Prepare for the epochs from `epoch` on. ValueError: something that they need is missing.

        Args:
            epoch: 0-based, the first to train.
            num_images: of the training set.
            amp: the run's format: bf16, fp16 or none.
        """
        self.amp = amp
        if self.maps is not None and self.maps.made_after(epoch) is not None:
            self.maps.find(self.maps.made_after(epoch), num_images)

    def after_epoch(self, at: At, images: WholeSet) -> None:
        """Do what is due between two epochs: here the attention maps of all `images`, where the strategy needs them."""
        epoch = round(at.epoch) - 1
        if self.maps is not None and self.maps.due(epoch):
            self.maps.make(self.model, self.normalize, images, epoch, self.amp)

    def side_state(self) -> dict[str, torch.Tensor]:
        """Return the state outside `model`, for `checkpoint["method"]`."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def load_side_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `side_state` returned; names and shapes have been checked."""
        self.load_state_dict(state, strict=False)


def check_own_views(settings: PretrainSettings) -> None:
    """Raise ValueError for images or crops that a method which changes colours cannot take."""
    if settings.in_chans != 3:
        raise ValueError(
            f"--in_chans {settings.in_chans}: --method {settings.method} changes colours, and needs 3 channels"
        )
    if settings.exact_resize:
        raise ValueError(f"--exact_resize: --method {settings.method} cuts views of its own; leave it out")


def from_settings(settings: PretrainSettings, weights: dict | None = None) -> Method:
    """Build the method that `--method`, `--method_args` and the other settings describe, perhaps from `weights`."""
    found = _REGISTRY.find(settings.method)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"--method {settings.method}: is no subclass of methods.Method")
    return found.from_settings(settings, weights, **cli.parse_options(settings.method_args, "method_args"))


def build_model(settings: PretrainSettings) -> MaskedModel:
    """Build the model of the settings, on the current default device."""
    sizes = {"img_size": settings.size("input_size"), "patch_size": settings.size("patch_size")}
    given = {name: size for name, size in sizes.items() if size is not None}
    return models_mae.create_model(
        settings.model, in_chans=settings.in_chans, norm_pix_loss=settings.norm_pix_loss, **given
    )


def create_strategy(settings: PretrainSettings) -> masking.base.Strategy:
    """Build the masking strategy with its own options."""
    options = {"mask_ratio": settings.mask_ratio} | cli.parse_options(settings.masking_args)
    with torch.device("cpu"):  # a strategy may hold tensors, also where the model is only on the meta device
        return masking.create(settings.masking, **options)


def create_warmup(strategy: masking.base.Strategy, mask_ratio: float | str) -> masking.base.Strategy:
    """Build the random masking that comes before `strategy`: in its cells, at its rounding and its `warmup_ratio`."""
    options = {name: getattr(strategy, name) for name in ("cell", "rounding") if hasattr(strategy, name)}
    return masking.create("random", mask_ratio=getattr(strategy, "warmup_ratio", mask_ratio), **options)


def check_strategy(
    strategy: masking.base.Strategy, model: nn.Module, offers: frozenset[str] = Method.offers, giver: str = "this model"
) -> None:
    """Raise ValueError if `strategy` cannot mask the images of `model`, or needs what is not among `offers`."""
    grid, width = model.patch_embed.grid_size, model.cls_token.shape[-1]
    with strategy_state.unchanged(strategy):
        masking.check(strategy, model.patch_embed.num_patches, width, grid=grid, offers=offers, giver=giver)


def channel_statistics(settings: PretrainSettings) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation for normalisation."""
    return transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)
