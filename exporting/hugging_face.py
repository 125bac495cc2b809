"""Hugging Face's folders of ViTMAE, ViT and BEiT, out of our tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from exporting import model_card
from exporting.exportable import Exportable
from methods import base
from util.files import write_whole
from util.ratios import exact_ratio
from util.training import tensor_names

HUGGING_FACE_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "README.md")


def shared_config(found: Exportable) -> dict[str, Any]:
    """Return what `config.json` says of a ViT and a BEiT alike. ValueError: the images or patches are not square."""
    model = found.model()
    (height, width), (patch, other) = model.patch_embed.img_size, model.patch_embed.patch_size
    if height != width or patch != other:
        raise ValueError(
            f"--to hf: images of {height} x {width} in patches of {patch} x {other}; there both are square"
        )
    labels = dict(enumerate(found.labels))
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


def write(found: Exportable, folder: Path, name: str = "", license: str = "unknown") -> None:
    """Write a folder for `from_pretrained`, with a model card.

    Args:
        found: the checkpoint.
        folder: made if need be.
        name: of the repository on the Hub, for the card; the folder's own if empty.
        license: of the weights, for the card.

    Raises:
        ValueError: Hugging Face has no such model.
    """
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
    whole = {name: value.contiguous() for name, value in state.items()}  # not so after --channels_last
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_whole(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    card = model_card.text(found, config["architectures"][0], name or folder.resolve().name, license)
    write_whole(folder / "README.md", card)
