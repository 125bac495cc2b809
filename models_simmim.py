"""SimMIM's ViT (Xie et al., 2022): a mask token replaces removed patches, and one layer predicts their pixels."""

from __future__ import annotations

import torch
from timm.layers import resize_rel_pos_bias_table, to_2tuple
from timm.models.beit import Attention, Beit, Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from masking import Mask, RandomMasking
from models_base import DrawnDepth, MaskedModel, SeveralTokens, check_sizes
from models_mae import layer_norm, register_model
from util.attention import beit_weights_of_first


class DrawnDepthBlock(DrawnDepth, Block):
    """timm's BEiT block with stochastic depth that is drawn outside of it."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor) -> torch.Tensor:
        """Transform x (N, L + 1, D) with the position bias and what `draw` gave."""
        x = x + kept[0] * (self.gamma_1 * self.attn(self.norm1(x), shared_rel_pos_bias=bias))
        return x + kept[1] * (self.gamma_2 * self.mlp(self.norm2(x)))


class SimMIMViT(MaskedModel, Beit):
    """timm's BEiT with one relative position bias for all blocks, a mask token, and a linear decoder.

    The tensors have the names of the authors' code without their prefix `encoder.`.

    Args:
        img_size, patch_size: pixels, one number or (height, width).
        in_chans: channels of the images.
        embed_dim, depth, num_heads, mlp_ratio: of the encoder.
        init_values: layer scale at the beginning, above 0.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        norm_pix_loss: must be False: targets are the pixels themselves.
        norm_layer: called with a width.
        masking: strategy; random masking of 60% by default.

    Raises:
        ValueError: the image is not a whole number of patches, or `norm_pix_loss`.
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
        init_values: float = 0.1,
        drop_path_rate: float = 0.1,
        norm_pix_loss: bool = False,
        norm_layer=layer_norm,
        masking=None,
    ):
        if norm_pix_loss:
            raise ValueError("norm_pix_loss: SimMIM predicts the pixels themselves; leave it out")
        check_sizes(img_size, patch_size, in_chans)
        Beit.__init__(
            self,
            img_size=to_2tuple(img_size),
            patch_size=to_2tuple(patch_size),
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            init_values=init_values,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
        )
        for block in self.blocks:
            block.__class__ = DrawnDepthBlock
        self.in_chans = in_chans
        self.set_masking(masking if masking is not None else RandomMasking(0.6))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        height, width = self.patch_embed.patch_size
        self.decoder = nn.Sequential(nn.Conv2d(embed_dim, height * width * in_chans, 1))
        self._run_block = _block
        self.initialise()

    def initialise(self) -> None:
        """Initialise as the authors do: normal, truncated at one deviation; the last layer of each branch smaller."""
        weights = [m.weight for m in self.blocks.modules() if isinstance(m, nn.Linear)]
        for weight in (*weights, self.patch_embed.proj.weight, self.cls_token, self.mask_token):
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for number, block in enumerate(self.blocks, 1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.data.div_((2 * number) ** 0.5)

    def compile_blocks(self, **options) -> None:
        """Compile the transformer blocks; `options` go to `torch.compile`."""
        self._run_block = torch.compile(_block, dynamic=False, fullgraph=True, **options)

    def take_form_of(self, state: dict[str, torch.Tensor]) -> None:
        """Become the encoder of a classifier, which has a position bias in each block, in place of one for all."""
        super().take_form_of(state)
        if "blocks.0.attn.relative_position_bias_table" in state:
            self.rel_pos_bias = None
            sizes = {"dim": self.embed_dim, "num_heads": self.blocks[0].attn.num_heads}
            for block in self.blocks:
                block.attn = Attention(**sizes, qkv_bias=True, window_size=self.patch_embed.grid_size)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed (N, C, H, W) -> tokens (N, L, D) in fp32; they hold no position, which is in attention only."""
        return self.embed_patches(images)

    def encode(self, tokens: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """Encode tokens (N, L, D), those that `mask` removes replaced -> (N, L + 1, D), the class token first."""
        if mask is not None:
            tokens = torch.where(mask.mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        return self.norm(self._run(self.blocks, tokens, self._position_bias()))

    @torch.no_grad()
    def class_attention(self, images: torch.Tensor) -> torch.Tensor:
        """Compute how the class token attends to the patches of whole images: (N, C, H, W) -> (N, heads, L).

        No loss is of the class token, so that what it asks for in the last block is not learned.
        """
        last, bias = self.blocks[-1], self._position_bias()
        x = self._run(self.blocks[:-1], self.embed(images), bias)
        return beit_weights_of_first(last.attn, last.norm1(x), bias)[..., 1:]

    def _position_bias(self) -> torch.Tensor | None:
        """Return the position bias that all blocks share, (heads, L + 1, L + 1), if they do."""
        return self.rel_pos_bias() if self.rel_pos_bias is not None else None

    def _run(self, blocks: nn.ModuleList, tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Run the class token and tokens (N, L, D) through blocks -> (N, L + 1, D), before the norm."""
        x = torch.cat([self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
        for block in blocks:
            kept = block.draw(x)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._run_block, block, x, bias, kept, use_reentrant=False)
            else:
                x = self._run_block(block, x, bias, kept)
        return x

    def forward_decoder(self, latent: torch.Tensor, mask: Mask | None = None) -> torch.Tensor:
        """Predict the pixels of all patches: (N, L + 1, D) -> (N, L, P), in the order of `patchify`."""
        image = latent[:, 1:].transpose(1, 2).unflatten(2, self.patch_embed.grid_size)  # (N, D, rows, columns)
        pixels = self.decoder(image).flatten(2).transpose(1, 2)  # (N, L, C * p_h * p_w), the channel slowest
        return pixels.unflatten(2, (self.in_chans, -1)).transpose(2, 3).flatten(2)

    def predict_pixels(self, tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Predict all patches of tokens (N, L, D), those that `mask` removes replaced: (N, L, P)."""
        return self.forward_decoder(self.encode(tokens, mask))

    def forward(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Mask, encode, decode.

        Args:
            images: (N, C, H, W), normalised.
            noise: (N, L) in [0, 1), replaces the strategy's own draw.

        Returns:
            loss (0-dim), pred (N, L, P), mask (N, L) bool, True = removed.
        """
        mask = self.choose_mask(images, noise)
        pred = self.forward_decoder(self.encode(self.embed(images), mask), mask)
        return self.absolute_errors(images, pred, mask).sum() / mask.loss_weight.sum(), pred, mask.mask

    def absolute_errors(self, images: torch.Tensor, pred: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Return the mean absolute error of each patch (N, L), 0 unless it is predicted."""
        return (pred.float() - self.patchify(images)).abs().mean(dim=-1) * mask.loss_weight


class SimMIMClassifier(SeveralTokens, Beit):
    """The fine-tuning model: a relative position bias for each block; the mean of the patch tokens is classified.

    Args:
        options: of timm's `Beit`.
    """

    def __init__(self, **options):
        super().__init__(
            init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True, norm_layer=layer_norm, **options
        )

    def no_weight_decay(self) -> set[str]:
        """Return what is not decayed besides 1-D tensors and biases; the position biases are."""
        return {"cls_token"}

    def adapt(self, state: dict[str, torch.Tensor], old_grid: tuple[int, int] | None) -> dict[str, torch.Tensor]:
        """Give each block the shared position bias of a pre-trained model, resized to this model's grid."""
        shared = state.get("rel_pos_bias.relative_position_bias_table")
        names = [name for name in self.state_dict() if name.endswith("relative_position_bias_table")]
        tables = {
            name: shared if shared is not None else state[name] for name in names if shared is not None or name in state
        }
        state = {name: tensor for name, tensor in state.items() if not name.startswith("rel_pos_bias.")}
        new = self.patch_embed.grid_size
        return state | {name: _resize(table, new, old_grid or new) for name, table in tables.items()}


def _resize(table: torch.Tensor, grid: tuple[int, int], old_grid: tuple[int, int]) -> torch.Tensor:
    if tuple(grid) == tuple(old_grid):
        return table
    shape = ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, table.shape[1])
    told = {} if old_grid[0] == old_grid[1] else {"old_window_size": old_grid}  # timm takes square ones for granted
    return resize_rel_pos_bias_table(table, grid, shape, **told)


def _block(block: nn.Module, x: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor) -> torch.Tensor:
    return block(x, bias, kept)


@register_model
def simmim_vit_base_patch16(**options) -> SimMIMViT:
    """Build ViT-B/16: 12 blocks of 768."""
    return SimMIMViT(**options)


@register_model
def simmim_vit_mini_patch4(**options) -> SimMIMViT:
    """Build a ViT for 16-pixel images: 4 blocks of 96, patches of 4."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    return SimMIMViT(**(sizes | options))
