#!/usr/bin/env python3
"""Write a checkpoint for another library, or another library's for this project. docs/EXPORT.md has examples.

scripts/export.py output/run/checkpoint-last.pth --to timm --output encoder.safetensors
scripts/export.py output/run/checkpoint-last.pth --to hf --output my_vit_mae/
scripts/export.py mae_pretrain_vit_base.pth --from mae --output ours.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exporting
from util import cli


def main(argv: list[str] | None = None) -> None:
    """Read, write."""
    given = make_parser().parse_args(argv)
    with cli.exit_on_user_error():
        found = exporting.read(given.checkpoint, given.source, given.model)
        exporting.write(found, given.to, given.output)
    print(f"{found.kind} {found.settings.model}, {len(found.state)} tensors: {given.output}")


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file, or folder with --from hf")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=exporting.FORMATS, help="format to write")
    direction.add_argument("--from", dest="source", choices=exporting.FORMATS, help="format to read; ours is written")
    parser.add_argument("--output", type=Path, required=True, help="file, or folder with --to hf")
    parser.add_argument("--model", help="name of the architecture, where the checkpoint does not tell")
    return parser


if __name__ == "__main__":
    main()
