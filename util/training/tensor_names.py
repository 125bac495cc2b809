"""Names of the same tensors in this project (those of MAE and timm) and in Hugging Face's ViT, ViTMAE and BEiT."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from util.training import checkpoint

State = dict[str, torch.Tensor]

FIRST_OF_HUGGING_FACE = "embeddings.patch_embeddings.projection.weight"  # every encoder there has it

# Ours -> the names of the published Hugging Face files, which every version of transformers loads.
_OUTSIDE_BLOCKS = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
    "head": "classifier",
}
_IN_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BLOCKS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
_QKV = ("query", "key", "value")
_TABLE = "relative_position_bias_table"
_BEIT_OUTSIDE_BLOCKS = {ours: theirs.replace("vit.", "beit.") for ours, theirs in _OUTSIDE_BLOCKS.items()} | {
    "fc_norm": "beit.pooler.layernorm",
    f"rel_pos_bias.{_TABLE}": f"beit.encoder.relative_position_bias.{_TABLE}",
}
_BEIT_IN_BLOCK = _IN_BLOCK | {
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    f"attn.{_TABLE}": f"attention.attention.relative_position_bias.{_TABLE}",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
}
# What transformers 5 writes, or calls its tensors in memory -> the published names.
_NEWER = (
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.(decoder_encoder\.layer|layers)\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def to_hugging_face(state: Mapping[str, torch.Tensor]) -> State:
    """Rename the tensors of an autoencoder or class-token classifier to Hugging Face's names; qkv is split in three.

    Raises:
        ValueError: a tensor that Hugging Face's models have not, such as `fc_norm.weight`.
    """
    result = {}
    for name, tensor in state.items():
        block = re.match(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)$", name)
        if block is None:
            result[_renamed(name, _OUTSIDE_BLOCKS)] = tensor.clone()
            continue
        place, (part, leaf) = f"{_BLOCKS[block[1]]}.{block[2]}", block.group(3, 4)
        if part == "attn.qkv":
            for word, third in zip(_QKV, tensor.chunk(3), strict=True):
                result[f"{place}.attention.attention.{word}.{leaf}"] = third.clone()
        else:
            result[f"{place}.{_renamed(f'{part}.{leaf}', _IN_BLOCK)}"] = tensor.clone()
    return result


def to_beit(state: Mapping[str, torch.Tensor]) -> State:
    """Rename the tensors of a BEiT, or a classifier of that form, to Hugging Face's names; decoders are left out."""
    result = {}
    for name, tensor in encoder_or_classifier(state).items():
        block = re.match(r"blocks\.(\d+)\.(.+)$", name)
        if block is None:
            result[_renamed(name, _BEIT_OUTSIDE_BLOCKS)] = tensor.clone()
        elif block[2] == "attn.qkv.weight":
            for word, third in zip(_QKV, tensor.chunk(3), strict=True):
                result[f"beit.encoder.layer.{block[1]}.attention.attention.{word}.weight"] = third.clone()
        else:
            result[f"beit.encoder.layer.{block[1]}.{_renamed(block[2], _BEIT_IN_BLOCK)}"] = tensor.clone()
    return result


def from_hugging_face(state: Mapping[str, torch.Tensor]) -> State:
    """Undo `to_hugging_face`, for files of old and new versions of transformers. ValueError: different names.

    Those of an encoder alone, `ViTMAEModel` or `ViTModel`, lack the `vit.` of the larger models' names.
    """
    if "embeddings.cls_token" in state:
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
    state = {_published_name(name): tensor for name, tensor in state.items()}
    outside, inside = ({theirs: ours for ours, theirs in names.items()} for names in (_OUTSIDE_BLOCKS, _IN_BLOCK))
    blocks = {theirs: ours for ours, theirs in _BLOCKS.items()}
    result = {}
    for name, tensor in state.items():
        block = re.match(r"(vit\.encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)\.(weight|bias)$", name)
        if block is None:
            result[_renamed(name, outside)] = tensor.clone()
            continue
        place, (part, leaf) = f"{blocks[block[1]]}.{block[2]}", block.group(3, 4)
        if not part.startswith("attention.attention."):
            result[f"{place}.{_renamed(f'{part}.{leaf}', inside)}"] = tensor.clone()
        elif part.endswith(_QKV[0]):
            names = [name.replace(f".{_QKV[0]}.", f".{word}.") for word in _QKV]
            missing = [name for name in names if name not in state]
            if missing:
                raise ValueError(f"{missing[0]} is missing; without biases of query, key and value it cannot be ours")
            result[f"{place}.attn.qkv.{leaf}"] = torch.cat([state[name] for name in names])
    return result


def encoder_or_classifier(state: Mapping[str, torch.Tensor]) -> State:
    """Return what timm's models have: without decoders, and with the two layers of a probe's head made one."""
    state = {name: value for name, value in state.items() if not name.startswith(checkpoint.DECODERS)}
    return fold_probe_head(state)


def fold_probe_head(state: State) -> State:
    """Return the probe's head as one linear layer, which computes the same in evaluation mode; other heads stay."""
    if "head.1.weight" not in state:
        return state
    rest = {name: value for name, value in state.items() if not name.startswith("head.")}
    if "head.0.running_var" not in state:  # --no_batch_norm
        return rest | {"head.weight": state["head.1.weight"], "head.bias": state["head.1.bias"]}
    scale = (state["head.0.running_var"] + 1e-6).rsqrt()  # eps as in models_vit.add_probe_head
    weight = state["head.1.weight"] * scale
    bias = state["head.1.bias"] - weight @ state["head.0.running_mean"]
    return rest | {"head.weight": weight, "head.bias": bias}


def is_unlike_others_heads(state: State) -> bool:
    """Return whether a probe has several heads, or one on several tokens, which no classifier elsewhere has."""
    head = state.get("head.1.weight")
    several = head is not None and head.ndim == 2 and head.shape[1] != state["cls_token"].shape[-1]
    return "head.1.0.weight" in state or several


def _published_name(name: str) -> str:
    for pattern, replacement in _NEWER:
        name = re.sub(pattern, replacement, name)
    return name


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return `names[...]` for a name, or for what stands before `.weight` or `.bias`."""
    if name in names:
        return names[name]
    stem, _, leaf = name.rpartition(".")
    if stem not in names:
        raise ValueError(f"{name} has no counterpart in the other library")
    return f"{names[stem]}.{leaf}"
