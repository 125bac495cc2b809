"""Sequences of different lengths end to end, without padding. Only attention knows where one ends.

A packed batch is (T, D) with T the sum of the lengths; linear layers, norms and MLPs run on it as it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch.nn.attention.varlen import varlen_attn

from util.attention import weights_of_first

# Graphs compiled for one bound of the length serve every batch below it.
_BOUND = 128
_VARLEN_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed batch lie.

    Attributes:
        lengths: (N,) int64 on the host, tokens of each sequence.
        offsets: (N + 1,) int32 on the device, where each sequence begins, and T.
        max_length: no sequence is longer; rounded up, so that compiled graphs stay valid.
        flash: whether the device has a kernel for sequences of different lengths.
    """

    lengths: torch.Tensor
    offsets: torch.Tensor
    max_length: int
    flash: bool

    @staticmethod
    def from_lengths(lengths: tuple[int, ...], device: torch.device) -> PackedLayout:
        """Lay out sequences of `lengths` tokens, in this order."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        if device.type == "cuda":
            offsets = offsets.pin_memory().to(device, non_blocking=True)  # a pageable copy would make the host wait
        flash = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return PackedLayout(torch.tensor(lengths), offsets, -(-max(lengths) // _BOUND) * _BOUND, flash)


def packed_attention(qkv: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Compute self-attention within each sequence of a packed batch.

    In half precision on a GPU one kernel serves all lengths; elsewhere sequences of equal length share a call.

    Args:
        qkv: (T, 3, H, d) queries, keys and values of H heads.
        layout: where the sequences lie.

    Returns:
        (T, H, d).
    """
    head_dim = qkv.shape[-1]
    if layout.flash and qkv.dtype in _VARLEN_DTYPES and head_dim % 8 == 0 and head_dim <= 256:
        offsets, longest = layout.offsets, layout.max_length
        return varlen_attn(*qkv.unbind(1), offsets, offsets, longest, longest)
    return _attention_by_length(qkv, layout.lengths)


def packed_cross_attention(query: torch.Tensor, key_value: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Attend from as many queries in each image to a memory whose length differs from image to image.

    Args:
        query: (N, Q, H, d).
        key_value: (T, 2, H, d) keys and values of the memories, packed image by image.
        layout: where the memories lie.

    Returns:
        (N, Q, H, d).
    """
    num_images, number, _, head_dim = query.shape
    if layout.flash and query.dtype in _VARLEN_DTYPES and head_dim % 8 == 0 and head_dim <= 256:
        offsets = torch.arange(num_images + 1, dtype=torch.int32, device=query.device) * number
        key, value = key_value.unbind(1)
        found = varlen_attn(query.flatten(0, 1), key, value, offsets, layout.offsets, number, layout.max_length)
        return found.view_as(query)
    # Elsewhere memories are padded: attention to them is a small part of a decoder's work.
    places = torch.arange(layout.max_length, device=query.device)
    exists = places < layout.offsets.diff()[:, None]  # (N, M)
    rows = (layout.offsets[:-1, None] + places).clamp_max(len(key_value) - 1)
    key, value = key_value[rows].permute(2, 0, 3, 1, 4)  # (N, H, M, d) each
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=exists[:, None, None])
    return attended.transpose(1, 2)


@functools.lru_cache(maxsize=2)  # every block of a forward and a backward pass asks for the same
def _groups(lengths: tuple[int, ...], device: torch.device) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return one (n, length) index into the packed tokens for every length; the index (T,) that undoes their order."""
    starts: dict[int, list[int]] = {}
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        starts.setdefault(length, []).append(end - length)
    by_length = sorted(starts.items())
    index = [torch.tensor(first)[:, None] + torch.arange(length) for length, first in by_length]
    order = torch.cat([group.flatten() for group in index]).to(device)  # one transfer
    parts = order.split([group.numel() for group in index])
    groups = tuple(part.view(-1, length) for part, (length, _) in zip(parts, by_length, strict=True))
    return groups, torch.argsort(order)


# An operator of its own: to the compiler the number of groups would be part of the graph.
@torch.library.custom_op("sbam::attention_by_length", mutates_args=())
def _attention_by_length(qkv: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Compute `packed_attention` with one dense call for every length that occurs."""
    groups, inverse = _groups(tuple(lengths.tolist()), qkv.device)
    outputs = []
    for index in groups:
        attended = F.scaled_dot_product_attention(*_heads_first(qkv[index]))
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # (n * length, H, d)
    return torch.cat(outputs)[inverse]


@torch.library.custom_op("sbam::attention_by_length_backward", mutates_args=())
def _attention_by_length_backward(grad: torch.Tensor, qkv: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the gradient (T, 3, H, d) from the output's (T, H, d); compute the weights again, as flash kernels do."""
    groups, inverse = _groups(tuple(lengths.tolist()), qkv.device)
    scale = qkv.shape[-1] ** -0.5
    outputs = []
    for index in groups:
        query, key, value = _heads_first(qkv[index])
        grad_output = grad[index].transpose(1, 2)  # (n, H, length, d)
        weights = torch.softmax(query @ key.transpose(-2, -1) * scale, dim=-1)  # (n, H, length, length)
        grad_weights = grad_output @ value.transpose(-2, -1)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True)) * scale
        grads = (grad_scores @ key, grad_scores.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ grad_output)
        outputs.append(torch.stack(grads).permute(1, 3, 0, 2, 4).flatten(0, 1))  # (n * length, 3, H, d)
    return torch.cat(outputs)[inverse]


def _heads_first(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split (n, length, 3, H, d) -> three of (n, H, length, d)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@_attention_by_length.register_fake
def _(qkv: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


@_attention_by_length_backward.register_fake
def _(grad: torch.Tensor, qkv: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return _attention_by_length_backward(grad, *ctx.saved_tensors), None


_attention_by_length.register_autograd(_differentiate, setup_context=_save_inputs)


class PackedAttention(Attention):
    """timm's attention, which also takes a packed batch: then `attn_mask` is its `PackedLayout`."""

    def forward(self, x: torch.Tensor, attn_mask: PackedLayout | torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Attend: (N, K, D) -> (N, K, D), or with a layout (T, D) -> (T, D)."""
        if not isinstance(attn_mask, PackedLayout):
            return super().forward(x, attn_mask=attn_mask, **kwargs)
        qkv = self.qkv(x).reshape(x.shape[0], 3, self.num_heads, self.head_dim)
        return self.proj(packed_attention(qkv, attn_mask).flatten(1))

    def weights_of_first(self, x: torch.Tensor) -> torch.Tensor:
        """Return how the first token attends to all: (N, K, D) -> (N, H, K) fp32, after the softmax."""
        query, key, _ = _heads_first(self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)))
        return weights_of_first(query, key, self.scale)
