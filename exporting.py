"""Checkpoints for other libraries, and theirs for this project. scripts/export.py is its command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import inspection
import main_pretrain
from util import checkpoint, convert
from util.config import PretrainSettings

FORMATS = ("timm", "hf", "safetensors", "mae")


@dataclass
class Exportable:
    """What a checkpoint holds.

    Attributes:
        state: its tensors, under our names.
        settings: of the model.
        classes: names of a classifier's classes; empty for an encoder or autoencoder.
        grid: rows and columns of patches.
    """

    state: convert.State
    settings: PretrainSettings
    classes: tuple[str, ...]
    grid: tuple[int, int]

    @property
    def kind(self) -> str:
        """autoencoder, classifier or encoder."""
        if any(name.startswith("head.") for name in self.state):
            return "classifier"
        return "autoencoder" if "decoder_pred.weight" in self.state else "encoder"


def read(path: str | Path, source: str | None = None, model: str | None = None) -> Exportable:
    """A checkpoint of ours, or of another library.

    Args:
        path: file, or folder for "hf".
        source: None for ours; "mae", "timm", "hf", "safetensors".
        model: name of the architecture, where the shapes do not tell.

    Raises:
        ValueError: no such file, or no architecture of this project.
    """
    path, changes = Path(path), {"model": model} if model else {}
    if source == "hf":
        state, content = _read_hugging_face(path)
    elif path.suffix == ".safetensors":
        state, content = _read_safetensors(path)
    else:
        content = checkpoint.load(path)
        state = checkpoint.model_state(content, path)
    settings = inspection.settings_of(content, inspection.encoder_names(state), path, changes)
    _check_names(path, settings, state)
    _check_heads(path, settings, content)
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    classes = tuple(content.get("classes", ()))
    head = state.get("head.weight", state.get("head.1.weight"))
    if head is not None and len(classes) != len(head):
        classes = tuple(str(i) for i in range(len(head)))
    return Exportable(state, settings, classes if head is not None else (), tuple(content.get("grid") or (side, side)))


def write(found: Exportable, target: str | None, path: Path) -> None:
    """Write for `target` (None: ours), to a file, or to a folder for "hf".

    Raises:
        ValueError: the other library has no such model, or the suffix is wrong.
    """
    if target == "hf":
        _write_hugging_face(found, path)
        return
    if path.suffix not in (".pth", ".safetensors") or (target in (None, "mae") and path.suffix != ".pth"):
        wanted = ".pth" if target in (None, "mae") else ".safetensors or .pth"
        raise ValueError(f"--output {path}: the name must end in {wanted}")
    if target == "safetensors" and path.suffix != ".safetensors":
        raise ValueError(f"--output {path}: the name must end in .safetensors")
    state = convert.encoder_or_classifier(found.state) if target == "timm" else found.state
    if target == "mae":
        state = {name: value for name, value in state.items() if not name.startswith("head.0.num")}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        described = {"args": found.settings.as_dict(), "grid": list(found.grid), "classes": list(found.classes)}
        metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in described.items()}
        save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)
    elif target is None:
        content = {"model": state, "args": found.settings.as_dict(), "grid": list(found.grid)}
        checkpoint.save(path, content | {"classes": list(found.classes)})
    else:
        checkpoint.save(path, {"model": state} if target == "mae" else state)


def hugging_face_config(found: Exportable) -> dict[str, Any]:
    """`config.json` of `ViTMAEForPreTraining` or `ViTForImageClassification`. ValueError: they have no such model."""
    with torch.device("meta"):
        model = main_pretrain.build_model(found.settings)
    (height, width), (patch, other) = model.patch_embed.img_size, model.patch_embed.patch_size
    if height != width or patch != other:
        raise ValueError(
            f"--to hf: images of {height} x {width} in patches of {patch} x {other}; there both are square"
        )
    config = {
        "hidden_size": model.cls_token.shape[-1],
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "intermediate_size": model.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.norm.eps,
        "image_size": height,
        "patch_size": patch,
        "num_channels": model.in_chans,
        "qkv_bias": True,
    }
    if found.kind == "classifier":
        labels = dict(enumerate(found.classes))
        named = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
        return {"model_type": "vit", "architectures": ["ViTForImageClassification"]} | config | named
    return config | {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining" if found.kind == "autoencoder" else "ViTMAEModel"],
        "decoder_hidden_size": model.mask_token.shape[-1],
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": model.decoder_blocks[0].attn.num_heads,
        "decoder_intermediate_size": model.decoder_blocks[0].mlp.fc1.out_features,
        "mask_ratio": found.settings.mask_ratio,
        "norm_pix_loss": found.settings.norm_pix_loss,
    }


def _write_hugging_face(found: Exportable, folder: Path) -> None:
    if "fc_norm.weight" in found.state:
        raise ValueError(
            "--to hf: ViTForImageClassification classifies the class token, this model the mean of the patch tokens; "
            "use --to timm, or fine-tune with --cls_token"
        )
    config = hugging_face_config(found)
    state = convert.to_hugging_face(convert.fold_probe_head(found.state))
    mean, std = main_pretrain.channel_statistics(found.settings)
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
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _read_hugging_face(folder: Path) -> tuple[convert.State, dict[str, Any]]:
    """State and a checkpoint's other content from `config.json` and `model.safetensors`."""
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder}: needs config.json and model.safetensors, as save_pretrained writes them")
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") not in ("vit_mae", "vit"):
        raise ValueError(f"{folder}: model_type is {config.get('model_type')!r}; vit_mae and vit can be converted")
    try:
        state = convert.from_hugging_face(load_file(folder / "model.safetensors"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    args = {name: config[name] for name in ("mask_ratio", "norm_pix_loss") if name in config}
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        found = json.loads(processor.read_text())
        args |= {ours: found[name] for ours, name in (("mean", "image_mean"), ("std", "image_std")) if name in found}
    labels = config.get("id2label", {})
    classes = [labels[key] for key in sorted(labels, key=int)]
    heads = {"heads": config["num_attention_heads"]}
    if config["model_type"] == "vit_mae":
        heads["decoder_heads"] = config["decoder_num_attention_heads"]
    return state, {"args": args, "classes": classes} | heads


def _read_safetensors(path: Path) -> tuple[convert.State, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no safetensors file ({error})") from error
    return state, {name: json.loads(metadata[name]) for name in ("args", "grid", "classes") if name in metadata}


def _check_names(path: Path, settings: PretrainSettings, state: convert.State) -> None:
    """ValueError unless `state` is a whole autoencoder, encoder or classifier of the architecture."""
    with torch.device("meta"):
        wanted = main_pretrain.build_model(settings).state_dict()
    if "decoder_pred.weight" not in state:
        wanted = {name: value for name, value in wanted.items() if not name.startswith(("decoder", "mask_token"))}
    if "fc_norm.weight" in state:  # a classifier of the mean of the patch tokens has this norm instead
        wanted = {name: value for name, value in wanted.items() if not name.startswith("norm.")}
    difference = checkpoint.describe_difference(wanted, inspection.encoder_names(state))
    if difference:
        raise ValueError(f"{path}: not the architecture {settings.model}, name it with --model: {difference}")


def _check_heads(path: Path, settings: PretrainSettings, content: dict[str, Any]) -> None:
    """The number of heads is in no tensor: another number would load, and compute something else."""
    if "heads" not in content:
        return
    with torch.device("meta"):
        model = main_pretrain.build_model(settings)
    ours = {"heads": model.blocks[0].attn.num_heads, "decoder_heads": model.decoder_blocks[0].attn.num_heads}
    for name, number in ours.items():
        if content.get(name, number) != number:
            raise ValueError(f"{path}: {content[name]} {name.replace('_', ' ')}, but {settings.model} has {number}")
