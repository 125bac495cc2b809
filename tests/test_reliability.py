"""Runs that are stopped, killed, or meet NaN end as the run that was not."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from faults import injected
from helpers import MODEL_STRATEGIES, refusal, run_main, write_pictures
from runs import assert_same_run, content, flags, pretrain, stopped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import main_pretrain
import masking
import methods
from util.distributed import signals
from util.training import checkpoint
from util.training.step import GradientStep


@pytest.mark.parametrize("strategy", MODEL_STRATEGIES)
def test_a_run_stopped_before_every_step_ends_like_one_that_was_not(pictures, tmp_path, strategy):
    pretrain(pictures, tmp_path / "whole", "--masking", strategy)
    stops = 0
    with injected([{"kind": "SIGTERM", "forward": list(range(1, 200))}]):
        while not (tmp_path / "parts").exists() or content(tmp_path / "parts")["step"] < 13:
            stopped(pictures, tmp_path / "parts", "--masking", strategy)
            stops += 1
    pretrain(pictures, tmp_path / "parts", "--masking", strategy)
    assert stops >= 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "given",
    [
        ["block", "--masking_args", "min_patches=2", "attempts=3"],
        ["inverse_block"],
        ["color", "--decode_ratio", "0.5"],
        ["schedule", "--masking_args", "of=sbam_amr", "end=0.5", "delta_r=0.1", "--decode_ratio", "1/3"],
        ["schedule", "--masking_args", "of=random", "end=0.5", "shape=drawn"],
    ],
    ids=lambda given: given[0],
)
def test_every_mask_continues_bit_for_bit(pictures, tmp_path, given):
    pretrain(pictures, tmp_path / "whole", "--masking", *given)
    with injected([{"kind": "SIGTERM", "forward": 9}]):
        stopped(pictures, tmp_path / "parts", "--masking", *given)
    pretrain(pictures, tmp_path / "parts", "--masking", *given)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("number_of_workers", [(0, 2), (3, 0)], ids=str)
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR2"])
def test_workers_may_change_when_a_stopped_run_continues(pictures, tmp_path, number_of_workers, name):
    before, after = number_of_workers
    pretrain(pictures, tmp_path / "whole", "--masking", "sbam_amr")
    with injected([{"kind": name, "forward": 9}]):
        stopped(pictures, tmp_path / "parts", "--masking", "sbam_amr", "--num_workers", before)
    assert content(tmp_path / "parts")["step"] == 10
    pretrain(pictures, tmp_path / "parts", "--masking", "sbam_amr", "--num_workers", after)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_full_memory_of_a_gpu_is_one_sentence(pictures, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(methods.MAE, "forward", full)
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path)
    assert stop.value.code == 1
    said = "error: the memory of cpu is full (CUDA out of memory. Tried to allocate 2.00 GiB); lower --batch_size (with"
    assert said in capsys.readouterr().err


def test_fp16_continues_with_its_scale(pictures, tmp_path):
    """The scale starts at 65536 and is halved by the step with NaN; a run that forgot it would step otherwise."""
    given = ["--amp", "fp16"]
    with injected([{"kind": "nan", "forward": 2}]):
        pretrain(pictures, tmp_path / "whole", *given)
    with injected([{"kind": "nan", "forward": 2}, {"kind": "SIGTERM", "forward": 9}]):
        stopped(pictures, tmp_path / "parts", *given)
    assert content(tmp_path / "parts")["scaler"]["scale"] == 2**15
    pretrain(pictures, tmp_path / "parts", *given)
    assert content(tmp_path / "parts")["scaler"] == content(tmp_path / "whole")["scaler"]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_fine_tuning_with_everything_random_continues_exactly(tmp_path):
    """Mixup, cutmix, erasing, colours, drop path; a stop at every fourth step of two epochs of 12."""
    pictures = write_pictures(tmp_path / "pictures", per_class=12)
    given = ["--data_path", pictures, "--model", "vit_mini_patch4", "--epochs", 2, "--warmup_epochs", 1, "--lr", 2e-3]
    given += ["--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.5, "--drop_path", 0.2, "--batch_size", 2]
    given += ["--aa", "rand-m9-mstd0.5-inc1", "--num_workers", 0]

    def finetune(output) -> None:
        main_finetune.main([str(value) for value in [*given, "--output_dir", output]])

    finetune(tmp_path / "whole")
    apply, calls, stops = GradientStep.apply, 0, 0

    def apply_and_stop(self, *arguments):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return apply(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientStep, "apply", apply_and_stop)
        while not stops or content(tmp_path / "parts")["epoch"] < 1:
            with contextlib.suppress(signals.Preempted):
                finetune(tmp_path / "parts")
            stops += 1
    assert stops >= 5
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_ctrl_c_leaves_at_once(pictures, tmp_path):
    """Within the step, without a checkpoint; the same command continues all the same."""
    pretrain(pictures, tmp_path / "whole")
    twice = [{"kind": "SIGINT", "forward": 9}, {"kind": "SIGINT", "forward": 9}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS", json.dumps(twice))
        result = run_main("tests/faults.py", *flags(pictures, tmp_path / "parts"))
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert content(tmp_path / "parts")["step"] == 7
    pretrain(pictures, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_points_of_steps_that_are_run_again_are_there_once(pictures, tmp_path):
    """Also where the run was killed before its first checkpoint."""
    with injected([{"kind": "crash", "forward": 4}]), pytest.raises(RuntimeError, match="struck"):
        pretrain(pictures, tmp_path, "--epochs", 1)
    assert not (tmp_path / checkpoint.LAST).exists()
    with injected([{"kind": "SIGTERM", "forward": 2}]):
        stopped(pictures, tmp_path, "--epochs", 1)
    pretrain(pictures, tmp_path, "--epochs", 1)
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, 8))


def test_within_an_epoch_the_pictures_must_be_the_same(pictures, tmp_path, capsys):
    """Even if they make as many steps."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    with injected([{"kind": "SIGTERM", "forward": 2}]):
        stopped(folder, tmp_path / "run")
    shutil.copy(next(folder.rglob("train/**/*.jpg")), next(folder.glob("train/*")) / "one_more.jpg")
    with pytest.raises(SystemExit) as stop:
        pretrain(folder, tmp_path / "run")
    assert stop.value.code == 2
    assert "within an epoch of 26 images, and --data_path has 27" in capsys.readouterr().err


def test_no_step_is_made_of_blank_pictures(pictures, tmp_path, capsys):
    """The pictures go in the middle of an epoch whose log has no line soon: the checkpoint has seen only good ones."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    pretrain(folder, tmp_path / "whole")
    calls, original = itertools.count(), GradientStep.apply

    def apply_and_lose(self, *arguments):
        if next(calls) == 2:
            os.rename(folder, tmp_path / "gone")
        return original(self, *arguments)

    given = ["--print_freq", 1000, "--save_every_minutes", 0, "--max_bad_images", 0.1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientStep, "apply", apply_and_lose)
        with pytest.raises(SystemExit) as stop:
            pretrain(folder, tmp_path / "parts", *given)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "pictures cannot be decoded, more than --max_bad_images 0.1 allows" in said
    assert "No such file or directory" in said
    assert "Traceback" not in said
    assert content(tmp_path / "parts")["step"] == 3
    os.rename(tmp_path / "gone", folder)
    pretrain(folder, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_within_the_epoch_is_written_in_time(pictures, tmp_path):
    """Every step, here; a kill then loses one step at most, and repeats it exactly."""
    pretrain(pictures, tmp_path / "whole")
    with injected([{"kind": "crash", "forward": 9}]), pytest.raises(RuntimeError, match="struck"):
        pretrain(pictures, tmp_path / "parts", "--save_every_minutes", 0)
    assert 7 <= content(tmp_path / "parts")["step"] <= 9
    lines = pretrain(pictures, tmp_path / "parts")
    torch.testing.assert_close(
        content(tmp_path / "parts")["model"], content(tmp_path / "whole")["model"], rtol=0, atol=0
    )
    assert len(lines) == 2


def test_a_stop_during_evaluation_and_a_stop_before_the_first_step(pictures, tmp_path):
    given = ["--data_path", pictures, "--model", "vit_mini_patch4", "--batch_size", 4, "--lr", 1, "--epochs", 2]
    given += ["--num_workers", 0, "--warmup_epochs", 0]

    def probe(output) -> None:
        main_linprobe.main([str(value) for value in [*given, "--output_dir", output]])

    probe(tmp_path / "whole")
    import engine_finetune

    evaluate = engine_finetune.evaluate

    def interrupted(model, batches, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, batches, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_finetune, "evaluate", interrupted)
        for _ in range(2):  # the second time there is nothing left but to evaluate
            with pytest.raises(SystemExit) as stop:
                probe(tmp_path / "parts")
            assert stop.value.code == signals.PREEMPTED
    found = content(tmp_path / "parts")
    assert (found["epoch"], found["step"]) == (-1, found["steps_per_epoch"])
    probe(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_too_many_bad_images_of_an_evaluation_cost_no_step(tmp_path, capsys):
    """The checkpoint has the whole epoch; once the image is mended, the run goes on as if it had always been."""
    pictures = write_pictures(tmp_path / "pictures")
    given = ["--data_path", pictures, "--model", "vit_mini_patch4", "--epochs", 1, "--batch_size", 4, "--lr", 1e-3]
    given += ["--num_workers", 0, "--warmup_epochs", 0, "--aa", "null"]

    def finetune(output) -> None:
        main_finetune.main([str(value) for value in [*given, "--output_dir", output]])

    finetune(tmp_path / "whole")
    spoiled = pictures / "val" / "class0" / "0.jpg"
    good = spoiled.read_bytes()
    spoiled.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        finetune(tmp_path / "parts")
    assert stop.value.code == 2
    assert "1 of 12 pictures cannot be decoded, more than --max_bad_images" in capsys.readouterr().err
    assert content(tmp_path / "parts")["step"] == 3
    spoiled.write_bytes(good)
    finetune(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_one_step_with_nan_is_as_if_its_batch_had_been_left_out(pictures, tmp_path):
    """Its images carry no weight: the same run, in which that step's gradient is thrown away by hand."""
    with injected([{"kind": "nan", "forward": 3}]):
        lines = pretrain(pictures, tmp_path / "nan", "--epochs", 1)
    assert lines[0]["train_skipped_steps"] == 1
    assert np.isfinite(lines[0]["train_loss"])
    calls, original = iter(range(100)), GradientStep._step_unless
    with pytest.MonkeyPatch.context() as patch:
        step = lambda self, *arguments: next(calls) == 3 or original(self, *arguments)  # noqa: E731
        patch.setattr(GradientStep, "_step_unless", step)
        pretrain(pictures, tmp_path / "without", "--epochs", 1)
    torch.testing.assert_close(
        content(tmp_path / "nan")["model"], content(tmp_path / "without")["model"], rtol=0, atol=0
    )


def test_too_many_in_a_row_end_the_run_with_names_and_a_good_checkpoint(pictures, tmp_path, capsys):
    with injected([{"kind": "nan", "forward": list(range(3, 23))}]), pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path, "--epochs", 4)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "11 steps in a row were skipped, more than --max_skipped_steps 10" in error
    assert "the loss of rank 0 was not finite on" in error
    assert ".jpg" in error
    found = content(tmp_path)
    assert found["step"] == 14
    assert all(value.isfinite().all() for value in found["model"].values())
    assert int(found["optimizer"]["state"][0]["step"]) == 3


def test_a_skipped_step_leaves_running_statistics_alone():
    """BatchNorm, in the probe's head, changes them in the forward pass already."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    scaler = torch.amp.GradScaler(enabled=False)
    update = GradientStep(model, torch.optim.SGD(model.parameters(), 0.1), scaler)

    def step(inputs) -> bool:
        update.begin()
        loss = model(inputs).mean()
        update.backward(loss)
        return bool(update.apply(loss, 4).skipped)

    assert not step(torch.randn(4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert step(torch.full((4, 3), float("nan")))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not step(torch.randn(4, 3))
    assert not torch.equal(model[0].running_mean, before["0.running_mean"])


def test_an_optimizer_that_was_not_fused_continues(pictures, tmp_path):
    pretrain(pictures, tmp_path / "one", "--epochs", 1)
    saved = content(tmp_path / "one")
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = None
    checkpoint.save(tmp_path / "unfused.pth", saved)
    assert len(pretrain(pictures, tmp_path / "two", "--resume", tmp_path / "unfused.pth")) == 1
    saved["optimizer"]["param_groups"].pop()
    checkpoint.save(tmp_path / "unfused.pth", saved)
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path / "three", "--resume", tmp_path / "unfused.pth")
    assert stop.value.code == 2


def test_other_settings_of_a_continued_run_are_said(pictures, tmp_path, capsys):
    pretrain(pictures, tmp_path, "--epochs", 1)
    capsys.readouterr()
    pretrain(pictures, tmp_path, "--epochs", 1, "--masking", "sbam", "--num_workers", 1)
    said = capsys.readouterr().out
    assert "settings that were others before: --masking random -> sbam\n" in said


def test_within_an_epoch_the_names_must_be_the_same_and_the_folder_may_move(pictures, tmp_path, capsys):
    """As many images under other names are refused there, and between epochs said."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    with injected([{"kind": "SIGTERM", "forward": 2}]):
        stopped(folder, tmp_path / "run")
    folder = folder.rename(tmp_path / "moved")
    with injected([{"kind": "SIGTERM", "forward": 2}]):
        stopped(folder, tmp_path / "run")
    one = next(folder.rglob("train/**/*.jpg"))
    one.rename(one.with_name("zzz.jpg"))
    assert "have other names" in refusal(main_pretrain.main, flags(folder, tmp_path / "run"), capsys)
    pretrain(folder, tmp_path / "again", "--epochs", 1)
    one.with_name("zzz.jpg").rename(one)
    capsys.readouterr()
    pretrain(folder, tmp_path / "again")
    assert "the checkpoint is of 26 images, and the 26 of --data_path have other names" in capsys.readouterr().out


def test_the_classes_must_be_the_same(pictures, tmp_path, capsys):
    """A renamed folder would change what the head's outputs mean, also between epochs."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    given = ["--data_path", folder, "--model", "vit_mini_patch4", "--batch_size", 4, "--num_workers", 0]
    given += ["--warmup_epochs", 0, "--output_dir", tmp_path / "run", "--epochs"]
    main_finetune.main([str(value) for value in [*given, 1]])
    for split in ("train", "val"):
        (folder / split / "class0").rename(folder / split / "class2")
    said = refusal(main_finetune.main, [*given, 2], capsys)
    assert "the first that differs was 'class0' and is 'class1'" in said


class Remembers(masking.RandomMasking):
    """A strategy whose masks depend on how often it was called."""

    def __init__(self, mask_ratio: float = 0.75):
        super().__init__(mask_ratio)
        self.calls = torch.zeros((), dtype=torch.float64)

    def __call__(self, tokens, noise=None):
        self.calls += 1
        return super().__call__(tokens, (noise + 0.1 * float(self.calls)) % 1)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"].clone()


class Unsaveable(Remembers):
    """A strategy whose state would need code to be read."""

    def state_dict(self):
        return {"calls": [np.zeros(1)]}


def test_the_state_of_a_masking_strategy_is_saved_and_restored(pictures, tmp_path, capsys):
    more = ["--masking", "test_reliability:Remembers"]
    pretrain(pictures, tmp_path / "whole", *more)
    with injected([{"kind": "SIGTERM", "forward": 8}]):
        stopped(pictures, tmp_path / "parts", *more)
    pretrain(pictures, tmp_path / "parts", *more)
    assert content(tmp_path / "whole")["masking"]["calls"] == content(tmp_path / "parts")["masking"]["calls"] == 14
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    said = refusal(main_pretrain.main, flags(pictures, tmp_path, "--masking", "test_reliability:Unsaveable"), capsys)
    assert "the state_dict of the masking strategy Unsaveable holds ndarray" in said
