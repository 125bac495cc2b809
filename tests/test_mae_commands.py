"""MAE's command lines: those of its pages work unchanged; what cannot is one sentence that says what to type."""

from __future__ import annotations

import argparse
import pickle
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, environment, log_lines, refusal, write_pictures
from runs import flags, pretrain

import main_finetune
import main_pretrain
import models_mae
import submitit_launch
from util import cli
from util.config import FinetuneSettings, LinprobeSettings, PretrainSettings
from util.training import checkpoint

FINETUNE = "--weight_decay 0.05 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval --data_path data"
# The launcher's script and flags of its two pages; effective batch, peak learning rate.
LAUNCHED = {
    "pretrain --job_dir jobs/%j --nodes 8 --use_volta32 --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss "
    "--mask_ratio 0.75 --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path data": (
        4096,
        2.4e-3,
    ),
    "finetune --job_dir jobs --nodes 4 --batch_size 32 --model vit_base_patch16 --finetune a.pth --epochs 100 "
    f"--blr 5e-4 --layer_decay 0.65 --drop_path 0.1 {FINETUNE}": (1024, 2e-3),
    "finetune --job_dir jobs --nodes 4 --batch_size 32 --model vit_large_patch16 --finetune a.pth --epochs 50 "
    f"--blr 1e-3 --layer_decay 0.75 --drop_path 0.2 {FINETUNE}": (1024, 4e-3),
    "finetune --job_dir jobs --nodes 8 --use_volta32 --batch_size 16 --model vit_huge_patch14 --finetune a.pth "
    f"--epochs 50 --blr 1e-3 --layer_decay 0.75 --drop_path 0.3 {FINETUNE}": (1024, 4e-3),
    "linprobe --job_dir jobs --nodes 4 --batch_size 512 --model vit_base_patch16 --cls_token --finetune a.pth "
    "--epochs 90 --blr 0.1 --weight_decay 0.0 --dist_eval --data_path data": (16384, 6.4),
}


@pytest.mark.parametrize("command", LAUNCHED, ids=lambda command: " ".join(command.split()[:6]))
def test_a_launcher_of_mae_submits_the_same_job(command, tmp_path, capsys, monkeypatch):
    task, *flags = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", [f"submitit_{task}.py", *flags, "--dry_run"])
    runpy.run_path(str(ROOT / f"submitit_{task}.py"), run_name="__main__")
    script = capsys.readouterr().out
    nodes = flags[flags.index("--nodes") + 1]
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert "#SBATCH --ntasks-per-node=8\n" in script
    assert ("#SBATCH --constraint=volta32gb\n" in script) == ("--use_volta32" in flags)
    assert f"{tmp_path}/jobs" in script

    given, rest = submitit_launch.make_parser().parse_known_args([task, *flags])
    settings = submitit_launch.check_task(given, rest)
    size = 8 * int(nodes)
    assert (settings.resolved_effective_batch_size(size), settings.resolved_lr(size)) == pytest.approx(
        LAUNCHED[command]
    )


def test_the_number_of_a_job_in_the_name_of_its_folder(tmp_path):
    """As submitit runs the job: pickled here, called there."""
    flags = ["--data_path", str(write_pictures(tmp_path / "pictures")), "--batch_size", "4", "--epochs", "0"]
    flags += ["--num_workers", "0", "--device", "cpu", "--model", "mae_vit_mini_patch4"]
    flags += ["--output_dir", str(tmp_path / "%j")]
    (tmp_path / "job.pkl").write_bytes(pickle.dumps(submitit_launch.Job("pretrain", flags)))
    code = f"import pickle; pickle.load(open({str(tmp_path / 'job.pkl')!r}, 'rb'))()"
    job = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    variables = environment(**job, SLURM_JOB_NUM_NODES="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29518")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=variables)
    assert result.returncode == 0, result.stderr
    assert checkpoint.load(tmp_path / "4711" / checkpoint.LAST)["epoch"] == -1
    assert not (tmp_path / "%j").exists()


MAINS = {
    "main_pretrain.py --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 800 "
    "--warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path data": PretrainSettings,
    "main_pretrain.py --model mae_vit_huge_patch14_dec512d8b --accum_iter 4 --no_pin_mem --log_dir '' --resume '' "
    "--device cuda --seed 0 --min_lr 0. --lr 1e-4": PretrainSettings,
    f"main_finetune.py --accum_iter 4 --batch_size 32 --model vit_base_patch16 --finetune a.pth {FINETUNE} "
    "--epochs 100 --blr 5e-4 --layer_decay 0.65 --drop_path 0.1": FinetuneSettings,
    "main_finetune.py --eval --resume a.pth --model vit_base_patch16 --batch_size 16 "
    "--data_path data": FinetuneSettings,
    "main_finetune.py --model vit_large_patch16 --clip_grad 1 --color_jitter 0.4 --aa rand-m9-mstd0.5-inc1 "
    "--smoothing 0.1 --remode pixel --recount 1 --cutmix_minmax 0.2 0.8 --mixup_prob 1.0 --mixup_switch_prob 0.5 "
    "--mixup_mode batch --global_pool --nb_classes 1000 --input_size 448 --num_workers 10 --pin_mem": FinetuneSettings,
    "main_linprobe.py --batch_size 512 --accum_iter 4 --model vit_base_patch16 --cls_token --finetune a.pth "
    "--epochs 90 --blr 0.1 --weight_decay 0.0 --dist_eval --data_path data": LinprobeSettings,
}


@pytest.mark.parametrize("command", MAINS)
def test_flags_of_maes_mains_are_taken(command):
    _, *flags = shlex.split(command)
    settings = cli.parse(MAINS[command], flags)
    assert settings.model in command


def test_a_rank_that_no_launcher_gave_is_refused(tmp_path, capsys, monkeypatch):
    flags = ["--dataset", "digits", "--output_dir", tmp_path / "o"]
    assert "start the script with torchrun" in refusal(main_pretrain.main, [*flags, "--local-rank=0"], capsys)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "start the script with torchrun" in refusal(main_pretrain.main, [*flags, "--local-rank=1"], capsys)


def test_what_scripts_look_for_in_the_output_and_the_log(tmp_path, capsys):
    pictures, output = write_pictures(tmp_path / "pictures"), tmp_path / "o"
    flags = ["--model", "vit_mini_patch4", "--data_path", pictures, "--batch_size", 4, "--num_workers", 0]
    training = ["--epochs", 1, "--warmup_epochs", 0, "--output_dir", output]
    for more in (training, ["--eval", "--resume", output / checkpoint.LAST]):
        main_finetune.main([str(flag) for flag in [*flags, *more]])
        said = capsys.readouterr().out
        (line,) = log_lines(output)
        (found,) = re.findall(r"^\* Acc@1 (\d+\.\d{3}) Acc@5 (\d+\.\d{3}) loss (\d+\.\d{3})$", said, re.MULTILINE)
        expected = [line[f"test_{name}"] for name in ("acc1", "acc5", "loss")]
        assert [float(value) for value in found] == pytest.approx(expected, abs=6e-4)
    model = checkpoint.load(output / checkpoint.LAST)["model"]
    assert line["n_parameters"] == sum(parameter.numel() for parameter in model.values())


def test_continuing_a_file_of_maes_tells_only_what_has_changed(tmp_path, capsys):
    """It holds one number for a size, the learning rate that followed, and settings that do not exist here."""
    pictures = write_pictures(tmp_path / "pictures")
    given = ["--input_size", 16, "--blr", 0.05]
    pretrain(pictures, tmp_path / "first", "--epochs", 1, *given)
    content = checkpoint.load(tmp_path / "first" / checkpoint.LAST)
    args = content["args"] | {"input_size": 16, "lr": 1e-3, "dist_url": "env://", "start_epoch": 0, "mask_ratio": 0.75}
    theirs = {"args": argparse.Namespace(**args)}
    theirs |= {name: content[name] for name in ("model", "optimizer", "epoch", "scaler")}
    torch.save(theirs, tmp_path / "checkpoint-0.pth")
    capsys.readouterr()
    same = [*given, "--resume", tmp_path / "checkpoint-0.pth", "--epochs", 1]
    main_pretrain.main(flags(pictures, tmp_path / "same", *same))  # nothing is left to train
    said = capsys.readouterr().out
    assert "after epoch 0" in said
    assert "settings that were others before" not in said
    main_pretrain.main(flags(pictures, tmp_path / "other", *same, "--mask_ratio", 0.5, "--lr", 2e-3))
    assert "others before: --lr 0.001 -> 0.002; --mask_ratio 0.75 -> 0.5\n" in capsys.readouterr().out


def test_a_file_of_maes_fine_tuning_tells_only_what_has_changed(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures")
    flags = ["--model", "vit_mini_patch4", "--data_path", pictures, "--batch_size", 4, "--num_workers", 0]
    flags = [str(flag) for flag in [*flags, "--epochs", 1, "--warmup_epochs", 0, "--output_dir"]]
    main_finetune.main([*flags, str(tmp_path / "first")])
    content = checkpoint.load(tmp_path / "first" / checkpoint.LAST)
    args = content["args"] | {"input_size": 16, "lr": 1e-3 * 4 / 256, "global_pool": True, "nb_classes": 2}
    args |= {"cutmix_minmax": None, "dist_eval": False}
    torch.save(content | {"args": argparse.Namespace(**args)}, tmp_path / "theirs.pth")
    capsys.readouterr()
    main_finetune.main([*flags, str(tmp_path / "same"), "--resume", str(tmp_path / "theirs.pth")])
    assert "settings that were others before" not in capsys.readouterr().out
    main_finetune.main([*flags, str(tmp_path / "other"), "--resume", str(tmp_path / "theirs.pth"), "--smoothing", "0"])
    assert "others before: --smoothing 0.1 -> 0.0\n" in capsys.readouterr().out


def test_the_full_names_of_maes_models():
    with torch.device("meta"):
        model = models_mae.create_model("mae_vit_large_patch16_dec512d8b")
    assert (len(model.blocks), len(model.decoder_blocks), model.decoder_embed.out_features) == (24, 8, 512)
    with pytest.raises(ValueError, match="mae_vit_small_patch16_dec512d8b"):  # its decoder is another
        models_mae.create_model("mae_vit_small_patch16_dec512d8b")
