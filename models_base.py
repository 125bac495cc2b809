"""What the models of all masked-image methods have in common: patches, and a strategy that chooses some of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import nn

import masking
from masking import Mask
from util.precision import full_fp32, no_autocast


class MaskedModel(nn.Module):
    """A ViT whose patches a strategy may remove.

    A subclass has `patch_embed` (timm's), `cls_token` (1, 1, D), `blocks`, `norm` and `in_chans`, and implements
    `embed` and `encode`.

    Attributes:
        masking: strategy `(tokens, noise=None) -> masking.Mask`.
        grad_checkpointing: whether activations are computed again in the backward pass.
        norm_pix_loss: whether targets are normalised within each patch.
        has_decoder: whether it predicts pixels.
        trains_class_token: whether a loss is of the class token itself, so that it is worth classifying by.
        has_mask_ratio: whether `mask_ratio` of the settings says how much is removed; otherwise its method draws that.
    """

    masking: Callable[..., Mask]
    grad_checkpointing = False
    norm_pix_loss = False
    has_decoder = True
    trains_class_token = False
    has_mask_ratio = True

    def set_masking(self, strategy: Callable[..., Mask]) -> None:
        """Mask with `strategy` from now on. It is no submodule, whatever it is: the state dict stays the same."""
        object.__setattr__(self, "masking", strategy)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the rest again: less memory, more time."""
        self.grad_checkpointing = enable

    def compile_blocks(self, **options) -> None:
        """Compile the transformer blocks; `options` go to `torch.compile`."""
        raise NotImplementedError

    def take_form_of(self, state: dict[str, torch.Tensor]) -> None:
        """Become the encoder of a classifier with the tensors `state`, where those differ from pre-training's.

        One of the mean of the patch tokens has no final norm: another one comes after the mean.
        """
        if "norm.weight" not in state:
            self.norm = nn.Identity()

    @property
    def num_patches(self) -> int:
        """Return L, the number of patches of an image."""
        return self.patch_embed.num_patches

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Cut (N, C, H, W) -> (N, L, p_h * p_w * C); within a patch row, column, channel, the channel fastest."""
        height, width = self.patch_embed.patch_size
        rows, columns = images.shape[2] // height, images.shape[3] // width
        x = images.reshape(images.shape[0], self.in_chans, rows, height, columns, width)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(images.shape[0], rows * columns, height * width * self.in_chans)

    def unpatchify(self, patches: torch.Tensor) -> torch.Tensor:
        """Put patches together: (N, L, p_h * p_w * C) -> (N, C, H, W), the inverse of `patchify`."""
        (rows, columns), (height, width) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = patches.reshape(patches.shape[0], rows, columns, height, width, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], self.in_chans, rows * height, columns * width)

    def embed_patches(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images (N, C, H, W) -> (N, L, D), in the weights' fp32 because masks are made of them; no positions."""
        images = images.to(self.patch_embed.proj.weight.dtype)
        with full_fp32(images.device.type):
            if images.device.type == "cpu":
                return self.patch_embed(images)
            # cuDNN's convolution in true fp32 took 8% of a training step: the same sums as a matrix product.
            return F.linear(self.patchify(images), self._patch_weight(), self.patch_embed.proj.bias)

    def _patch_weight(self) -> torch.Tensor:
        """Return the patch embedding's weight (D, p_h * p_w * C), ordered as by `patchify`."""
        return self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed normalised images (N, C, H, W) -> tokens (N, L, D) in fp32, what masks are made of."""
        raise NotImplementedError

    def encode(self, tokens: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """Run tokens (N, L, D) from `embed` through the encoder -> (N, L + 1, D), the class token first."""
        raise NotImplementedError

    def class_attention(self, images: torch.Tensor) -> torch.Tensor:
        """Compute how the class token attends to the patches in the last block, no patch removed. No gradient.

        Args:
            images: (N, C, H, W), normalised.

        Returns:
            (N, heads, L) fp32, after the softmax; the class token's attention to itself is left out.
        """
        raise NotImplementedError

    def predict_pixels(self, tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Predict all patches of tokens (N, L, D), of which `mask` removes some: (N, L, P), as by `patchify`."""
        raise NotImplementedError

    def with_class_token(self, kept: torch.Tensor, mask: Mask, cls_token: torch.Tensor) -> torch.Tensor:
        """Put the class token (1, 1, D) before the kept tokens (T, D) of each image.

        Returns:
            (N, K + 1, D) where all images keep K; else packed image by image (sum(num_keep + 1), D).
        """
        places, num_images = mask.kept, len(mask.num_keep)
        first = cls_token.expand(num_images, -1, -1).flatten(0, 1).to(kept.dtype)  # (N, D)
        x = kept.new_empty(len(places.slots), kept.shape[-1])  # (T + N, D)
        x = x.index_copy_(0, places.rows, kept).index_copy_(0, places.class_rows, first)
        return x if places.layout is not None else x.view(num_images, -1, x.shape[-1])

    def check_images(self, images: torch.Tensor) -> None:
        """Raise ValueError unless `images` are normalised (N, C, H, W) of this model's sizes."""
        wanted = (self.in_chans, *self.patch_embed.img_size)  # other sizes may give as many patches by chance
        if tuple(images.shape[1:]) != wanted or not images.is_floating_point():
            taken = ", ".join(["N", *map(str, wanted)])
            raise ValueError(
                f"images are {tuple(images.shape)} of {images.dtype}; the model takes ({taken}) in floats, normalised"
            )

    def _blank_tokens(self, number: int) -> torch.Tensor:
        """Return tokens (number, L, D) for a strategy that reads only their shape."""
        return self.cls_token.expand(number, self.num_patches, -1)

    @torch.no_grad()
    def choose_mask(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        strategy: Callable[..., Mask] | None = None,
        **offered,
    ) -> Mask:
        """Ask a strategy which patches of `images` (N, C, H, W) to remove: no gradient, no autocast.

        Args:
            images: normalised.
            noise: (N, L) in [0, 1), replaces the strategy's own draw.
            strategy: asked in place of the model's own.
            offered: what a strategy may need besides grid and patch size, see `masking.NEEDS`.
        """
        self.check_images(images)
        with no_autocast(images.device.type):
            strategy = strategy or self.masking
            reads = masking.reads_tokens(strategy)
            tokens = self.embed(images) if reads else self._blank_tokens(len(images))
            sizes = {"grid": self.patch_embed.grid_size, "patch_size": self.patch_embed.patch_size}
            return masking.call(strategy, tokens, noise, **sizes, **offered)


class SeveralTokens:
    """Lets a classifier of timm's, with the class token, classify more than the last block's class token.

    Attributes:
        last_blocks: so many of the last blocks give their class token, after the final norm; they are concatenated.
        append_mean: whether the mean of the last block's patch tokens is appended.
    """

    last_blocks, append_mean = 1, False

    def classify_tokens(self, last_blocks: int, append_mean: bool) -> int:
        """Classify these from now on; return their width. ValueError: there are not so many blocks."""
        if not 1 <= last_blocks <= len(self.blocks):
            raise ValueError(
                f"--last_blocks {last_blocks}: the model has {len(self.blocks)} blocks; choose 1 to {len(self.blocks)}"
            )
        self.last_blocks, self.append_mean = last_blocks, append_mean
        return self.embed_dim * (last_blocks + append_mean)

    def forward(self, x: torch.Tensor, **options) -> torch.Tensor:
        """Classify images (N, C, H, W) -> (N, classes)."""
        if self.last_blocks == 1 and not self.append_mean:
            return super().forward(x, **options)
        form = {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
        outputs = self.forward_intermediates(x, indices=self.last_blocks, **form)  # patch tokens, class token
        tokens = [first[:, 0] for _, first in outputs] + [outputs[-1][0].mean(dim=1)] * self.append_mean
        return self.head(torch.cat(tokens, dim=-1))


class DrawnDepth:
    """A part of timm's blocks whose stochastic depth is drawn outside of them.

    With its own rate in it, each block would need a compiled graph of its own, and torch gives up after eight.
    """

    def draw(self, x: torch.Tensor) -> torch.Tensor:
        """Draw what the two branches are multiplied by, for each image of x (N, L + 1, D): (2, N, 1, 1)."""
        ones = x.new_ones(x.shape[0], 1, 1)
        return torch.stack([self.drop_path1(ones), self.drop_path2(ones)])


def keep_blocks(model: nn.Module, number: int | None) -> None:
    """Cut an encoder or classifier, also timm's, down to its first blocks; `number` None leaves it as it is.

    The final norm, and a classifier's of the mean, were learned for the output of the last block. After fewer blocks
    they start anew, with scale 1 and shift 0.

    Raises:
        ValueError: the model has fewer blocks.
    """
    if number is None or number == len(model.blocks):
        return
    depth = len(model.blocks)
    if not 0 < number < depth:
        raise ValueError(f"--probe_blocks {number}: the model has {depth} blocks; choose 1 to {depth}")
    model.blocks = model.blocks[:number]
    for norm in (model.norm, getattr(model, "fc_norm", None)):
        if isinstance(norm, nn.LayerNorm):
            norm.reset_parameters()


def check_sizes(img_size: int | tuple[int, int], patch_size: int | tuple[int, int], in_chans: int) -> None:
    """Raise ValueError unless the image is a whole number of patches, and has channels."""
    for side, length, step in zip(("height", "width"), to_2tuple(img_size), to_2tuple(patch_size), strict=True):
        if step < 1 or length < step or length % step:
            raise ValueError(f"input_size: the {side} of {length} pixels is not a whole number of patches of {step}")
    if in_chans < 1:
        raise ValueError(f"in_chans is {in_chans}; an image has at least one channel")
