"""BootMAE's ViT (Dong et al., 2022): an encoder over the kept patches, and two decoders that attend to its features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed, to_2tuple
from timm.models import beit
from torch import nn
from torch.utils.checkpoint import checkpoint

from masking import Mask, RandomMasking
from models_base import MaskedModel, SeveralTokens, check_sizes
from models_mae import layer_norm, register_model
from util.attention import beit_weights_of_first
from util.packing import PackedLayout, packed_attention, packed_cross_attention
from util.pos_embed import sincos_2d


class SplitBiasAttention(beit.Attention):
    """timm's BEiT attention, with biases of queries and values only, for any head width and for packed batches."""

    def forward(self, x: torch.Tensor, shared_rel_pos_bias: PackedLayout | None = None) -> torch.Tensor:
        """Attend: (N, K, D) -> (N, K, D), or with a layout in place of a position bias (T, D) -> (T, D)."""
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        if shared_rel_pos_bias is not None:
            return self.proj(packed_attention(qkv, shared_rel_pos_bias).flatten(1))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens to the features of the encoder.

    Args:
        dim, memory_dim: widths of the queries and of the memory.
        num_heads: heads, each of floor(dim / num_heads).
    """

    def __init__(self, dim: int, memory_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        width = dim // num_heads * num_heads
        self.q, self.kv = nn.Linear(dim, width, bias=False), nn.Linear(memory_dim, 2 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, dim)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, layout: PackedLayout | None) -> torch.Tensor:
        """Attend from x (N, Q, dim) to memory (N, M, memory_dim), or packed (T, memory_dim) with its layout."""
        query = F.linear(x, self.q.weight, self.q_bias).unflatten(-1, (self.num_heads, -1))  # (N, Q, H, d)
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        key_value = F.linear(memory, self.kv.weight, bias).unflatten(-1, (2, self.num_heads, -1))
        if layout is not None:
            return self.proj(packed_cross_attention(query, key_value, layout).flatten(2))
        key, value = key_value.permute(2, 0, 3, 1, 4)  # (N, H, M, d) each
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to the encoder's features, MLP; all residual."""

    def __init__(
        self, dim: int, memory_dim: int, num_heads: int, mlp_ratio: float, norm_layer: Callable[[int], nn.Module]
    ):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = norm_layer(dim), norm_layer(dim), norm_layer(dim)
        self.norm4 = norm_layer(memory_dim)
        self.attn = SplitBiasAttention(dim, num_heads, qkv_bias=True, attn_head_dim=dim // num_heads)
        self.c_attn = CrossAttention(dim, memory_dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, memory: torch.Tensor, layout: PackedLayout | None) -> torch.Tensor:
        """x (N, L + 1, dim), memory as for `CrossAttention` -> (N, L + 1, dim)."""
        x = x + self.attn(self.norm1(x))
        x = x + self.c_attn(self.norm3(x), self.norm4(memory), layout)
        return x + self.mlp(self.norm2(x))


class PixelHead(nn.Module):
    """A transposed convolution from tokens to the pixels of their patches."""

    def __init__(self, dim: int, in_chans: int, patch_size: tuple[int, int]):
        super().__init__()
        self.proj = nn.ConvTranspose2d(dim, in_chans, patch_size, patch_size)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(N, dim, rows, columns) -> (N, C, H, W)."""
        return self.proj(image)


class BootMAEViT(MaskedModel):
    """A regressor predicts pixels from the encoder's first features, a predictor a teacher's features from its last.

    The tensors have the names of the authors' code.

    Args:
        img_size, patch_size: pixels, one number or (height, width).
        in_chans: channels of the images.
        embed_dim, depth, num_heads, mlp_ratio: of the encoder; the decoders have its heads and mlp_ratio.
        decode_dim: width of the regressor; the predictor has the encoder's.
        decoder_depth: blocks of each decoder.
        norm_pix_loss: predict patches of which each channel is normalised by itself.
        norm_layer: called with a width.
        masking: strategy; random masking of 75% by default.

    Raises:
        ValueError: the image is not a whole number of patches.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        decode_dim: int = 512,
        decoder_depth: int = 2,
        norm_pix_loss: bool = False,
        norm_layer: Callable[[int], nn.Module] = layer_norm,
        masking: Callable[..., Mask] | None = None,
    ):
        super().__init__()
        check_sizes(img_size, patch_size, in_chans)
        self.in_chans, self.norm_pix_loss = in_chans, norm_pix_loss
        self.set_masking(masking if masking is not None else RandomMasking())
        self._block, self._decoder_block = _block, _decoder_block
        self.patch_embed = PatchEmbed(to_2tuple(img_size), to_2tuple(patch_size), in_chans, embed_dim)
        grid = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(row_first(sincos_2d(embed_dim, grid)), requires_grad=False)
        self.blocks = nn.ModuleList(
            [
                beit.Block(embed_dim, num_heads, qkv_bias=True, mlp_ratio=mlp_ratio, norm_layer=norm_layer)
                for _ in range(depth)
            ]
        )
        for block in self.blocks:
            block.attn.__class__ = SplitBiasAttention
        self.norm = norm_layer(embed_dim)

        def decoder(dim: int) -> nn.ModuleList:
            return nn.ModuleList(
                [DecoderBlock(dim, embed_dim, num_heads, mlp_ratio, norm_layer) for _ in range(decoder_depth)]
            )

        self.mask_token = nn.Parameter(torch.zeros(1, 1, decode_dim))
        self.de_pos_embed = nn.Parameter(row_first(sincos_2d(decode_dim, grid)), requires_grad=False)
        self.down, self.decode_blocks = nn.Linear(embed_dim, decode_dim), decoder(decode_dim)
        self.decode_norm = norm_layer(decode_dim)
        self.lm_head = PixelHead(decode_dim, in_chans, self.patch_embed.patch_size)
        self.mask_token_1 = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.down_1, self.decode_blocks_1 = nn.Linear(embed_dim, embed_dim), decoder(embed_dim)
        self.decode_norm_1, self.lm_head_1 = norm_layer(embed_dim), nn.Linear(embed_dim, embed_dim)
        self.initialise()

    def initialise(self) -> None:
        """Initialise as the authors do: Xavier-uniform, self-attention as three matrices; the pixel head as torch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SplitBiasAttention):
                rows, columns = module.qkv.weight.shape
                bound = (6 / (rows // 3 + columns)) ** 0.5
                nn.init.uniform_(module.qkv.weight, -bound, bound)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.patch_embed.proj.out_channels, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        for token in (self.mask_token, self.mask_token_1):
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)

    def compile_blocks(self, **options) -> None:
        """Compile the transformer blocks; `options` go to `torch.compile`."""
        self._block = torch.compile(_block, dynamic=True, fullgraph=True, **options)
        self._decoder_block = torch.compile(_decoder_block, dynamic=True, fullgraph=True, **options)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed (N, C, H, W) -> tokens (N, L, D): patches and positions, in fp32 because masks are made of them."""
        return self.embed_patches(images) + self.pos_embed[:, 1:]

    def encode(self, tokens: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """Encode all tokens (N, L, D), or the kept ones, after the final norm; shapes as from `encode_features`."""
        return self.norm(self.encode_features(tokens, mask)[1])

    def encode_features(self, tokens: torch.Tensor, mask: Mask | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of the first and of the last block, before the final norm.

        Returns:
            (N, K + 1, D) each, the class token first, where all images keep K; else packed image by image.
        """
        cls_token, layout = self.cls_token + self.pos_embed[:, :1], None if mask is None else mask.kept.layout
        if mask is None:
            x = torch.cat([cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        else:
            x = self.with_class_token(tokens.flatten(0, 1)[mask.kept.patches], mask, cls_token)
        first = None
        for block in self.blocks:
            x = self._call(self._block, block, x, layout)
            first = x if first is None else first
        return first, x

    @torch.no_grad()
    def class_attention(self, images: torch.Tensor) -> torch.Tensor:
        """Compute how the class token attends to the patches of whole images: (N, C, H, W) -> (N, heads, L)."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(images.shape[0], -1, -1)
        x, last = torch.cat([cls_token, self.embed(images)], dim=1), self.blocks[-1]
        for block in self.blocks[:-1]:
            x = self._call(self._block, block, x, None)
        return beit_weights_of_first(last.attn, last.norm1(x))[..., 1:]

    def _call(self, function: Callable, *arguments) -> torch.Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def regress(self, latent: torch.Tensor, first: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Predict pixels (N, L, P), in the order of `patchify`, out of the encoder's output and first features."""
        x = self.decoder_input(self.down(latent), self.mask_token, self.de_pos_embed, mask)
        x = self.decode_norm(self._decode(self.decode_blocks, x, first, mask))[:, 1:]
        image = x.transpose(1, 2).unflatten(2, self.patch_embed.grid_size)
        return self.patchify(self.lm_head(image))

    def predict_features(self, latent: torch.Tensor, last: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Predict the teacher's features (N, L, D) out of the encoder's output and last features."""
        x = self.decoder_input(self.down_1(latent), self.mask_token_1, self.pos_embed, mask)
        return self.lm_head_1(self.decode_norm_1(self._decode(self.decode_blocks_1, x, last, mask))[:, 1:])

    def decoder_input(
        self, encoded: torch.Tensor, mask_token: torch.Tensor, positions: torch.Tensor, mask: Mask
    ) -> torch.Tensor:
        """Put encoded tokens, which get no position again, between mask tokens with positions: (N, L + 1, width)."""
        num_images, num_tokens = mask.mask.shape
        x = (mask_token + positions).expand(num_images, -1, -1).flatten(0, 1)  # fp32, as every residual stream here
        encoded = encoded.flatten(0, -2).to(x.dtype)
        return x.index_copy(0, mask.kept.slots, encoded).view(num_images, num_tokens + 1, -1)

    def _decode(self, blocks: nn.ModuleList, x: torch.Tensor, memory: torch.Tensor, mask: Mask) -> torch.Tensor:
        for block in blocks:
            x = self._call(self._decoder_block, block, x, memory, mask.kept.layout)
        return x

    def predict_pixels(self, tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Predict all patches of tokens (N, L, D), of which `mask` removes some: (N, L, P)."""
        first, last = self.encode_features(tokens, mask)
        return self.regress(self.norm(last), first, mask)

    def pixel_target(self, images: torch.Tensor) -> torch.Tensor:
        """Return the target (N, L, P); with `norm_pix_loss` each channel of a patch has mean 0 and deviation 1."""
        patches = self.patchify(images.float())
        if not self.norm_pix_loss:
            return patches
        channels = patches.unflatten(2, (-1, self.in_chans))  # (N, L, pixels, C)
        variance, mean = torch.var_mean(channels, dim=2, keepdim=True, correction=0)
        return ((channels - mean) / (variance + 1e-5).sqrt()).flatten(2)


class BootMAEClassifier(SeveralTokens, beit.Beit):
    """The fine-tuning model: the position table stays as it is; the mean of the patch tokens is classified.

    Args:
        options: of timm's `Beit`.
    """

    def __init__(self, **options):
        super().__init__(init_values=None, use_abs_pos_emb=True, norm_layer=layer_norm, **options)
        self.pos_embed.requires_grad = False
        table = row_first(sincos_2d(options["embed_dim"], self.patch_embed.grid_size))
        self.pos_embed.data = table.to(self.pos_embed.device)

    def no_weight_decay(self) -> set[str]:
        """Return what is not decayed besides 1-D tensors and biases."""
        return {"cls_token", "pos_embed"}


def _block(block: nn.Module, x: torch.Tensor, layout: PackedLayout | None) -> torch.Tensor:
    return block(x, shared_rel_pos_bias=layout)


def _decoder_block(
    block: nn.Module, x: torch.Tensor, memory: torch.Tensor, layout: PackedLayout | None
) -> torch.Tensor:
    return block(x, memory, layout)


def row_first(table: torch.Tensor) -> torch.Tensor:
    """Swap the halves of MAE's position table: here the first one encodes the row."""
    return torch.cat(table.chunk(2, dim=-1)[::-1], dim=-1)


@register_model
def bootmae_vit_base_patch16(**options) -> BootMAEViT:
    """Build ViT-B/16: 12 blocks of 768; decoders of 2 blocks of 512 and 768."""
    return BootMAEViT(**options)


@register_model
def bootmae_vit_large_patch16(**options) -> BootMAEViT:
    """Build ViT-L/16: 24 blocks of 1024; decoders of 2 blocks of 512 and 1024."""
    return BootMAEViT(**{"embed_dim": 1024, "depth": 24, "num_heads": 16, **options})


@register_model
def bootmae_vit_mini_patch4(**options) -> BootMAEViT:
    """Build a ViT for 16-pixel images: 4 blocks of 96, patches of 4; decoders of 1 block of 48 and 96."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    return BootMAEViT(**(sizes | {"decode_dim": 48, "decoder_depth": 1} | options))
