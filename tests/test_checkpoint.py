"""Checkpoints: safe to load, whole or absent, clear about what does not fit."""

from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from helpers import tiny_mae

from util import checkpoint


def test_a_published_checkpoint_with_a_pickled_namespace_loads(tmp_path):
    path = tmp_path / "mae.pth"
    torch.save({"model": tiny_mae().state_dict(), "args": argparse.Namespace(model="mae", epochs=800)}, path)
    content = checkpoint.load(path)
    assert checkpoint.arguments(content)["epochs"] == 800
    checkpoint.check_state(path, tiny_mae(), checkpoint.model_state(content))


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Bomb()}, "bomb.pth")
    with pytest.raises(ValueError, match="not a PyTorch checkpoint"):
        checkpoint.load("bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_checkpoint_is_said(tmp_path):
    whole = tmp_path / "whole.pth"
    checkpoint.save(whole, {"model": tiny_mae().state_dict()})
    data = whole.read_bytes()
    cases = {"empty": b"", "truncated": data[: len(data) // 2], "text": b"hello " * 100, "pickle": pickle.dumps([1])}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            checkpoint.load(tmp_path / name)
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "absent")


def test_saving_leaves_nothing_but_the_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "a.pth", {"epoch": 1})
    checkpoint.save(tmp_path / "a.pth", {"epoch": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert checkpoint.load(tmp_path / "a.pth") == {"epoch": 2}


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "a.pth", {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.save(tmp_path / "a.pth", {"epoch": lambda: 2})
    assert checkpoint.load(tmp_path / "a.pth") == {"epoch": 1}


def test_state_dicts_come_in_several_wrappings():
    state = {"weight": torch.ones(1)}
    for content in ({"model": state}, {"state_dict": state}, state, {"model": {"module.weight": torch.ones(1)}}):
        assert list(checkpoint.model_state(content)) == ["weight"]
    with pytest.raises(ValueError, match="no model weights"):
        checkpoint.model_state({"epoch": 3})


def test_differing_tensors_are_named():
    with pytest.raises(ValueError, match=r"decoder_pred.weight is \(48, 32\) in it and \(16, 32\) in the model"):
        checkpoint.check_state("x.pth", tiny_mae(in_chans=1), tiny_mae().state_dict())
    state = tiny_mae().state_dict()
    del state["mask_token"]
    with pytest.raises(ValueError, match="mask_token is missing"):
        checkpoint.check_state("x.pth", tiny_mae(), state)


def test_the_own_checkpoint_comes_before_resume(tmp_path):
    assert checkpoint.resume_path(tmp_path, None) is None
    assert str(checkpoint.resume_path(tmp_path, "other.pth")) == "other.pth"
    checkpoint.save(tmp_path / checkpoint.LAST, {})
    assert checkpoint.resume_path(tmp_path, "other.pth") == tmp_path / checkpoint.LAST
