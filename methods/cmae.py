"""CMAE (Huang et al., 2022): MAE, and a feature decoder whose mean must be told from those of other images."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from masking import Mask
from masking.base import Strategy, check_number, check_share
from methods.base import At, Inputs, Loss, Method, Plan, check_own_views, register
from methods.heads import ProjectionHead
from methods.teacher import follow, teacher_of
from models_mae import MaskedAutoencoderViT, init_linear
from util import lr_sched, precision, seeding
from util.config import PretrainSettings
from util.data.colours import Colours
from util.data.crop import PixelCrop
from util.data.step_loader import MicroBatch
from util.distributed import world


class ShiftedViews:
    """Two views of one crop: the student's, and the teacher's, which is shifted and has other colours.

    Args:
        size: height and width of a view in pixels.
        scale: range of the crop's area over the image's.
        hflip: probability that both are flipped.
        shift: the crop is so many pixels larger than a view, each way.
    """

    takes_pixels = True

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], hflip: float, shift: int):
        self.size, self.shift = size, shift
        self.crop = PixelCrop((size[0] + shift, size[1] + shift), scale, hflip)
        self.colours = Colours((0.4, 0.4, 0.4, 0.1), blur=0.5)

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels (H, W, 3) -> two views (3, h, w), `uint8`."""
        crop, flip, _ = self.crop(pixels)
        crop = crop.permute(2, 0, 1)
        crop = crop.flip(2) if flip else crop
        top, left = torch.randint(0, max(self.shift, 1), (2,)).tolist()
        height, width = self.size
        second = crop[:, top : top + height, left : left + width]
        return crop[:, :height, :width].contiguous(), self.colours(second)


class FeatureDecoder(nn.Module):
    """A decoder of blocks like the model's, with parameters of its own, that predicts features of width D."""

    def __init__(self, model: MaskedAutoencoderViT, depth: int):
        super().__init__()
        self.decoder_embed = copy.deepcopy(model.decoder_embed)
        self.decoder_blocks = nn.ModuleList([copy.deepcopy(model.decoder_blocks[0]) for _ in range(depth)])
        self.decoder_norm = copy.deepcopy(model.decoder_norm)
        self.decoder_pred = nn.Linear(model.decoder_embed.out_features, model.decoder_embed.in_features)
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.apply(init_linear)
        self.mask_token = nn.Parameter(torch.zeros_like(model.mask_token))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, model: MaskedAutoencoderViT, latent: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Latent from the model's encoder -> features (N, L, D) of all patches."""
        num_images, num_tokens = mask.mask.shape
        encoded = self.decoder_embed(latent).flatten(0, -2)
        x = self.mask_token.to(encoded.dtype).expand(1, num_images * (num_tokens + 1), -1).flatten(0, 1)
        x = x.index_copy(0, mask.kept.slots, encoded).view(num_images, num_tokens + 1, -1) + model.decoder_pos_embed
        return model.run_decoder(self.decoder_blocks, self.decoder_norm, self.decoder_pred, x, None)


@register("cmae")
class CMAE(Method):
    """MAE's loss on one view, and a contrastive one: the mean of decoded features against a teacher's of another view.

    The negatives are the other images of the global batch, so steps cannot be accumulated. The teacher sees everything.

    Args:
        model, strategy: as for every method.
        pixel_weight, contrast_weight: of the two losses.
        temperature: of the contrast.
        momentum, final_momentum: of the teacher at the beginning and at the end, half a cosine between them.
        feature_depth: blocks of the feature decoder.
        hidden_dim, proj_dim: widths of the projection heads.
        shift: pixels by which the teacher's view may lie elsewhere.
    """

    offers = frozenset({"grid", "patch_size", "progress", "epoch", "draw"})
    decodes_part = accumulates = False
    changes_colours = True

    def __init__(
        self,
        model: MaskedAutoencoderViT,
        strategy: Strategy,
        pixel_weight: float = 1.0,
        contrast_weight: float = 1.0,
        temperature: float = 0.07,
        momentum: float = 0.996,
        final_momentum: float = 0.996,
        feature_depth: int = 2,
        hidden_dim: int = 1536,
        proj_dim: int = 256,
        shift: int = 32,
    ):
        super().__init__(model, strategy)
        self.momentum = check_share("momentum", momentum)
        self.final_momentum = check_share("final_momentum", final_momentum)
        for name, value in (("feature_depth", feature_depth), ("hidden_dim", hidden_dim), ("proj_dim", proj_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        self.pixel_weight = check_number("pixel_weight", pixel_weight)
        self.contrast_weight = check_number("contrast_weight", contrast_weight)
        self.temperature = check_number("temperature", temperature, exclusive=True)
        self.shift = int(check_number("shift", shift))
        self.feature_decoder = FeatureDecoder(model, feature_depth)
        self.projector = ProjectionHead(model.cls_token.shape[-1], hidden_dim, proj_dim)
        self.predictor = ProjectionHead(proj_dim, hidden_dim, proj_dim)
        self.teacher = teacher_of(nn.ModuleDict({"model": model, "projector": self.projector}))
        encoder = self.teacher["model"]
        for name in [n for n, _ in encoder.named_children() if n not in ("patch_embed", "blocks")]:
            delattr(encoder, name)
        del encoder.mask_token, encoder.decoder_pos_embed
        encoder.norm = nn.Identity()

    @classmethod
    def from_settings(cls, settings: PretrainSettings, weights: dict | None = None, /, **options) -> CMAE:
        """Build the method. ValueError, besides those of every method: steps would be accumulated, or no RGB."""
        if settings.resolved_accum_iter(world.launched_world_size()) > 1:
            raise ValueError(
                "--method cmae: its negatives are the images of one step, so steps cannot be accumulated; lower "
                "--effective_batch_size or leave it out, raise --batch_size, or use more processes"
            )
        check_own_views(settings)
        method = super().from_settings(settings, weights, **options)
        size, scale = method.model.patch_embed.img_size, tuple(settings.crop_scale)
        method.views = ShiftedViews(size, scale, settings.hflip, method.shift)
        return method

    def inputs(self, micro_batch: MicroBatch, seed: int, device: torch.device) -> Inputs:
        """Put a micro-batch on the device: both views, normalised, and what the masks draw."""
        views = [self.normalize(view.to(device, non_blocking=True)) for view in micro_batch.batch[0]]
        noise, index = self.noise(micro_batch, seed, device), torch.tensor(micro_batch.indices)
        draw = seeding.step_draw(seed, micro_batch.step)
        return Inputs(views, noise, index, draw=draw, step_size=micro_batch.step_size)

    def choose(self, inputs: Inputs, at: At) -> Plan:
        """Choose which patches of the first view to remove; project what the teacher sees of the second."""
        mask, (images, seconds) = self.choose_mask(inputs, at), inputs.views
        with torch.no_grad(), precision.autocast(self.amp, images.device):
            encoder = self.teacher["model"]
            target = self.teacher["projector"](encoder.encode(encoder.embed(seconds), None)[:, 1:].mean(dim=1))
        target, first = world.gather_rows(F.normalize(target.float(), dim=-1), inputs.step_size)
        count = torch.full((), len(images), device=images.device)
        counts = {"pixels": mask.loss_weight.sum(), "contrast": count}
        return Plan(counts, mask, {"targets": target, "first": first}, mask.stats)

    def forward(self, inputs: Inputs, plan: Plan, at: At) -> dict[str, Loss]:
        """Predict the pixels of the removed patches; tell the image from the others by its features."""
        model, images, mask = self.model, inputs.views[0], plan.mask
        latent = model.forward_encoder(images, mask)
        pixels = model.forward_loss(images, model.forward_decoder(latent, mask), mask)
        pooled = self.feature_decoder(model, latent, mask).mean(dim=1)  # (N, D)
        online = F.normalize(self.predictor(self.projector(pooled)).float(), dim=-1)
        with precision.no_autocast(online.device.type):  # a half-precision product is too coarse for / 0.07
            logits = online @ plan.extra["targets"].T / self.temperature  # (N, images of all processes)
        label = torch.arange(len(logits), device=logits.device) + plan.extra["first"]
        contrast = 2 * self.temperature * F.cross_entropy(logits, label, reduction="sum")
        return {
            "pixels": Loss(self.pixel_weight * pixels * plan.counts["pixels"], plan.counts["pixels"]),
            "contrast": Loss(self.contrast_weight * contrast, plan.counts["contrast"]),
        }

    def after_step(self, at: At, taken: torch.Tensor) -> None:
        """Move the teacher; the statistics of its batch normalisation are its own."""
        follow(self.teacher, self, lr_sched.half_cosine(at.progress, self.momentum, self.final_momentum), taken)

    def schedule(self, at: At, lr: float, weight_decay: float) -> tuple[float, float]:
        """Return learning rate and weight decay: the warm-up's last step has the peak; then a cosine."""
        rate = lr_sched.stepwise(
            at.step,
            at.epoch,
            at.epochs,
            lr=self.peak_lr,
            min_lr=self.min_lr,
            warmup_epochs=self.warmup_epochs,
            start=1e-4,
        )
        return rate, weight_decay

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Return the optimizer's groups: weights, also of batch normalisation, are decayed, all else is not."""
        without = ("norm", "bias", "pos_embed", "mask_token", "cls_token")
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [[p for name, p in trained if any(part in name for part in without) == bare] for bare in (False, True)]
        return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
