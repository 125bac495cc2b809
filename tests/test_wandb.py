"""Weights & Biases: what offline runs leave is read by W&B's own tool, and the training does not depend on it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import wandb
from faults import injected
from helpers import environment, log_lines, refusal
from runs import assert_same_run, flags, pretrain, stopped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import main_pretrain
from util import extras
from util.training import checkpoint


@pytest.fixture
def offline(monkeypatch):
    wandb.teardown()  # its environment is read once, and its process is passed on to ours
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(folder) -> dict[str, list]:
    """What W&B's own tool reads in the folder of an offline run, by the type of the records."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {}
    for record in map(json.loads, text.splitlines()):
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def runs(output) -> list[dict[str, list]]:
    return [records(folder) for folder in sorted((output / "wandb").glob("offline-run-*"))]


def points(run, name) -> dict[int, float]:
    """Return the values of a curve by the step that is its horizontal axis."""
    items = [record["item"] for record in run["history"]]
    return {item["step"]: item[name] for item in items if name in item}


def test_a_run_that_continues_is_the_same_there_and_trains_as_without(pictures, tmp_path, offline):
    pretrain(pictures, tmp_path / "whole")
    shown = ["--wandb", "my project", "--eval_every", 1, "--vis_every", 1]
    with injected([{"kind": "SIGTERM", "forward": 9}]):
        stopped(pictures, tmp_path / "parts", *shown)
    pretrain(pictures, tmp_path / "parts", *shown)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", ignore="monitor_")
    first, second = runs(tmp_path / "parts")
    for run, code, resumed in ((first, 75, 0), (second, 0, 1)):
        told = run["run"][0]
        assert (told["project"], told["display_name"]) == ("my project", "parts")
        assert told["run_id"] == (tmp_path / "parts" / "wandb_id.txt").read_text().strip()
        settings = told["config"]["update"]
        assert (settings["model"], settings["resolved"]["start_epoch"]) == ("mae_vit_mini_patch4", resumed)
        assert [record["exit_code"] for record in run["exit"]] == [code]
        assert run["metric"][0] == {"glob_name": "*", "options": run["metric"][0]["options"], "step_metric": "step"}
    events = EventAccumulator(str(tmp_path / "parts")).Reload()
    names = events.Tags()["scalars"]
    assert {"train/loss", "train/lr", "monitor/knn"} <= set(names)
    for name in names:
        found = points(first, name) | points(second, name)
        assert found == pytest.approx({event.step: event.value for event in events.Scalars(name)}, rel=1e-6), name
    assert list(points(first, "train/loss") | points(second, "train/loss")) == list(range(1, 15))
    assert set(points(second, "monitor/masks.path")) == {14}
    assert set(points(second, "monitor/mask_ratio._type").values()) == {"histogram"}
    assert len(list((tmp_path / "parts" / "wandb").glob("offline-run-*/files/media/images/monitor/masks*.png"))) == 2


def test_a_new_run_in_the_same_folder_is_a_new_one_there(pictures, tmp_path, offline):
    with injected([{"kind": "crash", "forward": 1}]), pytest.raises(RuntimeError, match="struck"):
        pretrain(pictures, tmp_path, "--wandb", "p")
    before = (tmp_path / "wandb_id.txt").read_text()
    main_pretrain.main(flags(pictures, tmp_path, "--wandb", "p", "--epochs", 0))
    assert (tmp_path / "wandb_id.txt").read_text() != before


@pytest.mark.parametrize("main", [main_finetune, main_linprobe], ids=lambda main: main.__name__)
def test_accuracies_are_there_and_an_evaluation_is_not(pictures, tmp_path, offline, main):
    given = ["--data_path", pictures, "--model", "vit_mini_patch4", "--batch_size", 8, "--warmup_epochs", 0]
    given += ["--num_workers", 0, "--epochs", 1, "--output_dir", tmp_path, "--wandb", "p"]
    given = [str(value) for value in given]
    main.main([*given, "--log_dir", str(tmp_path / "logs")])
    (run,) = runs(tmp_path / "logs")
    (line,) = log_lines(tmp_path)
    assert points(run, "test/acc1") == {checkpoint.load(tmp_path / checkpoint.LAST)["step"]: line["test_acc1"]}
    main.main([*given, "--eval"])
    assert not (tmp_path / "wandb").exists()


_KILLED = """
import os, pathlib, signal, sys
from util.training.wandb_run import WandbRun
folder = pathlib.Path(sys.argv[1])
run = WandbRun("p", folder, folder, {}, False)
run.log({"a": 1.0}, 1)
for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    number, name, _, parent, *_ = path.read_text().split()
    if int(parent) == os.getpid() and name == "(wandb-core)":
        os.kill(int(number), signal.SIGKILL)
        print("killed")
for step in range(5):
    run.log({"a": 1.0}, step)
run.finish(0)
print("goes on")
"""


def test_a_run_goes_on_if_wandb_does_not(tmp_path, offline):
    command = [sys.executable, "-c", _KILLED, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert result.stdout.split("\n")[:2] == ["killed", "goes on"], result.stderr
    assert result.stderr.count("points do not reach W&B") == 1
    assert result.returncode == 0


def test_without_a_login_it_is_refused_before_the_training(pictures, tmp_path, capsys, monkeypatch):
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    line = refusal(main_pretrain.main, flags(pictures, tmp_path / "run", "--wandb", "p"), capsys)
    wandb.teardown()
    assert "--wandb p: W&B does not take the run (" in line
    assert "run `wandb login`, or set WANDB_MODE=offline" in line
    assert not (tmp_path / "run" / "log.txt").exists()
    assert not (tmp_path / "run" / "wandb_id.txt").exists()


@pytest.mark.parametrize("name", ["", "a/b", "50%", "p" * 129])
@pytest.mark.parametrize("main", [main_pretrain, main_finetune, main_linprobe], ids=lambda main: main.__name__)
def test_a_name_that_is_no_project_is_refused(tmp_path, capsys, main, name):
    line = refusal(main.main, ["--output_dir", tmp_path / "run", "--wandb", name], capsys)
    assert f"--wandb {name!r}: name a project, in 1 to 128 letters without" in line
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_refused_at_once(tmp_path, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else there(name))
    line = refusal(main_pretrain.main, ["--output_dir", tmp_path / "run", "--wandb", "p"], capsys)
    assert "--wandb: needs another package: pip install wandb" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_is_not_taken_for_a_package(tmp_path, monkeypatch):
    """A run in the current folder leaves one that is called wandb."""
    (tmp_path / "folder_of_a_package").mkdir()
    (tmp_path / "a_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    extras.require("--flag", "a_package")
    with pytest.raises(ValueError, match="--flag: needs another package: pip install folder_of_a_package"):
        extras.require("--flag", "a_package", "folder_of_a_package")
