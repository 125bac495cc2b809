"""Training steps to compare: ours with each strategy, Hugging Face's MAE, and a plain MAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timm.models.vision_transformer import Block
from torch import nn

import masking
import models_mae
from benchmarks.measure import optimizer_tensors
from masking import Mask
from methods import MAE, At, Inputs
from util import optim, precision
from util.training.averages import Averages
from util.training.step import GradientStep, train_step


@dataclass
class Contender:
    """A training step on fixed images.

    Attributes:
        step: takes one optimizer step.
        tensors: what stays in memory between steps, once a step was taken.
        keep_lengths, decode_lengths: kept and decoded patches of each image in the last step.
    """

    step: Callable[[], object]
    tensors: Callable[[], list[torch.Tensor]]
    keep_lengths: list[int] = field(default_factory=list)
    decode_lengths: list[int] = field(default_factory=list)


class SpreadCounts(masking.SBAM):
    """SBAM whose images keep evenly spread numbers of patches, with the mean of a fixed ratio of 0.75.

    AMR's own counts depend on the weights; these do not, so that equal totals can be compared.
    """

    def num_keep(self, num_salient: torch.Tensor, num_tokens: int) -> torch.Tensor:
        mean, num_images = masking.keep_count(num_tokens, self.mask_ratio), len(num_salient)
        half = torch.arange(num_images // 2, device=num_salient.device) * int(0.6 * mean) // max(num_images // 2, 1) + 1
        middle = half.new_zeros(num_images % 2)
        return mean + torch.cat([half, middle, -half.flip(0)])


def _padded_block(block: nn.Module, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Run a block over images (N, K + 1, D) of which the `valid` tokens count."""
    return block(x, attn_mask=valid)


class PaddedMAE(models_mae.MaskedAutoencoderViT):
    """What others do with different counts: pad to the longest image, under an attention mask."""

    _padded_block = staticmethod(_padded_block)

    def compile_blocks(self, **options) -> None:
        """Compile the padded blocks, too: one graph for any longest image."""
        super().compile_blocks(**options)
        self._padded_block = torch.compile(_padded_block, dynamic=True, fullgraph=True, **options)

    def _encode_kept(self, tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
        lengths = torch.tensor(mask.keep_lengths, device=tokens.device)
        valid = torch.arange(int(lengths.max()) + 1, device=tokens.device) <= lengths[:, None]  # (N, K + 1)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(lengths), -1, -1).flatten(0, 1)
        x = tokens.new_zeros(*valid.shape, tokens.shape[-1])
        rows = torch.cat([cls_token.to(tokens.dtype), tokens])[_class_token_first(mask)]
        x = x.masked_scatter(valid[..., None], rows)
        for block in self.blocks:
            x = self._padded_block(block, x, valid[:, None, None])
        return self.norm(x)[valid]


def _class_token_first(mask: Mask) -> torch.Tensor:
    """Return the order (T + N,) that puts N class tokens and T kept tokens image by image."""
    kept, num_images = mask.kept, len(mask.num_keep)
    order = torch.empty_like(kept.slots)
    order[kept.class_rows] = torch.arange(num_images, device=order.device)
    order[kept.rows] = torch.arange(len(kept.rows), device=order.device) + num_images
    return order


class Ours:
    """This project's training step, as `main_pretrain.py` takes it; strategies share one model."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        amp: str,
        *,
        compiled: bool = False,
        padded: bool = False,
        **options,
    ):
        torch.manual_seed(0)
        bare = models_mae.create_model(name, norm_pix_loss=True, **options)
        if padded:
            bare.__class__ = PaddedMAE
        self.model = bare.to(device).train()
        self.method = MAE(self.model)
        if compiled:
            self.model.compile_blocks()
        self.optimizer = optim.pretrain_adamw(self.method.parameter_groups(0.05), device)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        scaler = precision.grad_scaler(amp, device)
        self.update = GradientStep(self.method, self.optimizer, scaler)
        self.averages, self.amp = Averages(device), amp

    def contender(self, images: torch.Tensor, strategy: masking.base.Strategy, decode_ratio: float = 1.0) -> Contender:
        """Return the step on `images` (N, C, H, W) with `strategy`, which predicts a share of the removed patches."""
        found = Contender(lambda: None, lambda: optimizer_tensors(self.model, self.optimizer))

        def watched(tokens: torch.Tensor, noise: torch.Tensor | None = None, **needed) -> Mask:
            mask = strategy(tokens, noise=noise, **needed)
            found.keep_lengths = list(mask.keep_lengths or (mask.ids_keep.shape[1],) * len(tokens))
            removed = [tokens.shape[1] - kept for kept in found.keep_lengths]
            shares = [max(1, int(decode_ratio * count)) for count in removed]
            found.decode_lengths = [k + share for k, share in zip(found.keep_lengths, shares, strict=True)]
            return mask

        watched.reads_tokens, watched.needs = masking.reads_tokens(strategy), masking.base.needs(strategy)

        def step() -> None:
            self.method.strategy, self.method.decode_ratio = watched, decode_ratio
            train_step(self.method, [Inputs([images])], At(0, 0.0, 1), self.update, self.averages, self.amp)

        found.step = step
        return found


def hugging_face(ours: models_mae.MaskedAutoencoderViT, images: torch.Tensor, amp: str) -> Contender:
    """Build `transformers.ViTMAEForPreTraining` as large as `ours`, with SDPA, fused AdamW. ImportError if absent."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    width, decoder_width = ours.patch_embed.proj.out_channels, ours.decoder_embed.out_features
    config = ViTMAEConfig(
        image_size=images.shape[-1],
        patch_size=ours.patch_embed.patch_size[0],
        hidden_size=width,
        num_hidden_layers=len(ours.blocks),
        num_attention_heads=ours.blocks[0].attn.num_heads,
        intermediate_size=4 * width,
        decoder_hidden_size=decoder_width,
        decoder_num_hidden_layers=len(ours.decoder_blocks),
        decoder_num_attention_heads=ours.decoder_blocks[0].attn.num_heads,
        decoder_intermediate_size=4 * decoder_width,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    model = ViTMAEForPreTraining(config).to(images.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        with precision.autocast(amp, images.device):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(step, lambda: optimizer_tensors(model, optimizer))


class PlainMAE(models_mae.MaskedAutoencoderViT):
    """Blocks that write out the attention matrix; all patches embedded with a gradient."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patch_embed(images) + self.pos_embed[:, 1:]
        mask = self.masking(tokens)
        pred = self.forward_decoder(self.encode(tokens, mask), mask)
        return self.forward_loss(images, pred, mask.mask)


def plain_mae(name: str, images: torch.Tensor, **options) -> Contender:
    """Build MAE as commonly run: fp16 with a loss scaler on a GPU, no SDPA, AdamW not fused, a wait in each step."""
    device = images.device
    model = models_mae.create_model(name, norm_pix_loss=True, **options)
    model.__class__ = PlainMAE
    for module in model.modules():
        if isinstance(module, Block):
            module.attn.fused_attn = False
    model.to(device).train()
    amp = "fp16" if device.type == "cuda" else "none"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=False)
    scaler = precision.grad_scaler(amp, device)

    def step() -> float:
        with precision.autocast(amp, device):
            loss = model(images)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        value = loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return value

    return Contender(step, lambda: optimizer_tensors(model, optimizer))
