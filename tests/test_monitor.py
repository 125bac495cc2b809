"""Monitors: what they report, and that a training with them is the training without them, bit for bit."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from faults import injected
from helpers import log_lines, tiny_mae, write_pictures
from runs import torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
import masking
import methods
from evaluation import checkpoints, measure, monitor
from util.config import PretrainSettings
from util.distributed import signals
from util.training import checkpoint
from util.training.log import RunLog

DIGITS = ["--config", "configs/pretrain/digits.yaml", "--model", "mae_vit_mini_patch4", "--num_workers", 0]
TWO = ["--masking", "sbam_amr", "--batch_size", 2, "--eval_every", 1, "--dist_timeout", 120]


def pretrain(output, *more):
    flags = [*DIGITS, "--epochs", 2, "--warmup_epochs", 0, "--batch_size", 256, "--output_dir", output, *more]
    main_pretrain.main([str(flag) for flag in flags])
    return log_lines(output), checkpoint.load(output / "checkpoint-last.pth")["model"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run on the digits with monitors: its folder, its epochs and weights."""
    folder = tmp_path_factory.mktemp("watched")
    return folder, *pretrain(folder, "--eval_every", 1, "--vis_every", 2)


@pytest.fixture(scope="module")
def watched_by_two(pictures, tmp_path_factory):
    """The folder of a run on two processes, with monitors."""
    folder = tmp_path_factory.mktemp("two")
    result = torchrun(pictures, folder, [], *TWO, "--vis_every", 2)
    assert result.returncode == 0, result.stderr
    return folder


def test_monitors_change_nothing_and_report(watched, tmp_path):
    lines, state = pretrain(tmp_path)
    folder, others, watched_state = watched
    for line, other in zip(lines, others, strict=True):
        timed = {"train_data_wait"}
        assert {name: line[name] for name in line.keys() - timed} == {
            name: other[name] for name in other.keys() - timed if not name.startswith("monitor_")
        }
    assert all(torch.equal(state[name], watched_state[name]) for name in state)
    last = others[-1]
    assert 20 < last["monitor_knn"] < 100
    assert 1 <= last["monitor_rank_me"] <= 96
    assert 0.6 <= last["monitor_mask_ratio"] <= 0.9
    assert sum(last["monitor_mask_ratio_histogram"]) == 359
    assert 0 < last["monitor_salience_entropy"] <= 1
    tags = EventAccumulator(str(folder)).Reload().Tags()
    assert {"monitor/knn", "monitor/rank_me", "monitor/salient_share"} <= set(tags["scalars"])
    assert {"monitor/masks", "monitor/encoder"} <= set(tags["images"])
    assert "monitor/mask_ratio" in tags["histograms"]


def test_monitors_find_what_evaluate_does_also_on_two_processes(watched, watched_by_two):
    metrics = ("knn", "rank_me", "salience")
    for folder in (watched[0], watched_by_two):
        opened = checkpoints.open_checkpoint(folder / checkpoint.LAST)
        expected = measure.measure(opened, metrics, train_images=monitor.TRAIN_IMAGES, val_images=monitor.VAL_IMAGES)
        assert {"knn", "rank_me", "salient_share", "salience_entropy", "mask_ratio"} <= expected.keys()
        first, last = log_lines(folder)
        for name in expected.keys() - {"train_images", "val_images"}:
            assert last[f"monitor_{name}"] == pytest.approx(expected[name], rel=1e-4), name
        assert first["monitor_rank_me"] != last["monitor_rank_me"]
        assert len(list(folder.glob("events*"))) == 1


def assert_same_run(one, other):
    """Weights bit for bit; the epochs' lines, looks included, up to the order in which means are summed."""
    (lines, state), (others, other_state) = one, other
    assert all(torch.equal(state[name], other_state[name]) for name in state)
    for line, found in zip(lines, others, strict=True):
        assert line.keys() == found.keys()
        for name in line.keys() - {"train_data_wait"}:
            assert line[name] == pytest.approx(found[name], rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("look", [0, 3], ids=["first", "last"])  # two takings of features each
def test_a_signal_ends_a_look_and_the_run_continues_with_it(watched, tmp_path, look):
    start = time.perf_counter()
    with injected([{"kind": "SIGTERM", "look": look}]), pytest.raises(SystemExit) as stop:
        pretrain(tmp_path, "--eval_every", 1)
    assert stop.value.code == signals.PREEMPTED
    assert time.perf_counter() - start < 30
    saved = checkpoint.load(tmp_path / checkpoint.LAST)
    assert saved["step"] == (look // 2 + 1) * saved["steps_per_epoch"]
    assert_same_run(watched[1:], pretrain(tmp_path, "--eval_every", 1))


def test_a_run_on_two_processes_killed_in_a_look_loses_no_epoch(watched_by_two, pictures, tmp_path):
    """Killed in the look after the second epoch, then asked to stop in the same look, which it has begun again."""
    for faults in ([{"kind": "SIGKILL", "look": 2}], [{"kind": "SIGTERM", "look": 0}], []):
        result = torchrun(pictures, tmp_path, faults, *TWO)
        assert (result.returncode == 0) == (not faults), result.stderr
        saved, lines = checkpoint.load(tmp_path / checkpoint.LAST), log_lines(tmp_path)
        assert saved["step"] == 2 * saved["steps_per_epoch"]
        assert len(lines) == (1 if faults else 2)
    whole = checkpoint.load(watched_by_two / checkpoint.LAST)["model"]
    assert_same_run((log_lines(watched_by_two), whole), (lines, saved["model"]))


def watcher(settings, said=None):
    """A monitor that says its lines to `said`."""
    log = RunLog(None)
    log.say = (said if said is not None else []).append
    return monitor.Monitor(settings, methods.from_settings(settings), log)


def test_the_picture_shows_the_salience_of_the_run_s_temperature():
    args = {"masking": "sbam", "masking_args": ["temperature=9"], "dataset": "digits", "in_chans": 1}
    settings = PretrainSettings(model="mae_vit_mini_patch4", vis_every=1, **args)
    looking = watcher(settings)
    figures = looking.look(0).pictures
    figure = figures["masks"]
    maps = [image.get_array() for axis in figure.axes for image in axis.images if image.get_array().shape == (4, 4)]
    images = looking._sets.val
    pixels = torch.stack([images[0, index * len(images) // 6][0] for index in range(6)])
    expected = masking.token_salience(looking.method.model.embed(looking.method.normalize(pixels)), 9.0)
    torch.testing.assert_close(torch.tensor(np.stack(maps)).flatten(1), expected.detach())
    titles = ["image", "attention", "head 1", "head 2", "head 3", "PCA"]
    assert [axis.get_title() for axis in figures["encoder"].axes if axis.get_title()] == titles


@pytest.mark.parametrize(
    ("flags", "ratios"),
    [
        ({"masking": "schedule", "masking_args": ["end=0.25"]}, [0.5, 0.25]),
        ({"masking": "schedule", "masking_args": ["end=0.25"], "masking_warmup_epochs": 1}, [0.75, 0.25]),
        ({"masking": "hpm", "method": "hpm"}, [None, None]),  # its masks need what is learnt only in training
        (
            {"method": "ibot", "model": "ibot_vit_mini_patch4", "method_args": ["local_size=8"]},
            [None, None],  # a ratio is drawn for each view
        ),
    ],
    ids=["schedule", "warm-up", "hpm", "ibot"],
)
def test_the_mask_ratio_is_that_of_the_epoch_or_left_out(tmp_path, flags, ratios):
    folder = write_pictures(tmp_path, per_class=2)
    flags = {"model": "mae_vit_mini_patch4", "data_path": str(folder)} | flags
    looking = watcher(PretrainSettings(epochs=2, eval_every=1, num_workers=0, **flags))
    lines = [looking.report(looking.look(epoch), epoch) for epoch in range(2)]
    assert [line.get("monitor_mask_ratio") for line in lines] == ratios
    assert [line["monitor_bad_images"] for line in lines] == [0, 0]
    opened = checkpoints.untrained(**{"name" if key == "model" else key: value for key, value in flags.items()})
    assert measure.measure(opened, ("salience",)).get("mask_ratio") == ratios[1]


def test_bad_pictures_and_missing_labels_are_said_once(tmp_path, capsys):
    folder, said = write_pictures(tmp_path), []
    (folder / "val" / "class0" / "1.jpg").write_text("no picture")
    settings = PretrainSettings(model="mae_vit_mini_patch4", data_path=str(folder), eval_every=1, num_workers=0)
    looking = watcher(settings, said)
    for epoch in (0, 1):
        line = looking.report(looking.look(epoch), epoch)
        assert line["monitor_bad_images"] == 1
        assert "monitor_knn" in line
    error = capsys.readouterr().err
    assert "val/class0/1.jpg: cannot be decoded" in error
    assert error.count("\n") == 1
    assert said == []
    (folder / "train" / "class1").rename(folder / "class1")
    line = watcher(settings, said).look(0)
    assert "knn" not in line.values
    assert len(said) == 1
    assert said[0].endswith("classes of val/ that train/ has not: ['class1']")


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
    assert [epoch for epoch in range(5) if monitor.is_due(every, epoch, 4)] == expected


def test_the_histogram_counts_exact_ratios_in_their_bin():
    counts = monitor.ratio_histogram(torch.tensor([0.6, 0.75, 0.75, 0.9375, 1.0, 0.0]))
    assert (counts[12], counts[15], counts[18], counts[19], counts[0]) == (1, 2, 1, 1, 1)
    assert sum(counts) == 6
