"""iBOT's ViT (Zhou et al., 2022): a plain encoder with a learned position table, for views of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, to_2tuple
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from masking import Mask, RandomMasking
from models_base import DrawnDepth, MaskedModel, check_sizes
from models_mae import layer_norm, register_model
from util.packing import PackedAttention
from util.pos_embed import resize_for_views
from util.precision import full_fp32


class DrawnDepthBlock(DrawnDepth, Block):
    """timm's block, without layer scale, with stochastic depth that is drawn outside of it."""

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Transform x (N, L + 1, D) with what `draw` gave; None keeps both branches of all images."""
        if kept is None:
            return super().forward(x)
        x = x + kept[0] * self.attn(self.norm1(x))
        return x + kept[1] * self.mlp(self.norm2(x))


class IBOTViT(MaskedModel):
    """A ViT encoder. Its tensors have timm's names; it has no decoder.

    Args:
        img_size, patch_size: pixels, one number or (height, width).
        in_chans: channels of the images.
        embed_dim, depth, num_heads, mlp_ratio: of the encoder.
        norm_pix_loss: must be False: no pixels are predicted.
        norm_layer: called with a width.
        masking: strategy; random masking by default.

    Raises:
        ValueError: the image is not a whole number of patches, the width does not fit the heads, or `norm_pix_loss`.
    """

    has_decoder = False
    trains_class_token = True
    has_mask_ratio = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        norm_layer=layer_norm,
        masking=None,
    ):
        super().__init__()
        if norm_pix_loss:
            raise ValueError("norm_pix_loss: iBOT predicts no pixels; leave it out")
        check_sizes(img_size, patch_size, in_chans)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.in_chans = in_chans
        self.set_masking(masking if masking is not None else RandomMasking())
        self._run_block = _block
        self.patch_embed = PatchEmbed(to_2tuple(img_size), to_2tuple(patch_size), in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim))
        options = {"mlp_ratio": mlp_ratio, "qkv_bias": True, "norm_layer": norm_layer, "attn_layer": PackedAttention}
        self.blocks = nn.ModuleList([DrawnDepthBlock(embed_dim, num_heads, **options) for _ in range(depth)])
        self._drops = False
        self.norm = norm_layer(embed_dim)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def set_drop_path(self, rate: float) -> None:
        """Drop branches at random while training: at `rate` in the last block, rising linearly from 0."""
        self._drops = rate > 0
        for number, block in enumerate(self.blocks):
            share = rate * number / max(len(self.blocks) - 1, 1)
            block.drop_path1, block.drop_path2 = (DropPath(share) if share else nn.Identity() for _ in range(2))

    def compile_blocks(self, **options) -> None:
        """Compile the transformer blocks; `options` go to `torch.compile`.

        Views of two sizes, a teacher, and smaller batches at the end of an epoch would be more shapes than the eight
        graphs that torch allows, so all but the first share one of any size.
        """
        self._run_block = torch.compile(_block, fullgraph=True, **options)

    def positions(self, images: torch.Tensor) -> torch.Tensor:
        """Return the position table (1, 1 + L, D) for images of this size."""
        sides = zip(images.shape[2:], self.patch_embed.patch_size, strict=True)
        return resize_for_views(self.pos_embed, self.patch_embed.grid_size, tuple(side // step for side, step in sides))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed (N, C, H, W) of any size -> tokens (N, L, D): patches and positions, in fp32."""
        with full_fp32(images.device.type):
            return self.embed_view(images.float())

    def embed_view(self, images: torch.Tensor) -> torch.Tensor:
        """Embed as `embed`, in the format of autocast: for training, where no masks are made of the tokens."""
        patches = F.linear(self.patchify(images), self._patch_weight(), self.patch_embed.proj.bias)
        return patches + self.positions(images)[:, 1:]

    def encode(self, tokens: torch.Tensor, mask: Mask | None = None) -> torch.Tensor:
        """Encode tokens (N, L, D) from `embed` -> (N, L + 1, D), the class token first.

        Under this model's method tokens are replaced before. With a `mask`, the kept tokens alone are encoded, the same
        number in each image: (N, K + 1, D).
        """
        return self._encode(tokens, mask)[0]

    def encode_attending(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode all tokens, and return how the class token attends to the patches in the last block, too.

        Returns:
            (N, L + 1, D), and (N, heads, L) fp32 after the softmax, the class token's attention to itself left out.
        """
        latent, before = self._encode(tokens, None)
        last = self.blocks[-1]
        return latent, last.attn.weights_of_first(last.norm1(before))[..., 1:]

    @torch.no_grad()
    def class_attention(self, images: torch.Tensor) -> torch.Tensor:
        """Compute how the class token attends to the patches of whole images: (N, C, H, W) -> (N, heads, L)."""
        return self.encode_attending(self.embed(images))[1]

    def _encode(self, tokens: torch.Tensor, mask: Mask | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoder's output, and the input of its last block."""
        if mask is not None:
            tokens = tokens.flatten(0, 1)[mask.kept.patches].view(len(tokens), -1, tokens.shape[-1])
        cls_token = (self.cls_token + self.pos_embed[:, :1]).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        x = before = torch.cat([cls_token, tokens], dim=1)
        for block in self.blocks:
            before, kept = x, block.draw(x) if self._drops else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._run_block, block, x, kept, use_reentrant=False)
            else:
                x = self._run_block(block, x, kept)
        return self.norm(x), before


def _block(block: nn.Module, x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    return block(x, kept)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as DINO and iBOT do: normal of deviation 0.02, bias 0. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@register_model
def ibot_vit_small_patch16(**options) -> IBOTViT:
    """Build ViT-S/16: 12 blocks of 384."""
    return IBOTViT(**options)


@register_model
def ibot_vit_base_patch16(**options) -> IBOTViT:
    """Build ViT-B/16: 12 blocks of 768."""
    return IBOTViT(**({"embed_dim": 768, "num_heads": 12} | options))


@register_model
def ibot_vit_large_patch16(**options) -> IBOTViT:
    """Build ViT-L/16: 24 blocks of 1024."""
    return IBOTViT(**({"embed_dim": 1024, "depth": 24, "num_heads": 16} | options))


@register_model
def ibot_vit_mini_patch4(**options) -> IBOTViT:
    """Build a ViT for 16-pixel images: 4 blocks of 96, patches of 4."""
    return IBOTViT(**({"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3} | options))
