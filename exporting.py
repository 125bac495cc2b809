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
import models_mae
from util import checkpoint, convert
from util.config import PretrainSettings

FORMATS = ("timm", "hf", "safetensors", "mae")
HUGGING_FACE_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")


@dataclass
class Exportable:
    """What a checkpoint holds.

    Attributes:
        state: its tensors, under our names.
        settings: of the model.
        classes: names of a classifier's classes; empty for an encoder or autoencoder.
        grid: rows and columns of patches.
        notes: sentences for who converts it: what was assumed, left out, or computes otherwise here.
    """

    state: convert.State
    settings: PretrainSettings
    classes: tuple[str, ...]
    grid: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """autoencoder, classifier or encoder."""
        if any(name.startswith("head.") for name in self.state):
            return "classifier"
        return "autoencoder" if "decoder_pred.weight" in self.state else "encoder"


def read(
    path: str | Path, source: str | None = None, model: str | None = None, input_size: list[int] | None = None
) -> Exportable:
    """A checkpoint of ours, or of another library.

    Args:
        path: file, or folder for "hf".
        source: None for ours; "mae", "timm", "hf", "safetensors".
        model: name of the architecture, where the shapes do not tell.
        input_size: height and width of the images, or one side, where the checkpoint does not tell.

    Raises:
        ValueError: no such file, or no architecture of this project.
    """
    path = Path(path)
    given = {"model": model, "input_size": input_size}
    changes = {name: value for name, value in given.items() if value}
    if source == "hf":
        state, content = _read_hugging_face(path)
    elif path.suffix == ".safetensors":
        state, content = _read_safetensors(path)
    else:
        content = checkpoint.load(path)
        state = checkpoint.model_state(content, path)
    settings = inspection.settings_of(content, inspection.encoder_names(state), path, changes)
    _check_names(path, settings, state)
    _check_heads(path, settings, content, state)
    with torch.device("meta"):
        grid = main_pretrain.build_model(settings).patch_embed.grid_size
    notes = [*content.get("notes", ()), "" if input_size else inspection.assumed_shape(content, state)]
    classes = tuple(content.get("classes", ()))
    head = state.get("head.weight", state.get("head.1.weight"))
    if head is not None and len(classes) != len(head):
        classes = tuple(str(i) for i in range(len(head)))
    classes = classes if head is not None else ()
    return Exportable(state, settings, classes, tuple(grid), tuple(note for note in notes if note))


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
    args = {name: getattr(found.settings, name) for name in inspection.OF_MODEL}
    described = {"args": args, "grid": list(found.grid), "classes": list(found.classes)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in described.items()}
        save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)
    elif target is None:
        checkpoint.save(path, {"model": state} | described)
    else:
        checkpoint.save(path, {"model" if target == "mae" else "state_dict": state, "grid": list(found.grid)})


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
    config = _read_config(folder)
    tensors = _load(folder / "model.safetensors")
    notes = [note for note in (_other_epsilon(config),) if note]
    pooler = [name for name in tensors if name.startswith("pooler.")]
    if pooler:
        notes.append("the pooler is left out: models here have none")
    try:
        state = convert.from_hugging_face({name: tensors[name] for name in tensors if name not in pooler})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    args = {name: config.get(name) for name in ("mask_ratio", "norm_pix_loss")} | {
        "input_size": config.get("image_size")
    }
    if args["mask_ratio"] == 0:  # who wants features of whole images there sets it so
        args["mask_ratio"] = None
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        found = _json_object(processor)
        args |= {ours: found[name] for ours, name in (("mean", "image_mean"), ("std", "image_std")) if name in found}
    labels = config.get("id2label", {})
    classes = [labels[key] for key in sorted(labels, key=int)]
    heads = {"heads": config["num_attention_heads"], "decoder_heads": config.get("decoder_num_attention_heads")}
    return state, {"args": args, "classes": classes, "notes": notes} | heads


def _read_config(folder: Path) -> dict[str, Any]:
    """`config.json`. ValueError: of a model that has no counterpart here."""
    config = _json_object(folder / "config.json")
    if config.get("model_type") not in ("vit_mae", "vit"):
        raise ValueError(f"{folder}: model_type is {config.get('model_type')!r}; vit_mae and vit can be converted")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{folder}: hidden_act is {config['hidden_act']!r}; models here have the exact gelu only")
    if "num_attention_heads" not in config:
        raise ValueError(f"{folder}/config.json: num_attention_heads is missing; save_pretrained writes it")
    return config


def _other_epsilon(config: dict[str, Any]) -> str:
    """A sentence where LayerNorm's epsilon is another than here, or nothing."""
    theirs, ours = config.get("layer_norm_eps", 1e-12), models_mae.layer_norm(1).eps  # 1e-12: transformers' default
    if theirs == ours:
        return ""
    return (
        f"layer_norm_eps is {theirs:g} there and {ours:g} here, as MAE trains: results differ, little for usual images "
        "and more for those of hardly any contrast"
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not the settings of a model")
    return content


def _read_safetensors(path: Path) -> tuple[convert.State, dict[str, Any]]:
    state = _load(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return state, {name: json.loads(metadata[name]) for name in ("args", "grid", "classes") if name in metadata}


def _load(path: Path) -> convert.State:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged, or no safetensors file ({error})") from error


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


def _check_heads(path: Path, settings: PretrainSettings, content: dict[str, Any], state: convert.State) -> None:
    """The number of heads is in no tensor: another number would load, and compute something else."""
    if "heads" not in content:
        return
    with torch.device("meta"):
        model = main_pretrain.build_model(settings)
    ours = {"heads": model.blocks[0].attn.num_heads}
    if "decoder_pred.weight" in state:
        ours["decoder_heads"] = model.decoder_blocks[0].attn.num_heads
    for name, number in ours.items():
        if content.get(name, number) != number:
            raise ValueError(f"{path}: {content[name]} {name.replace('_', ' ')}, but {settings.model} has {number}")
