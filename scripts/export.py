#!/usr/bin/env python3
"""Write a checkpoint for another library, or another library's for this project. docs/EXPORT.md has examples.

scripts/export.py output/run/checkpoint-last.pth --to timm --output encoder.safetensors
scripts/export.py output/run/checkpoint-last.pth --to hf --output my_vit_mae/
scripts/export.py mae_pretrain_vit_base.pth --from mae --output ours.pth
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors import SafetensorError

from exporting import formats, hub, hugging_face
from util import cli, extras


def main(argv: list[str] | None = None) -> None:
    """Read, write."""
    given = make_parser().parse_args(argv)
    with cli.exit_on_user_error():
        check_output(given)
        card = check_card(given)
        if given.to == "onnx":
            extras.require("--to onnx", "onnx", "onnxscript")
        found = formats.read(given.checkpoint, given.source, given.model, given.input_size)
        try:
            formats.write(found, given.to, given.output, **card)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"--output {given.output}: cannot be written ({error})") from error
    for note in found.notes:
        print(f"note: {note}")
    print(f"{found.kind} {found.settings.model}, {len(found.state)} tensors: {given.output}")
    if given.push_to_hub is not None:
        with cli.exit_on_user_error():
            print(hub.push(given.output, hugging_face.HUGGING_FACE_FILES, given.push_to_hub))


def check_output(given: argparse.Namespace) -> None:
    """Raise ValueError if `--output` is what is read, or there already, without `--overwrite`."""
    output, is_folder = given.output, given.to == "hf"
    beside = [output.with_name(f"{output.name}.data")] if given.to == "onnx" else []  # weights above 2 GB
    files = [output / name for name in hugging_face.HUGGING_FACE_FILES] if is_folder else [output, *beside]
    if output.is_dir() and not is_folder:
        raise ValueError(f"--output {output}: is a folder; name a file")
    if output.is_file() and is_folder:
        raise ValueError(f"--output {output}: is a file; name a folder")
    source = Path(given.checkpoint)
    read = [source / name for name in hugging_face.HUGGING_FACE_FILES] if source.is_dir() else [source]
    if any(a.samefile(b) for a in files for b in read if a.exists() and b.exists()):
        raise ValueError(f"--output {output}: is what is converted, and would be lost; choose another name")
    there = [path for path in files if path.exists()]
    if there and not given.overwrite:
        raise ValueError(f"--output {output}: {there[0]} exists; choose another name, or replace it with --overwrite")


def check_card(given: argparse.Namespace) -> dict[str, str]:
    """Return what the command says of the model card. ValueError: it is no name on the Hub, or no identifier."""
    for flag in ("push_to_hub", "license"):
        if getattr(given, flag) is not None and given.to != "hf":
            raise ValueError(f"--{flag} {getattr(given, flag)}: only --to hf writes a folder for the Hub; add it")
    if given.push_to_hub is not None:
        hub.check(given.push_to_hub)
    if given.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given.license):
        raise ValueError(
            f"--license {given.license!r}: give its identifier on the Hub, such as apache-2.0, cc-by-nc-4.0 or other"
        )
    known = {"name": given.push_to_hub, "license": given.license}
    return {name: value for name, value in known.items() if value is not None}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=cli.path_text, help="file, or folder with --from hf")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=formats.TARGETS, help="format to write")
    direction.add_argument("--from", dest="source", choices=formats.FORMATS, help="format to read; ours is written")
    parser.add_argument("--output", type=cli.path, required=True, help="file, or folder with --to hf")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--model", help="name of the architecture, where the checkpoint does not tell")
    parser.add_argument(
        "--input_size", type=int, nargs="+", help="images' side, or height and width, where the checkpoint does not"
    )
    parser.add_argument("--license", help="of the weights, for the model card of --to hf (default: unknown)")
    parser.add_argument(
        "--push_to_hub", metavar="NAME", help="upload the folder of --to hf to this repository on the Hugging Face Hub"
    )
    return parser


if __name__ == "__main__":
    main()
