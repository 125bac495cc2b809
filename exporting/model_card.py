"""The model card of a folder for Hugging Face: what was trained on what and how, its numbers, how to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from exporting import hub
from exporting.exportable import Exportable
from methods import base
from util.kinds import fits
from util.training import checkpoint, following, foreign

_ARGUMENTS = {
    **dict.fromkeys(("dataset", "method", "masking"), str),
    **dict.fromkeys(("method_args", "masking_args"), list[str]),
    **dict.fromkeys(("epochs", "seed"), int),
    **dict.fromkeys(("warmup_epochs", "blr", "lr", "weight_decay"), float),
    **dict.fromkeys(("mask_ratio", "decode_ratio"), float | str),
}
_SCHEDULE = ("epochs", "warmup_epochs", "blr", "lr", "weight_decay", "seed")
# Of how the training went, not of what came out.
_NO_RESULT = re.compile(r"epoch|.*_(lr|grad_norm|skipped_steps|data_wait|bad_images|kept_tokens.*|mask_ratio_.*)")

_CARD = """\
---
{metadata}
---

# {name}

`{architecture}` of transformers, {task}.

{facts}

## Numbers

{numbers}

## Load

```python
{load}
```
"""
_LOAD = """\
import torch
from PIL import Image
from transformers import {architecture}, ViTImageProcessor

processor = ViTImageProcessor.from_pretrained("{name}")
model = {architecture}.from_pretrained("{name}"{options})
inputs = processor(Image.open("picture.jpg").convert("{mode}"), return_tensors="pt")
with torch.no_grad():
    {result}"""
_RESULTS = {
    "classifier": "logits = model(**inputs).logits  # of the classes in model.config.id2label",
    "encoder": "tokens = model(**inputs).last_hidden_state  # (1, {places}, {width}), the class token first",
}
# `noise` in ascending order keeps the patches in theirs.
_RESULTS["autoencoder"] = _RESULTS["encoder"].replace("**inputs", "**inputs, noise=torch.arange({patches}.0)[None]")


def facts(content: dict, path: Path) -> dict[str, Any]:
    """Return what a checkpoint, and the log.txt beside it, tell of the training; nothing of another kind.

    Args:
        content: of the checkpoint.
        path: of it.

    Returns:
        `args`, those of a card; `task`; `epoch`, `num_images` and `effective_batch_size`; `numbers` of that epoch.
    """
    args = checkpoint.arguments(content)
    told = _fitting(content, dict.fromkeys(foreign.HISTORY, int))
    numbers = _numbers(path.parent / "log.txt", told.get("epoch", -1))
    return told | {"args": _fitting(args, _ARGUMENTS), "task": _task(args), "numbers": numbers}


def _fitting(values: dict, kinds: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name, kind in kinds.items() if fits(values.get(name), kind)}


def _task(args: dict) -> str:
    """Return what the training was, by the settings that only it has."""
    if "probe_blocks" in args:
        return "a linear probe of a frozen encoder"
    if "layer_decay" in args:
        return "fine-tuned"
    return "pre-trained by predicting masked parts of images" if args.get("mask_ratio") is not None else "converted"


def _numbers(path: Path, epoch: int) -> dict[str, float]:
    """Return the results that log.txt has of an epoch."""
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and values.get("epoch") == epoch:
            numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
            return {name: value for name, value in numbers.items() if not _NO_RESULT.fullmatch(name)}
    return {}


def text(found: Exportable, architecture: str, name: str, license: str) -> str:
    """Return README.md.

    Args:
        found: the checkpoint.
        architecture: class of transformers that the folder is of.
        name: what `from_pretrained` takes.
        license: of the weights, by its identifier on the Hub.
    """
    told, args = found.training, found.training.get("args", {})
    data_set = hub.data_set(args.get("dataset", ""))
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification" if found.kind == "classifier" else "image-feature-extraction",
        datasets=[data_set] if data_set else None,
    )
    numbers = "Not known: there was no log.txt with this epoch beside the checkpoint."
    if told.get("numbers"):
        rows = _table({title: f"{value:.5g}" for title, value in told["numbers"].items()})
        numbers = f"After epoch {told['epoch']}, counted from 0:\n\n{rows}"
    return _CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        architecture=architecture,
        task=told.get("task", "converted"),
        facts=_table(_rows(found, args, data_set)),
        numbers=numbers,
        load=_load(found, architecture, name),
    )


def _rows(found: Exportable, args: dict, data_set: str | None) -> dict[str, Any]:
    """Return what the card says of model, data, method, mask and schedule; only what is known."""
    told, settings = found.training, found.settings
    (height, width), (rows, columns) = settings.size("input_size"), settings.size("patch_size")
    kind = data_set or args.get("dataset", "").partition("/")[0]  # what follows may be a path
    images = f"{told['num_images']} of them" if "num_images" in told else ""
    schedule = {key: _cell(args[key]) for key in _SCHEDULE if key in args}
    schedule |= {"effective batch": told["effective_batch_size"]} if "effective_batch_size" in told else {}
    lines = {
        "architecture": f"{settings.model}, images of {height} x {width} in patches of {rows} x {columns}",
        "normalisation": following.describe(base.channel_statistics(settings)),
        "images": ", ".join(filter(None, [kind, images])),
        "classes": len(found.labels),
    }
    if "mask_ratio" in args:
        lines["method"] = _options(args.get("method", "mae"), args.get("method_args"))
        lines["mask"] = _options(args.get("masking", "random"), args.get("masking_args"))
        lines["mask ratio"] = args["mask_ratio"] if getattr(found.model(), "has_mask_ratio", True) else None
    return lines | {"schedule": ", ".join(f"{key} {value}" for key, value in schedule.items())}


def _options(name: str, pairs: list[str] | None) -> str:
    """Return a name with its options, without those that are paths."""
    return " ".join([name, *(pair for pair in pairs or () if not pair.partition("=")[2].startswith(("/", "~", ".")))])


def _table(rows: dict[str, Any]) -> str:
    """Return a table of the rows that say something; nothing in a file can end its cell."""
    lines = [f"| {_cell(title)} | {_cell(value)} |" for title, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return " ".join((f"{value:g}" if isinstance(value, float) else str(value)).split()).replace("|", "\\|")


def _load(found: Exportable, architecture: str, name: str) -> str:
    width, patches = found.state["patch_embed.proj.weight"].shape[0], found.grid[0] * found.grid[1]
    mae = architecture.startswith("ViTMAE")
    return _LOAD.format(
        architecture="ViTMAEModel" if mae else architecture,
        name=name,
        options=", mask_ratio=0.0" if mae else "",
        mode={1: "L", 4: "RGBA"}.get(found.settings.in_chans, "RGB"),
        result=_RESULTS["autoencoder" if mae else found.kind].format(places=patches + 1, patches=patches, width=width),
    )
