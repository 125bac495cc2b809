"""Settings: file and command line, types, and every user's mistake in one sentence with exit status 2."""

from __future__ import annotations

import dataclasses
import os
import runpy
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, environment, refusal, tiny_mae, write_pictures

import main_finetune
import main_linprobe
import main_pretrain
import methods
import models_mae
import models_vit
from evaluation import checkpoints, figures
from studies import sweep
from util import cli, config, ratios
from util.config import FinetuneSettings, LinprobeSettings, PretrainSettings
from util.suggest import nearest


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("mask_ratio: 0.5\nblr: 1e-3\ninput_size: 64\nmasking_args: {delta_r: 0.2}\nnorm_pix_loss: true\n")
    settings = cli.parse(PretrainSettings, ["--config", str(file), "--mask_ratio", "0.6"])
    assert (settings.mask_ratio, settings.blr, settings.input_size) == (0.6, 1e-3, [64])
    assert settings.masking_args == ["delta_r=0.2"]
    assert settings.norm_pix_loss is True


def test_flags_as_mae_users_write_them():
    settings = cli.parse(PretrainSettings, ["--norm_pix_loss", "--input_size", "224", "160", "--lr", "1e-4"])
    assert settings.norm_pix_loss is True
    assert settings.size("input_size") == (224, 160)
    assert cli.parse(FinetuneSettings, []).pools is True
    assert cli.parse(FinetuneSettings, ["--cls_token"]).pools is False
    assert cli.parse(LinprobeSettings, []).pools is False
    assert cli.parse(LinprobeSettings, ["--global_pool"]).pools is True
    assert cli.parse(FinetuneSettings, ["--aa", "null", "--no_pin_mem"]).aa is None
    assert cli.parse_options(["a=1", "b=0.5", "c=text", "d=1e-3"]) == {"a": 1, "b": 0.5, "c": "text", "d": 1e-3}


@pytest.mark.parametrize(
    ("task", "recipe", "flags", "expected"),
    [
        (FinetuneSettings, "finetune/vitb16", ["--cls_token"], {"pools": False}),
        (FinetuneSettings, "finetune/vitb16_ibot", ["--global_pool"], {"pools": True}),
        (LinprobeSettings, "linprobe/vitb16", ["--global_pool"], {"pools": True}),
        (LinprobeSettings, "linprobe/vitb16_simmim", ["--cls_token"], {"pools": False}),
        (LinprobeSettings, "linprobe/vitb16_simmim", ["--no_cls_token"], {"pools": True}),
        (LinprobeSettings, "linprobe/vits16_ibot", ["--blr", "0.005"], {"blrs": [], "blr": 0.005}),
        (LinprobeSettings, "linprobe/vits16_ibot", ["--lr", "0"], {"blrs": [], "lr": 0}),
        (LinprobeSettings, "linprobe/vits16_ibot", ["--blrs", "1"], {"blrs": [1]}),
        (LinprobeSettings, "linprobe/vits16_ibot", ["--config", "{two}"], {"lr": None, "blrs": [], "blr": 0.3}),
        (LinprobeSettings, "linprobe/vitb16", ["--config", "{one}", "--blr", "0.2"], {"lr": None, "blr": 0.2}),
        (LinprobeSettings, "linprobe/vitb16", ["--config", "{one}", "--blrs", "1"], {"lr": None, "blrs": [1]}),
    ],
)
def test_the_command_line_overrides_what_a_file_says_in_another_way(tmp_path, task, recipe, flags, expected):
    files = {"one": tmp_path / "one.yaml", "two": tmp_path / "two.yaml"}
    files["one"].write_text("lr: 0.1\n")
    files["two"].write_text("blr: 0.3\n")
    flags = [flag.format(**files) for flag in flags]
    settings = cli.parse(task, ["--config", str(ROOT / f"configs/{recipe}.yaml"), *flags])
    assert {name: getattr(settings, name) for name in expected} == expected


def test_the_written_config_can_be_used_again(tmp_path):
    from util.training import provenance

    settings = cli.parse(PretrainSettings, ["--masking", "sbam", "--masking_args", "delta=0.2", "--input_size", "64"])
    file = tmp_path / "config.yaml"
    provenance.write_config(file, provenance.describe(settings.as_dict(), {"lr": 1.0}))
    assert cli.parse(PretrainSettings, ["--config", str(file)]) == settings
    assert "revision" in file.read_text()
    assert "torch" in file.read_text()


def test_accumulation_follows_from_the_effective_batch(monkeypatch):
    settings = PretrainSettings(batch_size=64, effective_batch_size=4096, blr=1.5e-4)
    assert [settings.resolved_accum_iter(processes) for processes in (1, 8, 64)] == [64, 8, 1]
    assert {settings.resolved_lr(processes) for processes in (1, 8, 64)} == {2.4e-3}
    assert PretrainSettings(batch_size=64, accum_iter=2).resolved_accum_iter(4) == 2


@pytest.mark.parametrize(
    ("main", "text", "message"),
    [
        (main_pretrain, "mask_ratioo: 0.5", "did you mean 'mask_ratio'"),
        (main_pretrain, "mask_ratio: high", "--mask_ratio high: must be a number"),
        (main_pretrain, "epochs: 1.5", "--epochs 1.5: must be a whole number"),
        (main_pretrain, "norm_pix_loss: maybe", "norm_pix_loss"),
        (main_pretrain, "mask_ratio:", "--mask_ratio null: must be a number"),
        (main_pretrain, "seed: null", "--seed null: must be a whole number"),
        (main_pretrain, "amp: fp8", "--amp fp8: must be bf16 or fp16 or none"),
        (main_pretrain, "model: [a", "config"),
        (main_finetune, "layer_decay: 2", "--layer_decay 2.0: must be above 0"),
        (main_finetune, "remode: black", "--remode black: must be const or rand or pixel"),
        (main_linprobe, "batch_size: 1", "--batch_size 1: must be at least 2"),
        (main_linprobe, "probe_blocks: 0", "--probe_blocks 0: must be at least 1"),
    ],
)
def test_a_mistake_in_the_file(tmp_path, capsys, main, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    refused(main, ["--config", file, "--output_dir", tmp_path / "o"], message, capsys)


PRETRAIN = ["--dataset", "digits", "--in_chans", "1", "--model", "mae_vit_mini_patch4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask_ratioo", "0.5"], "did you mean 'mask_ratio'"),
        (["--mask_ratio", "0"], "--mask_ratio 0.0: must be between 0 and 1"),
        (["--mask_ratio", "1.2"], "--mask_ratio 1.2"),
        (["--mask_ratio", "nan"], "--mask_ratio nan"),
        (["--mask_ratio", "0.01"], "at least one must be kept"),
        (["--masking", "sbam_amr", "--mask_ratio", "0.9"], "ratios from 0.75 to 1.05"),
        (["--masking", "sbam_amr", "--masking_args", "delta_r=0.3"], "ratios from 0.45 to 1.05"),
        (["--masking", "sbamm"], "did you mean 'sbam'"),
        (["--masking", "sbam", "--masking_args", "delt=0.3"], "did you mean 'delta'"),
        (["--masking", "sbam", "--masking_args", "0.3"], "write name=value"),
        (["--masking", "nowhere:Masking"], "cannot be imported"),
        (["--input_size", "30"], "not a whole number of patches of 4"),
        (["--input_size", "32", "30"], "width of 30"),
        (["--model", "mae_vit_mini"], "did you mean 'mae_vit_mini_patch4'"),
        (["--in_chans", "2"], "1 (grey), 3 (RGB)"),
        (["--mean", "0.5", "0.5"], "one number for each of the 1 channels"),
        (["--crop_scale", "0.5"], "--crop_scale [0.5]"),
        (["--epochs", "-1"], "--epochs -1: must be at least 0"),
        (["--clip_grad", "0"], "--clip_grad 0.0"),
        (["--device", "tpu"], "--device tpu: must be cuda or cpu"),
        (["--log_dir", "/dev/null/here"], "--log_dir /dev/null/here: cannot be written"),
        (["--seed", "9" * 20], "must be below 2^63"),
        (["--masking", "sbam", "--masking_args", "randomness=[1"], "randomness is '[1'"),
        (["--effective_batch_size", "100", "--batch_size", "64"], "choose a --batch_size that divides it, such as 50"),
        (["--effective_batch_size", "128", "--accum_iter", "3"], "leave one of the three out"),
        (["--dataset", "folder"], "--data_path is not given"),
        (["--dataset", "folder", "--data_path", "/no/such/folder"], "there is no such folder"),
        (["--dataset", "imagenet"], "--dataset imagenet: unknown"),
        (["--resume", "absent.pth"], "absent.pth: there is no such checkpoint"),
        (["--output_dir", "/dev/null/here"], "--output_dir /dev/null/here: cannot be written"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["stray"], "no flag stands before"),
    ],
)
def test_a_mistake_in_pretraining_flags(tmp_path, capsys, flags, message):
    refused(main_pretrain, [*PRETRAIN, "--output_dir", tmp_path / "o", *flags], message, capsys)


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (main_finetune, ["--global_pool", "--cls_token"], "choose one of them"),
        (main_finetune, ["--mixup", "0.8", "--batch_size", "7"], "--batch_size 7: must be even"),
        (main_finetune, ["--nb_classes", "5"], "the pictures have 10 classes"),
        (main_finetune, ["--eval"], "name the checkpoint to evaluate"),
        (main_finetune, ["--finetune", "absent.pth"], "absent.pth: there is no such checkpoint"),
        (main_finetune, ["--crop_pct", "1.5"], "--crop_pct 1.5"),
        (main_finetune, ["--aa", "garbage"], "--aa garbage: no policy"),
        (main_finetune, ["--aa", "rand-m9.5"], "--aa rand-m9.5: no policy"),
        (main_finetune, ["--in_chans", "4"], "--aa needs 1 or 3 channels"),
        (main_finetune, ["--cutmix_minmax", "0.2"], "give two numbers"),
        (main_finetune, ["--cutmix_minmax", "0.8", "0.2"], "--cutmix_minmax [0.8, 0.2]: must be two rising numbers"),
        (main_linprobe, ["--dataset", "folder", "--data_path", "."], "<class>/<picture>"),
        (main_linprobe, ["--model", "vit_mini"], "did you mean 'vit_mini_patch4'"),
        (main_linprobe, ["--probe_blocks", "5"], "--probe_blocks 5: the model has 4 blocks; choose 1 to 4"),
        (main_linprobe, ["--last_blocks", "5"], "--last_blocks 5: the model has 4 blocks; choose 1 to 4"),
        (main_linprobe, ["--probe_blocks", "2", "--last_blocks", "3"], "--last_blocks 3: the model has 2 blocks"),
        (main_linprobe, ["--last_blocks", "0"], "--last_blocks 0: must be at least 1"),
        (main_linprobe, ["--global_pool", "--append_mean"], "are of the class token; use --cls_token"),
        (main_linprobe, ["--blrs", "0.1", "0"], "--blrs 0.1 0.0: every rate must be above 0"),
        (main_linprobe, ["--blrs", "0.1", "1e-1"], "--blrs 0.1 0.1: give each rate once"),
        (main_linprobe, ["--blrs", "0.1", "1", "--clip_grad", "1"], "--clip_grad 1.0: does not go with --blrs"),
        (main_linprobe, ["--blrs", "0.1", "1", "--lr", "0"], "--lr 0.0: does not go with --blrs"),
        (main_linprobe, ["--blrs", "0.1", "1", "--min_lr", "1e-6"], "--min_lr 1e-06: does not go with --blrs"),
        (main_linprobe, ["--no_batch_norm", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (main_linprobe, ["--optimizer", "adam"], "--optimizer adam: must be lars or sgd"),
    ],
)
def test_a_mistake_in_supervised_flags(tmp_path, capsys, main, flags, message):
    base = ["--dataset", "digits", "--in_chans", "1", "--model", "vit_mini_patch4", "--output_dir", tmp_path / "o"]
    refused(main, [*base, *flags], message, capsys)


def test_checkpoints_that_do_not_fit(tmp_path, capsys):
    other, weights, broken = tmp_path / "other.pth", tmp_path / "weights.pth", tmp_path / "broken.pth"
    torch.save({"model": tiny_mae().state_dict()}, other)
    torch.save({"model": models_mae.mae_vit_mini_patch4(in_chans=1).state_dict()}, weights)
    broken.write_bytes(weights.read_bytes()[:1000])
    flags = [*PRETRAIN, "--output_dir", tmp_path / "o"]
    refused(main_pretrain, [*flags, "--resume", other], "another architecture", capsys)
    refused(
        main_pretrain,
        [*flags, "--finetune", other],
        "cls_token is (1, 1, 48) in it and (1, 1, 96) in the model",
        capsys,
    )
    refused(main_pretrain, [*flags, "--resume", broken], "broken.pth: damaged", capsys)
    refused(main_pretrain, [*flags, "--resume", weights], "start from it with --finetune", capsys)
    flags = ["--dataset", "digits", "--in_chans", "1", "--model", "vit_mini_patch4", "--output_dir", tmp_path / "p"]
    refused(main_finetune, [*flags, "--finetune", other], "another architecture", capsys)
    assert not (tmp_path / "p" / "log.txt").exists()


def test_odd_checkpoints(tmp_path, capsys):
    binary, number = tmp_path / "binary.yaml", tmp_path / "number.pth"
    binary.write_bytes(bytes(range(128, 256)))
    torch.save({"model": 3}, number)
    flags = [*PRETRAIN, "--output_dir", tmp_path / "o"]
    refused(main_pretrain, [*flags, "--config", binary], "not a text file", capsys)
    refused(main_pretrain, [*flags, "--resume", number], "holds no model weights", capsys)


def test_classes_of_val_must_be_among_those_of_train(tmp_path, capsys):
    folder = write_pictures(tmp_path / "data")
    (folder / "val" / "class1").rename(folder / "val" / "another")
    flags = ["--data_path", folder, "--model", "vit_mini_patch4", "--output_dir", tmp_path / "o"]
    refused(main_finetune, flags, "classes of val/ that train/ has not: ['another']", capsys)


def refused(main, flags, message, capsys):
    flags = [*flags, "--epochs", "0"] if "--epochs" not in flags else flags  # what is not refused shall end soon
    with pytest.raises(SystemExit) as stop:
        main.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert message in error
    assert error.count("\n") == 1, error


@pytest.mark.parametrize("argv", [[], ["--masking_args", "delta_r=0.1", "--mask_ratio", "32/49", "--data_path", "1e3"]])
def test_print_config_shows_what_will_run_and_is_a_config(argv, tmp_path, capsys):
    argv = ["--config", str(ROOT / "configs/pretrain/digits.yaml"), "--epochs", "3", *argv]
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main([*argv, "--print_config"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    titles = [line[2:] for line in shown.splitlines() if line.startswith("# ")]
    assert titles == list(config.KINDS.values())
    file = tmp_path / "shown.yaml"
    file.write_text(shown)
    assert cli.parse(PretrainSettings, ["--config", str(file)]) == cli.parse(PretrainSettings, argv)
    assert yaml.safe_load(shown)["masking"] == "sbam_amr"


def test_help_has_every_flag_in_the_group_of_its_kind(capsys):
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    places = [said.index(f"{title}:") for title in config.KINDS.values()] + [len(said)]
    for kind, start, end in zip(config.KINDS, places, places[1:], strict=False):
        for name in config.names_of_kind(PretrainSettings, kind):
            assert f"--{name} " in said[start:end], name
    assert "(default: 0.2 1.0)" in said[said.index("--crop_scale [") :].partition("--exact_resize")[0]


def test_entries_of_a_mapping_are_changed_one_by_one(tmp_path):
    file, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text("masking_args: {delta_r: 0.15, name: text, flag: true, none: null, sizes: [1, 2]}\n")
    second.write_text("method_args: [ratio=32/49]\n")

    def options(*argv):
        settings = cli.parse(PretrainSettings, ["--config", str(file), *argv])
        return cli.parse_options(settings.masking_args)

    written = {"delta_r": 0.15, "name": "text", "flag": True, "none": None, "sizes": [1, 2]}
    assert options() == written
    assert options("--masking_args", "delta=0.2") == written | {"delta": 0.2}
    assert options("--masking_args", "delta_r=0.2", "--masking_args", "delta=1") == written | {
        "delta_r": 0.2,
        "delta": 1,
    }
    assert options("--masking_args") == {}  # empty: for a strategy that has none of these
    both = cli.parse(PretrainSettings, ["--config", str(file), "--config", str(second), "--method_args", "a=1"])
    assert (len(both.masking_args), both.method_args) == (5, ["ratio=32/49", "a=1"])
    with pytest.raises(ValueError, match=r"--method_args 0\.3: write name=value"):
        cli.parse_options(["0.3"], "method_args")


def test_a_ratio_as_a_fraction_goes_through_a_run(tmp_path):
    flags = ["--mask_ratio", "3/16", "--epochs", "0", "--num_workers", "0", "--output_dir", str(tmp_path)]
    main_pretrain.main([*PRETRAIN, "--input_size", "16", *flags])
    assert cli.parse(PretrainSettings, ["--config", str(tmp_path / "config.yaml")]).mask_ratio == "3/16"
    opened = checkpoints.open_checkpoint(tmp_path / "checkpoint-last.pth", "cpu")
    strategies = figures.standard_strategies(opened.settings, opened.strategy, 16)
    assert {strategies[name](torch.zeros(1, 16, 8)).num_keep.item() for name in ("random", "sbam")} == {13}


def test_a_flag_before_the_file_wins_too(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("mask_ratio: 32/49\nepochs: 5")
    settings = cli.parse(PretrainSettings, ["--epochs=3", "--config", str(file)])
    assert (settings.epochs, settings.mask_ratio) == (3, "32/49")


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--compile", "true"], "compile", True),
        (["--compile=false"], "compile", False),
        (["--no_compile"], "compile", False),
        (["--clip_grad", "null"], "clip_grad", None),
        (["--save_every_epochs", "null"], "save_every_epochs", None),
        (["--input_size"], "input_size", []),
        (["--finetune", ""], "finetune", None),  # as in MAE's scripts
        (["--epochs", "3", "--epochs", "4"], "epochs", 4),
    ],
)
def test_ways_to_write_a_value(flags, name, value):
    assert getattr(cli.parse(PretrainSettings, flags), name) == value


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 2: the alias *a is not supported"),
        ("epochs: " + "[" * 100_000, "line 1: more than 10 levels deep"),
        ("epochs: 3\nseed: 1\nepochs: 4\n", "line 3: the key epochs stands twice"),
        ("masking_args: {delta: 1, delta: 2}", "the key delta stands twice"),
        ("epochs: !!python/object/apply:os.system [ls]", "the tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("# nothing\n", "is empty; write one setting a line"),
        ("- epochs", "must be a mapping of names to values"),
        ("epochs: 2020-99-99", "a value cannot be read"),
        ("epochs: " + "9" * 5000, "a value cannot be read"),
        ("lr: .inf", "--lr inf: must be a number or null"),
        ("epochs: \x07", "special characters are not allowed"),
        ("x: 1\n" * 300_000, "more than 1 MiB"),
    ],
)
def test_yaml_that_harms(tmp_path, capsys, text, message):
    """In recipes and in sweeps alike: one loader."""
    file = tmp_path / "a.yaml"
    file.write_text(text)
    said = refusal(main_pretrain.main, ["--config", file, "--output_dir", tmp_path / "o"], capsys)
    assert message in said
    assert f"--config {file}: " in said or f"error: {file}: " in said
    if not text.startswith("lr"):
        with pytest.raises(ValueError, match=r"a\.yaml: ") as error:
            sweep.load(file)
        assert message in str(error.value)


@pytest.mark.parametrize("retired", cli._RETIRED)
def test_flags_of_mae_that_are_not_needed_say_what_replaces_them(retired, capsys):
    for flag in (f"--{retired}", f"--{retired.replace('_', '-')}=1"):
        said = refusal(main_pretrain.main, [flag, "1"], capsys)
        assert f"--{retired} is a flag of MAE's that does not exist here: " in said
        assert "did you mean" not in said


@pytest.mark.parametrize("name", ["gpu", "local", "port", "momentum", "url", "workers_init", "fold"])
def test_a_name_of_another_thing_is_not_suggested(name):
    assert nearest(name, [field.name for field in dataclasses.fields(PretrainSettings)]) == ""


def test_an_empty_output_dir(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "MAE then saves nothing" in refusal(main_pretrain.main, [*PRETRAIN, "--output_dir", ""], capsys)
    file = tmp_path / "a.yaml"
    file.write_text("output_dir: ''")
    assert "name one" in refusal(main_pretrain.main, [*PRETRAIN, "--config", file], capsys)


@pytest.mark.parametrize("task", [PretrainSettings, FinetuneSettings, LinprobeSettings])
def test_the_home_folder_in_every_path(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [name for name, field in task.__dataclass_fields__.items() if field.metadata.get("path")]
    assert {"data_path", "output_dir", "log_dir", "resume", "finetune"} == set(names)
    file = tmp_path / "a.yaml"
    file.write_text("".join(f"{name}: ~/{name}\n" for name in names))
    for argv in (["--config=~/a.yaml"], [f"--{name}=~/{name}" for name in names]):
        settings = cli.parse(task, argv)
        assert [getattr(settings, name) for name in names] == [str(tmp_path / name) for name in names]
    said = refusal(main_pretrain.main, ["--data_path", "~nobody-of-this-name/x"], capsys)
    assert "--data_path ~nobody-of-this-name/x: there is no such home folder" in said


SCRIPT_PATHS = {
    "evaluate": {"checkpoint", "output", "data_path"},
    "export": {"checkpoint", "output"},
    "pimr": {"table", "plot"},
    "plot": {"table", "output"},
    "sweep": {"sweep", "output"},
    "visualize": {"inputs", "output"},
}


@pytest.mark.parametrize("script", SCRIPT_PATHS)
def test_the_home_folder_in_every_path_of_the_scripts(script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(ROOT)
    actions = runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["make_parser"]()._actions
    kinds = (cli.path, cli.path_text)
    assert {action.dest for action in actions if action.type in kinds} == SCRIPT_PATHS[script]
    assert {str(kind("~/x")) for kind in kinds} == {str(tmp_path / "x")}


CLASSES = {"pretrain": PretrainSettings, "finetune": FinetuneSettings, "linprobe": LinprobeSettings}
RECIPES = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name in CLASSES)


def test_the_recipes_are_there():
    names = {f"{path.parent.name}/{path.stem}" for path in RECIPES}
    sizes = ("vitb16", "vitl16", "vith14")
    expected = {f"pretrain/{size}_{masking}" for size in sizes for masking in ("mae", "sbam", "sbam_amr")}
    expected |= {f"{task}/{size}" for task in ("finetune", "linprobe") for size in sizes}
    assert expected <= names


PUBLISHED = {  # effective batch, peak learning rate on 8 processes
    "pretrain": {"vitb16": (4096, 2.4e-3), "vitl16": (4096, 2.4e-3), "vith14": (4096, 2.4e-3)}
    | {"vits16": (1024, 2e-3), "continue": (1024, 1e-4), "vitb16_hpm": (2048, 1.2e-3)}
    | {
        f"vitb16_ibot{masking}": (1024, 3e-3)
        for masking in ("", "_attmask_high", "_attmask_hint", "_sbam", "_sbam_amr")
    }
    | {f"vitb16_simmim{masking}": (2048, 4e-4) for masking in ("", "_sbam", "_sbam_amr")},
    "finetune": {"vitb16": (1024, 2e-3), "vitl16": (1024, 4e-3), "vith14": (1024, 4e-3)}
    | {f"vitb16_{method}": (2048, 5e-3) for method in ("simmim", "bootmae")}
    | {"vitl16_bootmae": (1024, 1.5e-3)}
    | {f"{size}_ibot": (1024, 4e-3) for size in ("vits16", "vitb16")},
    "linprobe": {"vitb16": (16384, 6.4), "vitl16": (16384, 6.4), "vith14": (16384, 6.4)}
    | {"vitl16_bootmae": (16384, 4.48)}
    | {f"{size}_ibot": (1024, 36.0) for size in ("vits16", "vitb16")},
}


ONE_PROCESS = ("digits", "small_32", "small_64", "small_224")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses_and_builds(path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8" if path.stem not in ONE_PROCESS else "1")
    task = path.parent.name
    settings = cli.parse(CLASSES[task], ["--config", str(path)])
    if path.stem not in ONE_PROCESS:
        batch, lr = PUBLISHED[task].get(path.stem) or PUBLISHED[task][path.stem.split("_")[0]]
        assert settings.resolved_accum_iter(8) * settings.batch_size * 8 == batch
        assert settings.resolved_lr(8) == pytest.approx(lr)
        missing = {"data_path", "output_dir", "accum_iter"}
        assert not missing & yaml.safe_load(path.read_text()).keys()
        assert "torchrun" in path.read_text() or "_8gpu.sh" in path.read_text()
    if task == "pretrain":
        with torch.device("meta"):
            methods.from_settings(settings)
    else:
        with torch.device("meta"):
            model = models_vit.build_model(settings, 1000)
            if task == "linprobe":
                main_linprobe.add_head(model, settings)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "pretrain"], ids=lambda path: path.stem)
def test_a_recipe_says_how_much_disk_its_checkpoints_take(path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8" if path.stem != "digits" else "1")
    settings = cli.parse(PretrainSettings, ["--config", str(path)])
    every, last = settings.save_every_epochs, settings.last_epoch
    if every is None:
        return
    with torch.device("meta"):
        method = methods.from_settings(settings)
    moments = 2 * sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    size = (moments + sum(t.numel() * t.element_size() for t in method.state_dict().values())) / 1e9
    number = len([epoch for epoch in range(last + 1) if epoch % every == 0 or epoch == last])
    told = f"# Disk: {number} checkpoints of {size:.1f} GB are kept ({number * size:.0f} GB); --keep_last N"
    assert told in path.read_text() or (number * size < 10 and "# Disk" not in path.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_of_a_recipe_stands_under_its_kind(path):
    text = path.read_text()
    for kind, title in config.KINDS.items():
        group = text.partition(f"# {title.partition(':')[0]}\n")[2].partition("\n# What ")[0]
        assert yaml.safe_load(group).keys() <= config.names_of_kind(CLASSES[path.parent.name], kind)


@pytest.mark.parametrize("task", CLASSES.values())
def test_every_setting_says_what_it_is_and_of_which_kind(task):
    for field in dataclasses.fields(task):
        assert len(field.metadata["help"]) > 8, field.name
        assert field.metadata["kind"] in config.KINDS, field.name
    assert config.names_of_kind(task, *config.KINDS) == {field.name for field in dataclasses.fields(task)}
    assert {"amp", "seed", "model"} <= config.names_of_kind(task, "result")
    assert {"device", "compile"} <= config.names_of_kind(task, "speed")
    assert list(task().as_dict()) == [name for kind in config.KINDS for name in config.fields_of_kind(task, kind)]


@pytest.mark.parametrize(
    ("written", "exact"),
    [(0.7, (7, 10)), ("32/49", (32, 49)), ("0.75", (3, 4)), (1e-3, (1, 1000)), (Fraction(1, 3), (1, 3)), (1, (1, 1))],
)
def test_a_ratio_is_exactly_what_was_written(written, exact):
    assert ratios.exact_ratio(written) == Fraction(*exact)


@pytest.mark.parametrize("wrong", ["1/0", "a/b", "high", "", True, None, float("nan"), [0.5], "1/2/3", "9" * 30 + "/1"])
def test_what_is_no_ratio(wrong):
    with pytest.raises(ValueError, match="such as 32/49"):
        ratios.exact_ratio(wrong)


@pytest.mark.parametrize("task", ["pretrain", "finetune", "linprobe"])
def test_the_8_gpu_scripts_ask_for_what_is_missing(task):
    script = ROOT / "scripts" / f"{task}_8gpu.sh"
    result = subprocess.run(["bash", script, "configs/x.yaml"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "is missing; usage:" in result.stderr


def test_an_8_gpu_script_runs_its_main(tmp_path):
    """GPUS=1, on the CPU, from another folder: the command of the README up to the data."""
    config, pictures = ROOT / "configs/pretrain/digits.yaml", write_pictures(tmp_path / "pictures")
    flags = [config, pictures, tmp_path / "o", "--dataset", "folder", "--batch_size", "4", "--epochs", "0"]
    command = ["bash", ROOT / "scripts" / "pretrain_8gpu.sh", *flags, "--num_workers", "0"]
    variables = environment(GPUS="1", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=variables)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "o" / "checkpoint-last.pth").exists()
