"""What several test files need: goldens, tiny models, real pictures, running the mains."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import masking
import models_mae

# Those that differ in what the model does: embeds the kept patches alone, all, packs. Others are tested as masks.
MODEL_STRATEGIES = ["random", "sbam", "sbam_amr"]

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"


@lru_cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays of tests/goldens/{name}.npz."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


@lru_cache
def golden_json(name: str):
    """Content of tests/goldens/{name}.json."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


def with_config(arrays: dict[str, np.ndarray], **settings) -> dict[str, np.ndarray]:
    """The arrays of a golden with other settings in its `config`."""
    return arrays | {"config": np.array(json.dumps(json.loads(str(arrays["config"])) | settings))}


def tensor(array: np.ndarray) -> torch.Tensor:
    """A fresh tensor with the array's values."""
    return torch.from_numpy(np.array(array))


def masked(strategy, tokens: torch.Tensor, noise: torch.Tensor | None = None, grid=None, **given) -> masking.Mask:
    """Call a strategy on tokens (N, L, D) and offer all that one can need; the grid is almost square if None."""
    num_images, num_tokens = tokens.shape[:2]
    rows = max(side for side in range(1, math.isqrt(num_tokens) + 1) if num_tokens % side == 0)
    grid = grid or (rows, num_tokens // rows)
    place = torch.linspace(0.1, 1, num_tokens)
    offered = {
        "grid": grid,
        "patch_size": (4, 4),
        "progress": 0.4,
        "epoch": (4, 10),
        "draw": 0.3,
        "attention": place.expand(num_images, 2, -1),
        "maps": place.view(grid).expand(num_images, -1, -1),
        "boxes": torch.tensor([10.0, 20.0, 100.0, 80.0, 200.0, 300.0, 1.0]).expand(num_images, -1),
        "patch_loss": place.flip(0).expand(num_images, -1),
    }
    return masking.call(strategy, tokens, noise, **(offered | given))


def tiny_mae(**options) -> models_mae.MaskedAutoencoderViT:
    """A MAE small enough to run hundreds of times: 8 x 8 patches of 4 pixels, width 48."""
    sizes = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 4,
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
    }
    return models_mae.MaskedAutoencoderViT(**(sizes | options))


def varied_images(num_images: int, channels: int = 3, side: int = 32) -> torch.Tensor:
    """Images whose salience, and so whose AMR ratio, differs: from a flat one to a strong texture."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_images, channels, side, side, generator=generator)
    return images * torch.linspace(0, 3, num_images).view(-1, 1, 1, 1)


def write_pictures(folder: Path, classes: int = 2, per_class: int = 6, size: tuple[int, int] = (40, 48)) -> Path:
    """An image folder of real JPEGs, train/ and val/, `size` = (width, height)."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(per_class):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., label % 3] //= 4
                Image.fromarray(pixels).save(place / f"{index}.jpg", quality=90)
    return folder


def environment(**variables: str) -> dict[str, str]:
    """For processes of the tests: one thread, no GPU, this project importable."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path} | variables


def run_main(main: str, *arguments, processes: int = 1, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run `python main.py ...`, or torchrun with several processes; output captured, never raises."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / main), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=environment(), timeout=600)


def log_lines(output_dir: Path) -> list[dict]:
    """The epochs in log.txt."""
    return [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]


def refusal(main: Callable, argv: Sequence, capsys: pytest.CaptureFixture) -> str:
    """Run `main(argv)`, which must refuse with status 2 and one line on stderr; return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(value) for value in argv])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]
