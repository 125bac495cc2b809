"""Sequences of different lengths end to end, without padding. Only attention knows where one ends.

A packed batch is (T, D) with T the sum of the lengths; linear layers, norms and MLPs run on it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed batch lie.

    Attributes:
        lengths: tokens of each sequence.
        groups: one (n, length) index into the packed tokens for every length that occurs.
        inverse: (T,) index that undoes the order of the groups.
    """

    lengths: tuple[int, ...]
    groups: tuple[torch.Tensor, ...]
    inverse: torch.Tensor

    @staticmethod
    def from_lengths(lengths: tuple[int, ...], device: torch.device) -> PackedLayout:
        """Layout of sequences of `lengths` tokens, in this order."""
        starts: dict[int, list[int]] = {}
        for length, end in zip(lengths, accumulate(lengths), strict=True):
            starts.setdefault(length, []).append(end - length)
        by_length = sorted(starts.items())
        index = [torch.tensor(first)[:, None] + torch.arange(length) for length, first in by_length]
        order = torch.cat([group.flatten() for group in index]).to(device)  # one transfer
        parts = order.split([group.numel() for group in index])
        groups = tuple(part.view(-1, length) for part, (length, _) in zip(parts, by_length, strict=True))
        return PackedLayout(tuple(lengths), groups, torch.argsort(order))


def packed_attention(qkv: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Self-attention within each sequence of a packed batch, by groups of equal length.

    Args:
        qkv: (T, 3, H, d) queries, keys and values of H heads.
        layout: where the sequences lie.

    Returns:
        (T, H, d).
    """
    outputs = []
    for index in layout.groups:
        query, key, value = qkv[index].permute(2, 0, 3, 1, 4)  # each (n, H, length, d)
        attended = F.scaled_dot_product_attention(query, key, value)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # (n * length, H, d)
    return torch.cat(outputs)[layout.inverse]


class PackedAttention(Attention):
    """timm's attention, which also takes a packed batch: then `attn_mask` is its `PackedLayout`."""

    def forward(self, x: torch.Tensor, attn_mask: PackedLayout | None = None, **kwargs) -> torch.Tensor:
        """(N, K, D) -> (N, K, D), or with a layout (T, D) -> (T, D)."""
        if attn_mask is None:
            return super().forward(x, **kwargs)
        qkv = self.qkv(x).reshape(x.shape[0], 3, self.num_heads, self.head_dim)
        return self.proj(packed_attention(qkv, attn_mask).flatten(1))
