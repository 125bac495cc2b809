"""Images are prepared as the checkpoint's training did, unless the command says otherwise, which is said."""

from __future__ import annotations

import pytest
import torch
from helpers import refusal

import main_finetune
import main_linprobe
import main_pretrain
from util.training import checkpoint

FLAGS = "--in_chans 1 --batch_size 16 --epochs 1 --warmup_epochs 0 --num_workers 0 --data_path"
OWN = {main_finetune: ["--aa", "null", "--reprob", 0, "--lr", 0.01], main_linprobe: ["--lr", 10]}
GIVEN = ["--mean", 0.3, "--std", 0.2]
SUPERVISED = pytest.mark.parametrize("main", [main_finetune, main_linprobe], ids=lambda main: main.__name__)


def run(main, pictures, output, *more) -> dict | None:
    """Run a task, and return the settings in its checkpoint."""
    model = "mae_vit_mini_patch4" if main is main_pretrain else "vit_mini_patch4"
    arguments = [*FLAGS.split(), pictures, "--model", model, "--output_dir", output, *OWN.get(main, []), *more]
    main.main([str(argument) for argument in arguments])
    last = output / checkpoint.LAST
    return checkpoint.load(last)["args"] if last.is_file() else None


@pytest.fixture(scope="module")
def encoder(pictures, tmp_path_factory):
    """A checkpoint of pre-training with a mean and deviation of its own."""
    folder = tmp_path_factory.mktemp("encoder")
    run(main_pretrain, pictures, folder, *GIVEN)
    return folder / checkpoint.LAST


@SUPERVISED
def test_from_pre_training_over_the_task_to_its_evaluation(pictures, encoder, tmp_path, capsys, main):
    args = run(main, pictures, tmp_path / "task", "--finetune", encoder, "--crop_pct", 0.6)
    said = capsys.readouterr().out
    assert f"images are normalised with mean 0.3 and deviation 0.2 (as {encoder} was trained)" in said
    assert (args["mean"], args["std"]) == ([0.3], [0.2])
    measured = said[said.rindex("validation images: ") :].split(";")[0]  # accuracies and loss
    task = tmp_path / "task" / checkpoint.LAST
    run(main, pictures, tmp_path / "eval", "--eval", "--resume", task)
    said = capsys.readouterr().out
    assert f"(as {task} was trained)" in said
    assert measured in said  # crop_pct has followed, too
    run(main, pictures, tmp_path / "eval", "--eval", "--resume", task, "--mean", 0.5, "--std", 0.5, "--crop_pct", 1)
    said = capsys.readouterr().out
    assert measured not in said
    assert f"mean 0.5 and deviation 0.5 as given, but {task} was trained with mean 0.3 and deviation 0.2" in said
    assert f"cropped with --crop_pct 1.0 as given, but {task} was evaluated with 0.6" in said


def test_pre_training_follows_the_weights_it_starts_from_and_the_run_it_continues(pictures, encoder, tmp_path, capsys):
    assert run(main_pretrain, pictures, tmp_path, "--finetune", encoder)["mean"] == [0.3]
    capsys.readouterr()
    assert run(main_pretrain, pictures, tmp_path, "--epochs", 2)["std"] == [0.2]
    said = capsys.readouterr().out
    assert f"(as {tmp_path / checkpoint.LAST} was trained)" in said
    assert "settings that were others" not in said or "--mean" not in said
    args = run(main_pretrain, pictures, tmp_path, "--epochs", 3, "--mean", 0.4)  # each of the two by itself
    assert (args["mean"], args["std"]) == ([0.4], [0.2])
    assert "mean 0.4 and deviation 0.2 as given, but" in capsys.readouterr().out


def test_what_a_file_does_not_tell_is_the_default_and_said(pictures, encoder, tmp_path, capsys):
    torch.save({"model": checkpoint.load(encoder)["model"]}, tmp_path / "bare.pth")
    args = run(main_linprobe, pictures, tmp_path / "a", "--finetune", tmp_path / "bare.pth")
    assert args["mean"] == []
    assert f"(the default; {tmp_path / 'bare.pth'} does not tell its own)" in capsys.readouterr().out
    run(main_linprobe, pictures, tmp_path / "b", "--finetune", tmp_path / "bare.pth", *GIVEN)
    assert "mean 0.3 and deviation 0.2 (given)" in capsys.readouterr().out
    run(main_pretrain, pictures, tmp_path / "c")
    assert "mean 0.5 and deviation 0.5 (the default)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args", [{"mean": "grey"}, {"mean": [1, 2]}, {"mean": [0.5], "std": [0]}, {"mean": [float("inf")]}], ids=str
)
def test_what_cannot_be_is_one_sentence(pictures, encoder, tmp_path, capsys, args):
    content = checkpoint.load(encoder)
    checkpoint.save(tmp_path / "x.pth", content | {"args": content["args"] | args})
    flags = [*FLAGS.split(), pictures, "--output_dir", tmp_path / "run", "--finetune", tmp_path / "x.pth", "--model"]
    for main, model in ((main_pretrain, "mae_vit_mini_patch4"), (main_linprobe, "vit_mini_patch4")):
        assert "x.pth: its " in refusal(main.main, [*flags, model], capsys)


def test_an_encoder_given_to_eval_is_a_helpful_sentence(pictures, encoder, tmp_path, capsys):
    flags = [*FLAGS.split(), pictures, "--model", "vit_mini_patch4", "--output_dir", tmp_path]
    flags += ["--eval", "--resume", encoder]
    for main in (main_finetune, main_linprobe):
        said = refusal(main.main, flags, capsys)
        assert f"{encoder}: an encoder without a classifier's head, which --eval cannot evaluate" in said
        assert f"--finetune {encoder}" in said
        assert f"scripts/evaluate.py {encoder}" in said


@pytest.mark.parametrize("main", [main_pretrain, main_finetune, main_linprobe], ids=lambda main: main.__name__)
def test_weights_that_are_not_finite_are_refused_at_the_start(pictures, encoder, tmp_path, capsys, main):
    content = checkpoint.load(encoder)
    content["model"]["blocks.1.mlp.fc1.bias"][0] = torch.nan
    checkpoint.save(tmp_path / "x.pth", content)
    model = "mae_vit_mini_patch4" if main is main_pretrain else "vit_mini_patch4"
    flags = [*FLAGS.split(), pictures, "--model", model, "--output_dir", tmp_path / "run"]
    flags += ["--finetune", tmp_path / "x.pth"]
    assert "x.pth: blocks.1.mlp.fc1.bias is not finite" in refusal(main.main, flags, capsys)
