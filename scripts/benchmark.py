#!/usr/bin/env python3
"""Measure: `scripts/benchmark.py WORD [flags]`; `--help` after the word lists its flags. The words:

    train   the training step of every strategy, against fixed counts, padding, Hugging Face and a plain MAE
    methods a step of every method, against MAE's with the same encoder
    masks   what choosing a mask costs, as a share of a step
    growth  a step's time over batch, image size and mask ratio
    save    what a checkpoint costs the training that goes on
    data    decoding and augmentation, images per second and core
    views   the same for the views of iBOT

Contenders take turns in one process: compare numbers of one run only.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv: list[str]) -> int:
    """Dispatch on the first word."""
    word = argv[0] if argv else ""
    if word in ("-h", "--help"):
        print(__doc__)
        return 0
    from benchmarks import data, masks, methods, saving, training, views

    commands = {
        "train": training.main,
        "methods": methods.main,
        "masks": masks.main,
        "growth": training.growth,
        "save": saving.main,
        "data": data.main,
        "views": views.main,
    }
    if word not in commands:
        print(
            f"benchmark.py: error: {word or 'nothing'}: say train, methods, masks, growth, save, data or views",
            file=sys.stderr,
        )
        return 2
    commands[word](argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
