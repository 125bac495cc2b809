"""`--stop_after_epoch`: a part of a long schedule, as in the whole run, and continued as if it had not ended."""

from __future__ import annotations

import pytest
from helpers import log_lines, refusal, write_pictures
from runs import assert_same_run, content, flags, pretrain

import main_finetune
import main_pretrain
from util.training import checkpoint


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_a_part_of_a_schedule_and_the_rest_are_the_whole(pictures, tmp_path, capsys):
    schedule = ["--epochs", 4, "--warmup_epochs", 1, "--masking", "sbam_amr"]
    whole = pretrain(pictures, tmp_path / "whole", *schedule)
    rates = [line["train_lr"] for line in whole]
    assert len(set(rates)) == 4

    part = pretrain(pictures, tmp_path / "part", *schedule, "--stop_after_epoch", 1)
    said = capsys.readouterr().out
    assert "--stop_after_epoch 1 of a schedule of 4 epochs: done; the same command without it continues" in said
    assert [line["train_lr"] for line in part] == rates[:2]  # not annealed
    assert [line["train_loss"] for line in part] == [line["train_loss"] for line in whole[:2]]
    kept = checkpoint.load(tmp_path / "part" / "checkpoint-1.pth")
    assert (kept["epoch"], kept["args"]["epochs"]) == (1, 4)
    before = (tmp_path / "part" / checkpoint.LAST).read_bytes()
    assert len(pretrain(pictures, tmp_path / "part", *schedule, "--stop_after_epoch", 1)) == 2  # nothing is left
    assert (tmp_path / "part" / checkpoint.LAST).read_bytes() == before

    capsys.readouterr()
    pretrain(pictures, tmp_path / "part", *schedule)
    said = capsys.readouterr().out
    assert "checkpoint-last.pth after epoch 1" in said
    assert "settings that were others before" not in said  # the result is the same
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_fine_tuning_stops_too_and_evaluates_the_epoch(pictures, tmp_path):
    pretrain(pictures, tmp_path / "p", "--epochs", 1)
    given = ["--model", "vit_mini_patch4", "--finetune", tmp_path / "p" / checkpoint.LAST, "--warmup_epochs", 0]
    given += ["--data_path", pictures, "--batch_size", 4, "--num_workers", 0, "--epochs", 3]
    output = tmp_path / "f"
    main_finetune.main([str(flag) for flag in [*given, "--output_dir", output, "--stop_after_epoch", 0]])
    (line,) = log_lines(output)
    assert 0 <= line["test_acc1"] <= 100
    assert content(output)["epoch"] == 0


@pytest.mark.parametrize("epoch", [2, -1, 800])
def test_an_epoch_outside_of_the_schedule_is_refused(pictures, tmp_path, capsys, epoch):
    said = refusal(main_pretrain.main, flags(pictures, tmp_path / "o", "--stop_after_epoch", epoch), capsys)
    assert f"--stop_after_epoch {epoch}: must be an epoch of the schedule, 0 to 1; --epochs is the length" in said
    assert not (tmp_path / "o").exists()
