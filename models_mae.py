"""The masked autoencoder (He et al., 2022) with a pluggable masking strategy. It is handed one, it knows none."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, to_2tuple
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from masking import Mask, RandomMasking
from models_base import MaskedModel, check_sizes
from util.packing import PackedAttention, PackedLayout
from util.pixel_loss import masked_mean_squared_error, squared_errors
from util.pos_embed import sincos_2d
from util.suggest import check_known

layer_norm = partial(nn.LayerNorm, eps=1e-6)

_MODELS: dict[str, Callable[..., MaskedAutoencoderViT]] = {}
# MAE's, which say that the decoder has 8 blocks of 512.
_FULL_NAMES = {
    f"{name}_dec512d8b": name for name in ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
}


class MaskedAutoencoderViT(MaskedModel):
    """ViT encoder over the kept patches, light ViT decoder over all, loss on the removed ones.

    Args:
        img_size, patch_size: pixels, one number or (height, width).
        in_chans: channels of the images.
        embed_dim, depth, num_heads: encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: decoder.
        mlp_ratio: hidden width of the MLPs over their input's.
        norm_layer: normalisation layer, called with a width.
        norm_pix_loss: predict patches normalised by their own mean and deviation.
        masking: strategy `(tokens, noise=None) -> masking.Mask`; random masking of 75% by default.

    Raises:
        ValueError: the image is not a whole number of patches, or a width does not fit its heads.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = layer_norm,
        norm_pix_loss: bool = False,
        masking: Callable[..., Mask] | None = None,
    ):
        super().__init__()
        check_sizes(img_size, patch_size, in_chans)
        if norm_pix_loss and math.prod(to_2tuple(patch_size)) * in_chans == 1:
            raise ValueError("norm_pix_loss needs patches of at least two values; a single one has no deviation")
        _check_heads(embed_dim, num_heads, decoder_embed_dim, decoder_num_heads)
        self.in_chans, self.norm_pix_loss = in_chans, norm_pix_loss
        self.set_masking(masking if masking is not None else RandomMasking())
        self._whole_block, self._dense_block, self._packed_block = _whole_block, _dense_block, _packed_block
        self._loss = self._packed_loss = masked_mean_squared_error

        self.patch_embed = PatchEmbed(to_2tuple(img_size), to_2tuple(patch_size), in_chans, embed_dim)
        grid = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_2d(embed_dim, grid), requires_grad=False)
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer, attn_layer=PackedAttention)
        self.blocks = nn.ModuleList([block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = norm_layer(embed_dim)

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_2d(decoder_embed_dim, grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth)])
        self.decoder_norm = norm_layer(decoder_embed_dim)
        height, width = self.patch_embed.patch_size
        self.decoder_pred = nn.Linear(decoder_embed_dim, height * width * in_chans)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.patch_embed.proj.out_channels, -1))
        self.apply(init_linear)

    def compile_blocks(self, **options) -> None:
        """Compile the transformer blocks and the loss; `options` go to `torch.compile`.

        Masks are chosen outside of what is compiled: they do not depend on it. All tokens, and equal counts, get
        graphs of fixed shapes; packed batches one graph for any number of tokens. Where counts vary, so do equal ones:
        a micro-batch of one image has another count in each step.
        """
        dynamic = getattr(self.masking, "varies", False)
        self._whole_block = torch.compile(_whole_block, dynamic=False, fullgraph=True, **options)
        self._dense_block = torch.compile(_dense_block, dynamic=dynamic, fullgraph=True, **options)
        self._packed_block = torch.compile(_packed_block, dynamic=True, fullgraph=True, **options)
        self._loss = torch.compile(masked_mean_squared_error, dynamic=dynamic, fullgraph=True, **options)
        self._packed_loss = torch.compile(masked_mean_squared_error, dynamic=True, fullgraph=True, **options)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed (N, C, H, W) -> tokens (N, L, D): patches and positions, in fp32 because masks are made of them."""
        return self.embed_patches(images) + self.pos_embed[:, 1:]

    def encode(self, tokens: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """Run the class token and the kept tokens through the encoder.

        Args:
            tokens: (N, L, D) from `embed`.
            mask: what to keep; None keeps all.

        Returns:
            (N, K + 1, D), the class token first, where all images keep K; else packed image by image
            (sum(num_keep + 1), D), each image's class token first.
        """
        if mask is not None:
            return self._encode_kept(tokens.flatten(0, 1)[mask.kept.patches], mask)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)  # (N, 1, D)
        return self.norm(self._run(self.blocks, torch.cat([cls_token, tokens], dim=1)))

    @torch.no_grad()
    def class_attention(self, images: torch.Tensor) -> torch.Tensor:
        """Compute how the class token attends to the patches of whole images: (N, C, H, W) -> (N, heads, L)."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(images.shape[0], -1, -1)
        x = self._run(self.blocks[:-1], torch.cat([cls_token, self.embed(images)], dim=1))
        last = self.blocks[-1]
        return last.attn.weights_of_first(last.norm1(x))[..., 1:]

    def _encode_kept(self, tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
        """`encode` for the kept tokens (T, D) alone."""
        x = self.with_class_token(tokens, mask, self.cls_token + self.pos_embed[:, :1])
        return self.norm(self._run(self.blocks, x, mask.kept.layout))

    def _run(self, blocks: nn.ModuleList, x: torch.Tensor, layout: PackedLayout | None = None) -> torch.Tensor:
        if layout is not None:
            call = partial(self._packed_block, layout)
        else:
            call = self._whole_block if x.shape[1] > self.num_patches else self._dense_block
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(call, block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = call(block, x)
        return x

    def forward_encoder(self, images: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Embed the kept patches of images (N, C, H, W), and encode them -> latent as from `encode`."""
        return self._encode_kept(self._embed_kept(images, mask), mask)

    def _embed_kept(self, images: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Embed the kept patches -> tokens (T, D), as `embed` has them up to rounding."""
        place = mask.kept.patches
        weight, bias = self._patch_weight(), self.patch_embed.proj.bias
        pixels = self.patchify(images).flatten(0, 1)[place].to(weight.dtype)  # (T, p_h * p_w * C)
        tokens = F.linear(pixels, weight, bias)
        return tokens + self.pos_embed[0, 1:][place % self.num_patches]

    def forward_decoder(self, latent: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Decode latent from the encoder -> predicted patches (N, L, P), P = p_h * p_w * C.

        Where `mask` throws tokens, those do not pass through the decoder: (N, M, P) of the M others in raster order
        where all images have M, else packed image by image; `mask.decoded.patches` says which they are.
        """
        x = self.decoder_input(latent, mask)
        return self.run_decoder(self.decoder_blocks, self.decoder_norm, self.decoder_pred, x, mask)

    def decoder_input(self, latent: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Embed the latent, and put it between mask tokens, with positions.

        Returns:
            (N, M + 1, d), the class token first, then the M tokens that are not thrown (M = L if none is), in raster
            order; packed image by image where M differs.
        """
        (num_images, num_tokens), decoded = mask.mask.shape, mask.decoded
        encoded = self.decoder_embed(latent).flatten(0, -2)  # (T + N, d), packed image by image
        slots = mask.kept.slots if decoded is None else decoded.rows_of(mask.kept, num_tokens)
        num_rows = num_images * (num_tokens + 1) if decoded is None else len(decoded.slots)
        x = self.mask_token.to(encoded.dtype).expand(1, num_rows, -1).flatten(0, 1).index_copy(0, slots, encoded)
        if decoded is None:
            return x.view(num_images, num_tokens + 1, -1) + self.decoder_pos_embed
        x = x + self.decoder_pos_embed[0][decoded.slots % (num_tokens + 1)]
        return x.view(num_images, -1, x.shape[-1]) if decoded.layout is None else x

    def run_decoder(
        self, blocks: nn.ModuleList, norm: nn.Module, output: nn.Module, x: torch.Tensor, mask: Mask | None
    ) -> torch.Tensor:
        """Run a decoder on what `decoder_input` returns; return its outputs for the patches as `forward_decoder`."""
        decoded = None if mask is None else mask.decoded
        layout = None if decoded is None else decoded.layout
        x = norm(self._run(blocks, x, layout))
        return output(x)[:, 1:] if layout is None else output(x[decoded.rows])

    def predict_pixels(self, tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Predict all patches of tokens (N, L, D): (N, L, P), 0 for thrown ones."""
        return self.place_decoded(self.forward_decoder(self.encode(tokens, mask), mask), mask)

    def place_decoded(self, pred: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Put predictions from `forward_decoder` where they belong: (N, L, P), 0 for thrown patches."""
        if mask.decoded is None:
            return pred
        num_images, num_tokens = mask.mask.shape
        whole = pred.new_zeros(num_images * num_tokens, pred.shape[-1])
        return whole.index_copy(0, mask.decoded.patches, pred.flatten(0, -2)).view(num_images, num_tokens, -1)

    def forward_loss(self, images: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor | Mask) -> torch.Tensor:
        """Return the mean squared error over the predicted tokens of the batch, Eq. 2.

        Args:
            images: (N, C, H, W).
            pred: from `forward_decoder`.
            mask: (N, L), 1 = removed, or a `Mask`.
        """
        target, weight = self.patchify(images), mask
        if isinstance(mask, Mask):
            target, weight = _decoded(target, mask, pred), _decoded(mask.loss_weight, mask, pred)
        loss = self._loss if pred.ndim == 3 else self._packed_loss
        return loss(target, pred, weight, self.norm_pix_loss)

    def patch_losses(self, images: torch.Tensor, pred: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Return the mean squared error of each decoded patch, in the order of `pred`."""
        return squared_errors(_decoded(self.patchify(images), mask, pred), pred, self.norm_pix_loss)

    def forward_masked(self, images: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the kept patches of images (N, C, H, W), decode, compare the predicted ones.

        Returns:
            loss (0-dim), pred as from `forward_decoder`.
        """
        pred = self.forward_decoder(self.forward_encoder(images, mask), mask)
        return self.forward_loss(images, pred, mask), pred

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mask, encode, decode.

        Args:
            images: (N, C, H, W), normalised.
            noise: (N, L) in [0, 1), replaces the strategy's own draw.

        Returns:
            loss (0-dim), pred (N, L, p_h * p_w * C), mask (N, L) bool, True = removed.
        """
        mask = self.choose_mask(images, noise)
        loss, pred = self.forward_masked(images, mask)
        return loss, pred, mask.mask


# Functions of their own, because graphs are kept, and counted, for each function.
def _whole_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x)


def _dense_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x)


def _packed_block(layout: PackedLayout, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x, attn_mask=layout)


def _decoded(values: torch.Tensor, mask: Mask, pred: torch.Tensor) -> torch.Tensor:
    """Take from values (N, L, ...) those of the decoded patches, in the order of `pred`."""
    if mask.decoded is None:
        return values
    return values.flatten(0, 1)[mask.decoded.patches].view(*pred.shape[:-1], *values.shape[2:])


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as MAE does: Xavier-uniform, bias 0. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _check_heads(embed_dim: int, num_heads: int, decoder_embed_dim: int, decoder_num_heads: int) -> None:
    for name, width, heads in (("", embed_dim, num_heads), ("decoder_", decoder_embed_dim, decoder_num_heads)):
        if width % heads:
            raise ValueError(f"{name}embed_dim {width} is not divisible by {name}num_heads {heads}")


def register_model(constructor: Callable[..., MaskedAutoencoderViT]) -> Callable[..., MaskedAutoencoderViT]:
    """Make a constructor available as `--model <its name>`; a decorator."""
    _MODELS[constructor.__name__] = constructor
    return constructor


def available_models() -> list[str]:
    """Return the names for `--model`."""
    return sorted(_MODELS)


def create_model(name: str, **options) -> MaskedAutoencoderViT:
    """Build the registered model `name`; `options` go to `MaskedAutoencoderViT`. ValueError for an unknown name."""
    name = _FULL_NAMES.get(name, name)
    check_known("model", name, available_models())
    return _MODELS[name](**options)


@register_model
def mae_vit_base_patch16(**options) -> MaskedAutoencoderViT:
    """Build ViT-B/16: 12 blocks of 768; decoder of 8 blocks of 512."""
    return MaskedAutoencoderViT(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **options})


@register_model
def mae_vit_large_patch16(**options) -> MaskedAutoencoderViT:
    """Build ViT-L/16: 24 blocks of 1024; decoder of 8 blocks of 512."""
    return MaskedAutoencoderViT(**{"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **options})


@register_model
def mae_vit_huge_patch14(**options) -> MaskedAutoencoderViT:
    """Build ViT-H/14: 32 blocks of 1280; decoder of 8 blocks of 512."""
    return MaskedAutoencoderViT(**{"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **options})


def _small(embed_dim: int, depth: int, num_heads: int, decoder_embed_dim: int, decoder_depth: int) -> dict:
    return {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "decoder_embed_dim": decoder_embed_dim,
        "decoder_depth": decoder_depth,
        "decoder_num_heads": decoder_embed_dim // 32,
    }


@register_model
def mae_vit_small_patch16(**options) -> MaskedAutoencoderViT:
    """Build ViT-S/16: 12 blocks of 384; decoder of 4 blocks of 256."""
    return MaskedAutoencoderViT(**{"patch_size": 16, **_small(384, 12, 6, 256, 4), **options})


@register_model
def mae_vit_tiny_patch4(**options) -> MaskedAutoencoderViT:
    """Build a ViT for 32-pixel images: 12 blocks of 192, patches of 4; decoder of 4 blocks of 96."""
    return MaskedAutoencoderViT(**{"img_size": 32, "patch_size": 4, **_small(192, 12, 3, 96, 4), **options})


@register_model
def mae_vit_mini_patch4(**options) -> MaskedAutoencoderViT:
    """Build a ViT for 16-pixel images: 4 blocks of 96, patches of 4; decoder of 1 block of 64."""
    return MaskedAutoencoderViT(**{"img_size": 16, "patch_size": 4, **_small(96, 4, 3, 64, 1), **options})
