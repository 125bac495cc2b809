"""A checkpoint written before there were methods still loads, and continues as that code continued it."""

from __future__ import annotations

import lzma

import pytest
from helpers import GOLDENS, write_pictures
from runs import content, pretrain

# What revision 867fd07 made of the same file: epoch 1 from its step 3 on, under sbam_amr.
EXPECTED = {
    "train_loss": 0.39323175081642725,
    "train_grad_norm": 1.5623011787732441,
    "train_mask_ratio": 0.7926136363636364,
    "train_kept_tokens_min": 2.0,
    "train_kept_tokens_max": 5.0,
    "train_lr": 0.00022517691196978541,
}


def test_it_continues_in_the_middle_of_its_epoch(tmp_path):
    """Its weights are rounded, so that the file is small; it is otherwise as a signal left it after 9 steps of 12."""
    pictures = write_pictures(tmp_path / "pictures", classes=1, per_class=22)
    old = tmp_path / "old.pth"
    old.write_bytes(lzma.decompress((GOLDENS / "before_methods.pth.xz").read_bytes()))
    (line,) = pretrain(pictures, tmp_path / "run", "--masking", "sbam_amr", "--resume", old)
    assert line["epoch"] == 1
    assert {name: line[name] for name in EXPECTED} == pytest.approx(EXPECTED, rel=1e-5)
    saved = content(tmp_path / "run")
    assert saved["step"] == 12
    assert saved["model"]["blocks.0.mlp.fc1.weight"].double().norm().item() == pytest.approx(
        12.414212211810703, rel=1e-6
    )
