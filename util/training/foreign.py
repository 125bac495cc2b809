"""Read weights of this project, MAE, DINO, timm or Hugging Face, and give the tensors our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from util.kinds import check_kinds
from util.training import checkpoint, tensor_names

DESCRIPTION = ("args", "grid", "classes")  # what a file of ours tells besides the tensors
HISTORY = ("epoch", "num_images", "effective_batch_size")  # what a checkpoint tells of its training
_EPSILON = 1e-6  # of every LayerNorm here
_CONFIG_KINDS = {
    "num_attention_heads": int,
    "decoder_num_attention_heads": int,
    "image_size": int | list[int],
    "mask_ratio": float,
    "norm_pix_loss": bool,
    "layer_norm_eps": float,
    "id2label": dict[str, str],
}


def read(path: str | Path) -> dict[str, Any]:
    """Read weights from a file of `torch.save` or safetensors, or from a folder of `save_pretrained` or timm's hub.

    Returns:
        `model`, the state dict under our names, and, as far as it is told, `args` (settings), `grid`, `classes`,
        those of `HISTORY`, `heads`, `decoder_heads` and `notes`: sentences on what was chosen, left out, or computes
        otherwise here.

    Raises:
        ValueError: nothing there, damaged, or a layout that is not known.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".safetensors":
        return _ours(path, *_read_safetensors(path))
    content = checkpoint.load(path)
    state = checkpoint.model_state(content, path)
    notes = ["its teacher is taken, not its student"] if checkpoint.takes_teacher(content) else []
    told = {name: content[name] for name in DESCRIPTION + HISTORY if content.get(name) is not None}
    args = checkpoint.arguments(content)
    if "arch" in content or "arch" in args:  # of a training by timm or DINO: its settings have other meanings
        told["args"] = {name: args[name] for name in ("mean", "std") if args.get(name) is not None}
    return _ours(path, state, told | {"notes": notes})


def read_folder(folder: Path) -> dict[str, Any]:
    """Read `config.json` and `model.safetensors`, or `pytorch_model.bin` in its place, as `read`."""
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not (folder / "config.json").is_file() or not files:
        raise ValueError(
            f"{folder}: needs config.json and model.safetensors, as save_pretrained writes them; "
            "of other folders name the file that holds the weights"
        )
    config, state = _json_object(folder / "config.json"), _load_tensors(files[0])
    if "model_type" not in config and "architecture" in config:
        return _ours(folder, state, {"args": _timm_statistics(folder / "config.json", config)})
    told = _describe_hugging_face(folder, config)
    if not any(name.startswith("decoder.") for name in state):
        told["decoder_heads"] = None
    return _ours(folder, state, told)


def check_heads(path: str | Path, told: dict[str, Any], model: nn.Module, name: str = "--model") -> None:
    """Raise ValueError for a different number of heads: no tensor holds it, and it would compute something else.

    Args:
        path: of the weights.
        told: `heads` and `decoder_heads`, as far as the file tells them.
        model: that is to have the weights, called `name`; a decoder that it lacks is not compared.
        name: of the model, for the sentence.
    """
    for key, blocks in (("heads", "blocks"), ("decoder_heads", "decoder_blocks")):
        theirs, ours = told.get(key), getattr(model, blocks, None)
        if theirs is not None and ours is not None and ours[0].attn.num_heads != theirs:
            raise ValueError(
                f"{path}: {theirs} {key.replace('_', ' ')}, but {name} has {ours[0].attn.num_heads}; "
                f"choose a --model with {theirs}"
            )


def _ours(path: Path, state: tensor_names.State, told: dict[str, Any]) -> dict[str, Any]:
    """Give the tensors our names, and leave out heads that are no classifier's."""
    notes = list(told.get("notes", ()))
    if any(name.endswith(tensor_names.FIRST_OF_HUGGING_FACE) for name in state):
        if any(name.startswith("pooler.") for name in state):
            notes.append("the pooler is left out: models here have none")
            state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
        try:
            state = tensor_names.from_hugging_face(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if checkpoint.FIRST not in state:
        raise ValueError(
            f"{path}: its tensors are called {', '.join(list(state)[:3])}, which is none of the known layouts: "
            "MAE, DINO, timm's ViTs, Hugging Face's ViT and ViTMAE; give the tensors of a plain ViT timm's names"
        )
    of_classifier = "head.weight" in state or any(name.startswith("head.1.") for name in state)  # fine-tuned or probed
    if not of_classifier and any(name.startswith("head.") for name in state):
        notes.append("its projection head is left out")
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return told | {"model": state, "notes": notes}


def _read_safetensors(path: Path) -> tuple[tensor_names.State, dict[str, Any]]:
    state = _load_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    told = {}
    for name in DESCRIPTION:
        try:
            told[name] = json.loads(metadata.get(name, "null"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its {name} in the metadata are no JSON ({error})") from error
    check_kinds(path, told, {"args": dict})
    return state, {name: value for name, value in told.items() if value is not None}


def _load_tensors(path: Path) -> tensor_names.State:
    if path.suffix != ".safetensors":
        return checkpoint.model_state(checkpoint.load(path), path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such checkpoint")
    try:
        return checkpoint.model_state(load_file(path), path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged, or no safetensors file ({error})") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not the settings of a model")
    return content


def _timm_statistics(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return mean and deviation of the images in `config.json` of timm."""
    check_kinds(path, config, {"pretrained_cfg": dict})
    told = config.get("pretrained_cfg") or config
    check_kinds(path, told, {"mean": list[float], "std": list[float]})
    return {name: told[name] for name in ("mean", "std") if told.get(name) is not None}


def _describe_hugging_face(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return what `config.json` and `preprocessor_config.json` tell of a model, as `read` does."""
    _check_config(folder, config)
    args = {name: config.get(name) for name in ("mask_ratio", "norm_pix_loss")}
    args["input_size"] = config.get("image_size")
    if args["mask_ratio"] == 0:  # who wants features of whole images there sets it so
        args["mask_ratio"] = None
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        found = _json_object(processor)
        check_kinds(processor, found, {"image_mean": list[float], "image_std": list[float]})
        args |= {ours: found[name] for ours, name in (("mean", "image_mean"), ("std", "image_std")) if name in found}
    labels = config.get("id2label") or {}
    if not all(key.isdecimal() for key in labels):
        raise ValueError(f"{folder}/config.json: its id2label has the key {min(labels)!r}, and all must be numbers")
    return {
        "args": args,
        "classes": [labels[key] for key in sorted(labels, key=int)],
        "notes": [note for note in (_other_epsilon(config),) if note],
        "heads": config["num_attention_heads"],
        "decoder_heads": config.get("decoder_num_attention_heads"),
    }


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for the `config.json` of a model that has no counterpart here."""
    check_kinds(folder / "config.json", config, _CONFIG_KINDS)
    if config.get("model_type") not in ("vit_mae", "vit"):
        raise ValueError(f"{folder}: model_type is {config.get('model_type')!r}; vit_mae and vit can be converted")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{folder}: hidden_act is {config['hidden_act']!r}; models here have the exact gelu only")
    if config.get("num_attention_heads") is None:
        raise ValueError(f"{folder}/config.json: num_attention_heads is missing; save_pretrained writes it")


def _other_epsilon(config: dict[str, Any]) -> str:
    """Return a sentence where LayerNorm's epsilon differs from ours, or nothing."""
    theirs = config.get("layer_norm_eps") or 1e-12  # transformers' default
    if theirs == _EPSILON:
        return ""
    return (
        f"layer_norm_eps is {theirs:g} there and {_EPSILON:g} here, as MAE trains: results differ, little for usual "
        "images and more for those of hardly any contrast"
    )
