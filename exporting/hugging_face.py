"""Hugging Face's folders: ViTMAE and ViT, from our tensors and to them, and BEiT from ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import models_mae
from exporting import tensor_names
from exporting.exportable import Exportable, json_object, load_tensors
from methods import base
from util.files import write_whole
from util.kinds import check_kinds
from util.ratios import exact_ratio

_CONFIG_KINDS = {
    "num_attention_heads": int,
    "decoder_num_attention_heads": int,
    "image_size": int | list[int],
    "mask_ratio": float,
    "norm_pix_loss": bool,
    "layer_norm_eps": float,
    "id2label": dict[str, str],
}
HUGGING_FACE_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")


def shared_config(found: Exportable) -> dict[str, Any]:
    """Return what `config.json` says of a ViT and a BEiT alike. ValueError: the images or patches are not square."""
    model = found.model()
    (height, width), (patch, other) = model.patch_embed.img_size, model.patch_embed.patch_size
    if height != width or patch != other:
        raise ValueError(
            f"--to hf: images of {height} x {width} in patches of {patch} x {other}; there both are square"
        )
    labels = dict(enumerate(found.classes))
    named = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}} if labels else {}
    return {
        "hidden_size": model.cls_token.shape[-1],
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "intermediate_size": model.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.blocks[0].norm1.eps,
        "image_size": height,
        "patch_size": patch,
        "num_channels": found.settings.in_chans,
    } | named


def vit_config(found: Exportable) -> dict[str, Any]:
    """Return `config.json` for ViTMAE, or for ViT where there is no decoder or a head. ValueError: neither fits."""
    config = shared_config(found) | {"qkv_bias": True}
    if "fc_norm.weight" in found.state:
        raise ValueError(
            "--to hf: ViTForImageClassification classifies the class token, this model the mean of the patch tokens; "
            "use --to timm, or fine-tune with --cls_token"
        )
    if found.kind == "classifier":
        return {"model_type": "vit", "architectures": ["ViTForImageClassification"]} | config
    model = found.model()
    if not model.has_decoder:
        return {"model_type": "vit", "architectures": ["ViTModel"]} | config
    return config | {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining" if found.kind == "autoencoder" else "ViTMAEModel"],
        "decoder_hidden_size": model.mask_token.shape[-1],
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": model.decoder_blocks[0].attn.num_heads,
        "decoder_intermediate_size": model.decoder_blocks[0].mlp.fc1.out_features,
        "mask_ratio": float(exact_ratio(found.settings.mask_ratio)),
        "norm_pix_loss": found.settings.norm_pix_loss,
    }


def beit_config(found: Exportable) -> dict[str, Any]:
    """Return `config.json` for `BeitModel` or `BeitForImageClassification`. ValueError: the images are not square."""
    architecture = "BeitForImageClassification" if found.kind == "classifier" else "BeitModel"
    return shared_config(found) | {
        "model_type": "beit",
        "architectures": [architecture],
        "use_absolute_position_embeddings": "pos_embed" in found.state,
        "use_relative_position_bias": "blocks.0.attn.relative_position_bias_table" in found.state,
        "use_shared_relative_position_bias": "rel_pos_bias.relative_position_bias_table" in found.state,
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in found.state else 0.0,  # only whether it is 0 counts
        "use_mean_pooling": "fc_norm.weight" in found.state,
    }


def write(found: Exportable, folder: Path) -> None:
    """Write a folder for `from_pretrained`. ValueError: Hugging Face has no such model."""
    if found.is_beit:
        config, state = beit_config(found), tensor_names.to_beit(found.state)
    else:
        config = vit_config(found)
        state = tensor_names.to_hugging_face(tensor_names.fold_probe_head(found.state))
    mean, std = base.channel_statistics(found.settings)
    side = config["image_size"]
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_whole(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")


def read(folder: Path) -> tuple[tensor_names.State, dict[str, Any]]:
    """Read state and a checkpoint's other content from `config.json` and `model.safetensors`."""
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder}: needs config.json and model.safetensors, as save_pretrained writes them")
    config = _read_config(folder)
    tensors = load_tensors(folder / "model.safetensors")
    notes = [note for note in (_other_epsilon(config),) if note]
    pooler = [name for name in tensors if name.startswith("pooler.")]
    if pooler:
        notes.append("the pooler is left out: models here have none")
    try:
        state = tensor_names.from_hugging_face({name: tensors[name] for name in tensors if name not in pooler})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    args = {name: config.get(name) for name in ("mask_ratio", "norm_pix_loss")} | {
        "input_size": config.get("image_size")
    }
    if args["mask_ratio"] == 0:  # who wants features of whole images there sets it so
        args["mask_ratio"] = None
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        found = json_object(processor)
        check_kinds(processor, found, {"image_mean": list[float], "image_std": list[float]})
        args |= {ours: found[name] for ours, name in (("mean", "image_mean"), ("std", "image_std")) if name in found}
    labels = config.get("id2label") or {}
    if not all(key.isdecimal() for key in labels):
        raise ValueError(f"{folder}/config.json: its id2label has the key {min(labels)!r}, and all must be numbers")
    classes = [labels[key] for key in sorted(labels, key=int)]
    heads = {"heads": config["num_attention_heads"], "decoder_heads": config.get("decoder_num_attention_heads")}
    return state, {"args": args, "classes": classes, "notes": notes} | heads


def _read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`. ValueError: it is of a model that has no counterpart here."""
    config = json_object(folder / "config.json")
    check_kinds(folder / "config.json", config, _CONFIG_KINDS)
    if config.get("model_type") not in ("vit_mae", "vit"):
        raise ValueError(f"{folder}: model_type is {config.get('model_type')!r}; vit_mae and vit can be converted")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{folder}: hidden_act is {config['hidden_act']!r}; models here have the exact gelu only")
    if config.get("num_attention_heads") is None:
        raise ValueError(f"{folder}/config.json: num_attention_heads is missing; save_pretrained writes it")
    return config


def _other_epsilon(config: dict[str, Any]) -> str:
    """Return a sentence where LayerNorm's epsilon differs from ours, or nothing."""
    theirs, ours = config.get("layer_norm_eps") or 1e-12, models_mae.layer_norm(1).eps  # 1e-12: transformers' default
    if theirs == ours:
        return ""
    return (
        f"layer_norm_eps is {theirs:g} there and {ours:g} here, as MAE trains: results differ, little for usual images "
        "and more for those of hardly any contrast"
    )
