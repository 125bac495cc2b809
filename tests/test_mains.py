"""The real mains on real JPEGs, on the CPU: they train, continue, evaluate, and leave what they promise."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil

import pytest
import torch
from helpers import MODEL_STRATEGIES, log_lines, run_main, write_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import main_pretrain
import masking
from masking import base
from methods import MAE
from util.training import checkpoint


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=2, per_class=6)


def pretrain(pictures, output, *more):
    flags = ["--data_path", pictures, "--model", "mae_vit_mini_patch4", "--input_size", 16, "--patch_size", 4]
    flags += ["--batch_size", 6, "--warmup_epochs", 0, "--num_workers", 0, "--epochs", 1, "--output_dir", output]
    main_pretrain.main([str(flag) for flag in (*flags, *more)])
    return log_lines(output) if (output / "log.txt").exists() else []


def supervised(main, pictures, output, *more):
    flags = ["--data_path", pictures, "--model", "vit_mini_patch4", "--input_size", 16, "--patch_size", 4]
    flags += ["--batch_size", 6, "--warmup_epochs", 0, "--num_workers", 0, "--epochs", 1, "--output_dir", output]
    main.main([str(flag) for flag in (*flags, *more)])
    return log_lines(output) if (output / "log.txt").exists() else []


@pytest.mark.parametrize("strategy", [n for n in masking.available() if base.needs(masking.create(n)) <= MAE.offers])
def test_pretraining_runs_two_steps_on_jpegs(pictures, tmp_path, strategy):
    (line,) = pretrain(pictures, tmp_path, "--masking", strategy, "--norm_pix_loss", "--save_every_epochs", 1)
    assert math.isfinite(line["train_loss"])
    assert line["epoch"] == 0
    assert 1 <= line["train_kept_tokens_min"] <= line["train_kept_tokens"] <= line["train_kept_tokens_max"] < 16
    assert ("train_salient_share" in line) == strategy.startswith("sbam")
    files = {path.name for path in tmp_path.iterdir() if not path.name.startswith("events")}
    assert files == {"checkpoint-last.pth", "checkpoint-0.pth", ".lock", "config.yaml", "log.txt"}
    content = torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)
    assert {"model", "optimizer", "scaler", "epoch", "step", "args"} <= content.keys()
    assert (content["epoch"], content["step"]) == (0, 2)
    assert content["args"]["masking"] == strategy
    assert content["model"]["pos_embed"].shape == (1, 17, 96)


def test_tensorboard_holds_the_promised_curves(pictures, tmp_path):
    pretrain(pictures, tmp_path, "--masking", "sbam_amr", "--print_freq", 1)
    events = EventAccumulator(str(tmp_path)).Reload()
    names = {"loss", "lr", "images_per_s", "grad_norm", "salient_share", "mask_ratio", "kept_tokens"}
    names |= {f"{name}_{end}" for name in ("mask_ratio", "kept_tokens") for end in ("min", "max")}
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss")) == 2


def test_a_finished_run_does_nothing_more(pictures, tmp_path):
    pretrain(pictures, tmp_path)
    before = (tmp_path / "checkpoint-last.pth").read_bytes()
    assert len(pretrain(pictures, tmp_path)) == 1
    assert (tmp_path / "checkpoint-last.pth").read_bytes() == before


def test_another_effective_batch_is_refused_when_continuing(pictures, tmp_path, capsys):
    pretrain(pictures, tmp_path)
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path, "--batch_size", 3)
    assert stop.value.code == 2
    assert "continue it with --effective_batch_size 6" in capsys.readouterr().err


def test_masking_warm_up_is_random_first(pictures, tmp_path):
    more = ["--masking", "sbam_amr", "--masking_warmup_epochs", 1, "--epochs", 2]
    first, second = pretrain(pictures, tmp_path, *more)
    assert first["train_kept_tokens_min"] == first["train_kept_tokens_max"] == 4
    assert "train_salient_share" not in first
    assert "train_salient_share" in second


@pytest.mark.parametrize("strategy", MODEL_STRATEGIES)
def test_accumulation_does_not_change_a_run(pictures, tmp_path, strategy):
    more = ["--masking", strategy, "--effective_batch_size", 6, "--lr", 1e-3]
    (one,) = pretrain(pictures, tmp_path / "one", *more, "--batch_size", 6)
    (three,) = pretrain(pictures, tmp_path / "three", *more, "--batch_size", 2)
    assert three["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)


def test_a_bf16_run_is_close_to_the_fp32_run(pictures, tmp_path):
    exact = pretrain(pictures, tmp_path / "fp32", "--masking", "sbam")
    rough = pretrain(pictures, tmp_path / "bf16", "--masking", "sbam", "--amp", "bf16")
    assert rough[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=2e-2)


def test_grey_pictures_on_a_grid_that_is_not_square(pictures, tmp_path):
    (line,) = pretrain(pictures, tmp_path, "--in_chans", 1, "--input_size", 16, 24, "--patch_size", 4, 8)
    assert line["train_kept_tokens"] == 3


def test_pretraining_starts_from_weights(pictures, tmp_path):
    pretrain(pictures, tmp_path / "a")
    pretrain(pictures, tmp_path / "b", "--epochs", 0, "--finetune", tmp_path / "a" / "checkpoint-last.pth")
    states = [checkpoint.load(tmp_path / name / "checkpoint-last.pth")["model"] for name in ("a", "b")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("main", [main_finetune, main_linprobe], ids=["finetune", "linprobe"])
@pytest.mark.parametrize("pooling", ["--global_pool", "--cls_token"])
def test_supervised_training_continues_and_evaluates(pictures, tmp_path, capsys, main, pooling):
    pretrain(pictures, tmp_path / "encoder")
    more = ["--finetune", tmp_path / "encoder" / "checkpoint-last.pth", pooling]
    if main is main_finetune:
        more += ["--mixup", 0.8, "--cutmix", 1.0, "--drop_path", 0.1]
    supervised(main, pictures, tmp_path / "task", *more)
    lines = supervised(main, pictures, tmp_path / "task", *more, "--epochs", 2)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[1]["test_images"] == 12
    assert lines[1]["test_acc1_best_epoch"] == max(line["test_acc1"] for line in lines)
    assert 0 <= lines[1]["test_acc1"] <= lines[1]["test_acc5"] <= 100
    assert not list((tmp_path / "task").glob("checkpoint-[0-9]*"))
    capsys.readouterr()
    trained = tmp_path / "task" / "checkpoint-last.pth"
    supervised(main, pictures, tmp_path / "evaluation", pooling, "--eval", "--resume", trained)
    said = capsys.readouterr().out
    assert f"accuracy on 12 validation images: {lines[1]['test_acc1']:.2f}%" in said
    assert not (tmp_path / "evaluation" / "checkpoint-last.pth").exists()


def test_evaluation_leaves_the_run_alone_and_needs_a_whole_classifier(pictures, tmp_path, capsys):
    pretrain(pictures, tmp_path / "encoder")
    encoder, task = tmp_path / "encoder" / "checkpoint-last.pth", tmp_path / "task"
    for main in (main_finetune, main_linprobe):
        run = task / main.__name__
        supervised(main, pictures, run, "--finetune", encoder)
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        accuracy = f"{log_lines(run)[-1]['test_acc1']:.2f}%"
        weights = tmp_path / f"{main.__name__}.pth"  # weights only, as published ones may be
        torch.save({"model": checkpoint.load(run / "checkpoint-last.pth")["model"]}, weights)
        for flags in ([], ["--resume", weights], ["--finetune", run / "checkpoint-last.pth"]):
            capsys.readouterr()
            supervised(main, pictures, run, "--eval", *flags)
            assert accuracy in capsys.readouterr().out
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        with pytest.raises(SystemExit):
            supervised(main, pictures, run, "--eval", "--resume", encoder)
        assert "an encoder without a classifier's head" in capsys.readouterr().err


def test_evaluation_numbers_the_classes_as_training_did(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", classes=3)
    shutil.rmtree(folder / "val" / "class0")
    (line,) = supervised(main_finetune, folder, tmp_path / "task")
    capsys.readouterr()
    supervised(main_finetune, folder, tmp_path / "task", "--eval")
    assert f"12 validation images: {line['test_acc1']:.2f}% (top 5 100.00%, loss {line['test_loss']:.4f})" in (
        capsys.readouterr().out
    )


def test_a_classifier_with_other_names_is_evaluated_in_the_order_of_the_folders(tmp_path, capsys):
    """Hugging Face's have tench, LABEL_0 or 0 where a folder is n01440764."""
    folder, run = write_pictures(tmp_path / "pictures", classes=3), tmp_path / "task"
    (line,) = supervised(main_finetune, folder, run)
    content = checkpoint.load(run / checkpoint.LAST)
    checkpoint.save(tmp_path / "other.pth", content | {"classes": ["tench", "goldfish", "shark"]})
    capsys.readouterr()
    supervised(main_finetune, folder, run, "--eval", "--finetune", tmp_path / "other.pth")
    said = capsys.readouterr().out
    assert f"18 validation images: {line['test_acc1']:.2f}% (top 5 100.00%, loss {line['test_loss']:.4f})" in said
    assert "in the same order: 'tench' is 'class0', ..., 'shark' is 'class2'" in said
    for classes, lacking in ((["class0", "class1", "shark"], ["class2"]), (list("abcd"), ["class0", "class1"])):
        checkpoint.save(tmp_path / "other.pth", content | {"classes": classes})
        with pytest.raises(SystemExit):
            supervised(main_finetune, folder, run, "--eval", "--finetune", tmp_path / "other.pth")
        said = capsys.readouterr().err
        assert f"other.pth: has {len(classes)} classes" in said
        assert f"without {lacking}"[:-1] in said


def test_folders_that_are_numbers_are_in_the_order_of_numbers(tmp_path, capsys):
    """As ImageNet-V2's, 0 to 999."""
    folder, run = write_pictures(tmp_path / "pictures", classes=11), tmp_path / "task"
    (line,) = supervised(main_finetune, folder, run)
    content = checkpoint.load(run / checkpoint.LAST)
    for split in ("train", "val"):
        for number, name in enumerate(content["classes"]):
            (folder / split / name).rename(folder / split / str(number))
    capsys.readouterr()
    supervised(main_finetune, folder, run, "--eval")
    said = capsys.readouterr().out
    assert f"{line['test_acc1']:.2f}% (top 5 {line['test_acc5']:.2f}%, loss {line['test_loss']:.4f})" in said
    assert f"{content['classes'][-1]!r} is '10'" in said
    torch.save({"model": content["model"]}, tmp_path / "nameless.pth")
    supervised(main_finetune, folder, run, "--eval", "--finetune", tmp_path / "nameless.pth")
    assert "names no classes; those of --data_path" in (said := capsys.readouterr().out)
    assert "as text: 0, 1, 10, ..." in said


def test_flags_of_the_optimizer_count_when_a_run_continues(pictures, tmp_path):
    supervised(main_finetune, pictures, tmp_path, "--layer_decay", 0.75)
    supervised(main_finetune, pictures, tmp_path, "--layer_decay", 0.5, "--weight_decay", 0.9, "--epochs", 2)
    groups = checkpoint.load(tmp_path / "checkpoint-last.pth")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.9}
    assert min(group["lr_scale"] for group in groups) == pytest.approx(0.5**5)


def test_resume_comes_before_finetune_even_with_the_same_file(pictures, tmp_path):
    supervised(main_finetune, pictures, tmp_path / "first")
    last = tmp_path / "first" / "checkpoint-last.pth"
    more = ["--resume", last, "--finetune", last, "--epochs", 2]
    assert [line["epoch"] for line in supervised(main_finetune, pictures, tmp_path / "second", *more)] == [1]


def test_a_cut_off_line_of_the_log_is_dropped(pictures, tmp_path):
    pretrain(pictures, tmp_path)
    with open(tmp_path / "log.txt", "a") as file:
        file.write('{"train_lo')
    assert [line["epoch"] for line in pretrain(pictures, tmp_path, "--epochs", 2)] == [0, 1]


def test_fp16_with_its_loss_scaling(pictures, tmp_path):
    exact = pretrain(pictures, tmp_path / "fp32", "--masking", "sbam_amr")
    rough = pretrain(pictures, tmp_path / "fp16", "--masking", "sbam_amr", "--amp", "fp16")
    assert rough[0]["train_loss"] == pytest.approx(exact[0]["train_loss"], rel=2e-2)
    assert checkpoint.load(tmp_path / "fp16" / "checkpoint-last.pth")["scaler"]["scale"] > 1


def test_finetuning_at_another_size(pictures, tmp_path):
    pretrain(pictures, tmp_path / "encoder")
    more = ["--finetune", tmp_path / "encoder" / "checkpoint-last.pth", "--input_size", 24, 20]
    (line,) = supervised(main_finetune, pictures, tmp_path / "task", *more)
    assert math.isfinite(line["train_loss"])


def test_the_probe_changes_nothing_but_its_head(pictures, tmp_path):
    pretrain(pictures, tmp_path / "encoder")
    start = checkpoint.load(tmp_path / "encoder" / "checkpoint-last.pth")["model"]
    more = ["--finetune", tmp_path / "encoder" / "checkpoint-last.pth", "--epochs", 2]
    supervised(main_linprobe, pictures, tmp_path / "task", *more)
    end = checkpoint.load(tmp_path / "task" / "checkpoint-last.pth")["model"]
    shared = [name for name in end if name in start]
    assert len(shared) > 50
    assert all(torch.equal(start[name], end[name]) for name in shared)
    assert end["head.1.weight"].abs().max() > 0


def test_a_learning_rate_that_is_too_high_ends_the_run_with_advice(pictures, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path, "--lr", 1e30, "--epochs", 3, "--max_skipped_steps", 2, "--print_freq", 1)
    assert stop.value.code == 1
    assert "lower --blr" in capsys.readouterr().err


def test_a_strategy_of_ones_own_from_the_current_folder(pictures, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import masking\n"
        "class Mine(masking.SBAM):\n"
        "    def num_keep(self, num_salient, num_tokens):\n"
        "        return 5\n"
    )
    flags = ["--data_path", pictures, "--model", "mae_vit_mini_patch4", "--batch_size", 6, "--epochs", 1]
    flags += ["--warmup_epochs", 0, "--num_workers", 0, "--output_dir", tmp_path / "o", "--masking", "mine:Mine"]
    result = run_main("main_pretrain.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert log_lines(tmp_path / "o")[0]["train_kept_tokens"] == 5
    assert "progress" not in result.stdout
    assert result.stdout.count("\n") < 20  # plain lines where there is no terminal
    assert json.loads((tmp_path / "o" / "log.txt").read_text())


def test_a_run_takes_its_loader_workers_with_it(pictures, tmp_path):
    """Several in one process, as in a notebook, would gather hundreds."""
    before = set(multiprocessing.active_children())  # of tests that interrupted a run, where pytest holds its traceback
    pretrain(pictures, tmp_path / "encoder", "--num_workers", 2, "--epochs", 2, "--eval_every", 1)
    assert set(multiprocessing.active_children()) <= before
    supervised(main_linprobe, pictures, tmp_path / "probe", "--num_workers", 2, "--epochs", 2)
    assert set(multiprocessing.active_children()) <= before


def test_more_workers_than_cores_only_warn(pictures, tmp_path):
    with pytest.warns(UserWarning, match="--num_workers 3000: this machine has"):
        pretrain(pictures, tmp_path, "--num_workers", 3000, "--epochs", 0)


def test_cuda_that_is_not_there_only_warns(pictures, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.warns(UserWarning, match="training on the CPU instead"):
        pretrain(pictures, tmp_path, "--device", "cuda", "--epochs", 0)
