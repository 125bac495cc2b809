"""Monitors: what they report, and that a training with them is the training without them, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers import log_lines, run_main, tiny_mae, write_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
import monitor
from util import checkpoint
from util.config import PretrainSettings

DIGITS = ["--config", "configs/pretrain/digits.yaml", "--model", "mae_vit_mini_patch4", "--num_workers", 0]


def pretrain(output, *more):
    flags = [*DIGITS, "--epochs", 2, "--warmup_epochs", 0, "--batch_size", 256, "--output_dir", output, *more]
    main_pretrain.main([str(flag) for flag in flags])
    return log_lines(output), checkpoint.load(output / "checkpoint-last.pth")["model"]


def test_monitors_change_nothing_and_report(tmp_path):
    lines, state = pretrain(tmp_path / "without")
    watched, watched_state = pretrain(tmp_path / "with", "--eval_every", 1, "--vis_every", 2)
    for line, other in zip(lines, watched, strict=True):
        timed = {"train_data_wait"}
        assert {name: line[name] for name in line.keys() - timed} == {
            name: other[name] for name in other.keys() - timed if not name.startswith("monitor_")
        }
    assert all(torch.equal(state[name], watched_state[name]) for name in state)
    last = watched[-1]
    assert 20 < last["monitor_knn"] < 100
    assert 1 <= last["monitor_rank_me"] <= 96
    assert 0.6 <= last["monitor_mask_ratio"] <= 0.9
    assert sum(last["monitor_mask_ratio_histogram"]) == 359
    assert 0 < last["monitor_salience_entropy"] <= 1
    tags = EventAccumulator(str(tmp_path / "with")).Reload().Tags()
    assert {"monitor/knn", "monitor/rank_me", "monitor/salient_share"} <= set(tags["scalars"])
    assert "monitor/masks" in tags["images"]
    assert "monitor/mask_ratio" in tags["histograms"]


def test_monitors_on_two_processes(tmp_path):
    more = ["--epochs", 2, "--warmup_epochs", 0, "--batch_size", 128, "--effective_batch_size", 256]
    flags = [*DIGITS, *more, "--eval_every", 1, "--vis_every", 1, "--output_dir", tmp_path, "--dist_timeout", 120]
    result = run_main("main_pretrain.py", *flags, processes=2)
    assert result.returncode == 0, result.stderr
    assert all("monitor_knn" in line for line in log_lines(tmp_path))
    assert len(list(tmp_path.glob("events*"))) == 1


def test_without_labels_there_is_no_knn(tmp_path):
    folder = write_pictures(tmp_path / "pictures", classes=1, per_class=3) / "train" / "class0"
    settings = PretrainSettings(data_path=str(folder))
    sets = monitor.open_sets(settings, (16, 16), 10, 2)
    assert sets.train is None
    assert len(sets.val) == 2  # evenly spread: the first and the last of three
    assert sets.val.images.source.name(1).endswith("2.jpg")


def test_a_look_gives_all_random_states_and_the_mode_back():
    model = tiny_mae().train()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with monitor.undisturbed(model):
        assert not model.training
        torch.rand(3), random.random(), np.random.rand(3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


@pytest.mark.parametrize(("every", "expected"), [(None, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4])])
def test_when_a_look_is_due(every, expected):
    assert [epoch for epoch in range(5) if monitor.is_due(every, epoch, 5)] == expected


def test_the_histogram_counts_exact_ratios_in_their_bin():
    counts = monitor.ratio_histogram(torch.tensor([0.6, 0.75, 0.75, 0.9375, 1.0, 0.0]))
    assert (counts[12], counts[15], counts[18], counts[19], counts[0]) == (1, 2, 1, 1, 1)
    assert sum(counts) == 6
