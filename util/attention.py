"""How the first token of a sequence, the class token, attends to all tokens: attention's weights, which layers drop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import beit

from util.precision import no_autocast


def weights_of_first(
    query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how the first token attends to all, after the softmax: (N, H, K) fp32.

    Args:
        query, key: (N, H, K, d).
        scale: of the queries.
        bias: (H, K, K) or (1, H, K, K), added before the softmax.
    """
    with no_autocast(query.device.type):  # it would round the scores to half precision
        scores = (query[:, :, :1].float() * scale) @ key.float().transpose(-2, -1)  # (N, H, 1, K)
        scores = scores if bias is None else scores + bias[..., :1, :]
        return scores.softmax(dim=-1)[:, :, 0]


def beit_weights_of_first(attention: beit.Attention, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `weights_of_first` for the input x (N, K, D) of timm's BEiT attention.

    Args:
        attention: with biases of queries and values; a position bias of its own is added.
        x: after the norm.
        bias: position bias (H, K, K) that it shares with other blocks.
    """
    qkv_bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(x, attention.qkv.weight, qkv_bias).unflatten(-1, (3, attention.num_heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # (N, H, K, d) each
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    return weights_of_first(query, key, attention.scale, bias)
