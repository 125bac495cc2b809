"""Checkpoints for other libraries, and theirs for this project. scripts/export.py is its command."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from evaluation import checkpoints
from exporting import graph, hugging_face, model_card
from exporting.exportable import Exportable, check_names, numbered
from util.training import checkpoint, foreign, tensor_names

FORMATS = ("timm", "hf", "safetensors", "mae")  # read and written
TARGETS = (*FORMATS, "onnx")
_SUFFIXES = {"timm": (".safetensors", ".pth"), "safetensors": (".safetensors",), "onnx": (".onnx",)}


def read(
    path: str | Path, source: str | None = None, model: str | None = None, input_size: list[int] | None = None
) -> Exportable:
    """Read a checkpoint of this project or of another library.

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
    content = foreign.read_folder(path) if source == "hf" else foreign.read(path)
    state = content["model"]
    settings = checkpoints.settings_of(content, checkpoints.encoder_names(state), path, changes)
    notes = [*content.get("notes", ()), "" if input_size else checkpoints.assumed_shape(content, state)]
    if tensor_names.is_unlike_others_heads(state):
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        notes.append(
            "the head is left out: elsewhere there is one linear layer on one token; this is the encoder alone"
        )
    classes = tuple(content.get("classes") or ())
    numbers = numbered(state)
    if len(classes) != len(numbers) or (source == "hf" and classes == numbers):  # which stand there for unknown names
        classes = ()
    sizes = zip(settings.size("input_size"), settings.size("patch_size"), strict=True)
    grid = tuple(side // step for side, step in sizes)
    blocks = checkpoints.probe_blocks(content, path)
    found = Exportable(state, settings, classes, grid, tuple(note for note in notes if note), blocks)
    found.training = model_card.facts(content, path)
    check_names(path, found)
    checkpoint.check_finite(path, state)
    foreign.check_heads(path, content, found.model(), settings.model)
    return found


def write(found: Exportable, target: str | None, path: Path, **card: str) -> None:
    """Write for `target` (None: ours), to a file, or to a folder for "hf", with `name` and `license` on its card.

    Raises:
        ValueError: the other library has no such model, or the suffix is wrong.
    """
    if target == "hf":
        hugging_face.write(found, path, **card)
        return
    if target == "mae" and found.is_beit:
        raise ValueError(
            f"--to mae: {found.settings.model} is a BEiT, whose biases MAE's ViT lacks; use --to timm or --to hf"
        )
    suffixes = _SUFFIXES.get(target, (".pth",))
    if path.suffix not in suffixes:
        raise ValueError(f"--output {path}: the name must end in {' or '.join(suffixes)}")
    state = tensor_names.encoder_or_classifier(found.state) if target == "timm" else found.state
    args = {name: getattr(found.settings, name) for name in checkpoints.OF_MODEL}
    args |= {"probe_blocks": found.probe_blocks} if found.probe_blocks else {}
    described = {"args": args, "grid": list(found.grid), "classes": list(found.classes)}
    metadata = {name: json.dumps(value) for name, value in described.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if target == "onnx":
        graph.write_onnx(found, path, metadata)
    elif path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path, {"format": "pt"} | metadata)
    elif target is None:
        checkpoint.save(path, {"model": state} | described)
    else:
        checkpoint.save(path, {"model" if target == "mae" else "state_dict": state, "grid": list(found.grid)})
