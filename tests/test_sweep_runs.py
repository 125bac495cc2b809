"""Sweeps that run: what is done is skipped, what is stopped continues, and the table of what came out."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import ROOT, environment, refusal, write_pictures

from studies import sweep, tables
from util.distributed import signals
from util.training import checkpoint


def script():
    return runpy.run_path(str(ROOT / "scripts/sweep.py"), run_name="sweep")["main"]


def status_of(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        script()(list(map(str, arguments)))
    return stop.value.code


@pytest.fixture
def small(tmp_path):
    """Write a sweep file of runs that take less than a second each, on twelve pictures."""
    pictures = write_pictures(tmp_path / "pictures")
    pretrain = {"model": "mae_vit_mini_patch4", "input_size": 16, "data_path": str(pictures), "batch_size": 4}
    pretrain |= {"epochs": 1, "warmup_epochs": 0, "lr": 0.001, "num_workers": 0, "save_every_epochs": None}

    def write_small(pretrain_changes=(), **changes):
        content = {"output": "out", "grid": {"seed": [0]}, "measure": {"evaluate": {"metrics": ["rank_me"]}}}
        content |= {"pretrain": pretrain | dict(pretrain_changes)} | changes
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write_small


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, ROOT / "scripts/sweep.py", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env=environment(), cwd=ROOT, **pipes)


def state_of(path, output):
    """The steps that are left of a sweep of one run, and the checkpoints with a row in its table."""
    (found,) = sweep.expand(sweep.load(path), output)
    found.check()
    return [step.folder.name for step in found.left()], [row["checkpoint"] for row in found.rows()]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_sweep_is_stopped_and_continued_and_one_of_its_runs_fails(small, tmp_path, capsys):
    """The whole thing, in processes. A failed run does not end the sweep, and it alone is left."""
    path, output = small({"epochs": 40}, grid={"lr": [1e-3, 1e30]}), tmp_path / "o"
    process = start(path, "--output", output, "--parallel", 2)
    log = output / "lr=0.001" / "pretrain" / "log.txt"
    end = time.monotonic() + 240
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == signals.PREEMPTED, said
    assert "lr=0.001: pretrain was stopped" in said
    assert said.endswith("stopped; the same command continues\n")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(output) not in listed
    last = output / "lr=0.001" / "pretrain" / "checkpoint-last.pth"
    assert 0 < checkpoint.load(last)["step"] < 120

    assert status_of(path, "--output", output, "--parallel", 2) == 1
    said = capsys.readouterr().out
    assert said.startswith("2 runs, 0 done\n")
    assert f"pretrain failed, see {output}/lr=1e+30/pretrain/output.txt" in said
    assert "lower --blr" in (output / "lr=1e+30" / "pretrain" / "output.txt").read_text()
    assert "checkpoint-last.pth" in (output / "lr=0.001" / "pretrain" / "output.txt").read_text()
    assert checkpoint.load(last)["step"] == 120
    (row,) = tables.read_csv(output / "results.csv").to_dict("records")
    assert (row["lr"], row["checkpoint"]) == (1e-3, "last")
    assert row["rank_me"] > 1
    assert 0.6 < row["train_mask_ratio"] < 0.9
    assert (output / "results.md").read_text() in said
    epochs = tables.read_csv(output / "epochs.csv").query("lr == 0.001")
    assert epochs["epoch"].tolist() == list(range(40))
    assert epochs["train_loss"].iloc[-1] == row["train_loss"] < epochs["train_loss"].iloc[0]

    script()([str(path), "--output", str(output), "--dry_run"])
    commands = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("# ")]
    assert [command.split()[1] for command in commands] == ["main_pretrain.py", "scripts/evaluate.py"]
    assert all("lr=1e+30" in command for command in commands)
    stamp = last.stat().st_mtime_ns
    assert status_of(small({"epochs": 40}, grid={"lr": [1e-3]}), "--output", output) == 0
    assert "1 runs, 1 done" in capsys.readouterr().out
    assert last.stat().st_mtime_ns == stamp


def test_a_longer_training_is_measured_again_and_other_flags_are_an_error(small, tmp_path, capsys):
    output = tmp_path / "o"
    folder, only = output / "seed=0", ("--output", output, "--only", "seed=0")
    assert status_of(small(), *only) == 0
    first = result_of(folder / "evaluate-last")
    path = small({"epochs": 2})
    assert state_of(path, output)[0] == ["pretrain", "evaluate-last"]
    assert status_of(path, *only) == 0
    assert "checkpoint-last.pth after epoch 0" in (folder / "pretrain" / "output.txt").read_text()
    second = result_of(folder / "evaluate-last")
    assert second["rank_me"] != first["rank_me"]
    assert status_of(path, "--output", output, "--gather") == 0
    assert tables.read_csv(output / "results.csv")["rank_me"].tolist() == [second["rank_me"]]
    (aside,) = folder.glob("evaluate-last-replaced-*")
    assert result_of(aside) == first

    # What only makes it fast may differ; what is measured may, and is measured again.
    other = {"evaluate": {"metrics": ["rank_me"], "pool": "cls"}}
    assert state_of(small({"epochs": 2, "num_workers": 1}), output) == ([], ["last"])
    assert state_of(small({"epochs": 2}, measure=other), output) == (["evaluate-last"], [])

    for changes, told in (({"lr": 1e-9}, "--lr 0.001 (1e-09 is asked for)"), ({"epochs": 1}, "--epochs 2 (1 is")):
        for flag in ("--parallel=1", "--gather", "--dry_run"):
            said = refusal(script(), [small({"epochs": 2} | changes), "--output", output, flag], capsys)
            assert f"{output}/seed=0/pretrain: holds a pre-training with {told}" in said


def test_a_part_of_a_schedule_is_measured_and_continued(small, tmp_path, capsys):
    """As the 400-epoch numbers of a schedule of 800: nothing is trained past the checkpoint that is measured."""
    output, changes = tmp_path / "o", {"epochs": 3, "stop_after_epoch": 1, "save_every_epochs": 1}
    folder = output / "seed=0" / "pretrain"
    path = small(changes, checkpoints=["last"])
    assert status_of(path, "--output", output, "--only", "seed=0") == 0
    assert checkpoint.load(folder / "checkpoint-last.pth")["epoch"] == 1
    assert state_of(path, output) == ([], ["last"])
    said = refusal(script(), [small(changes, checkpoints=[2]), "--output", output, "--gather"], capsys)
    assert "keeps none of this epoch, with epoch 1 the last" in said

    whole = small(changes | {"stop_after_epoch": None}, checkpoints=["last"])
    assert state_of(whole, output) == (["pretrain", "evaluate-last"], [])
    assert status_of(whole, "--output", output, "--only", "seed=0") == 0
    assert "checkpoint-last.pth after epoch 1" in (folder / "output.txt").read_text()
    said = refusal(script(), [small(changes, checkpoints=["last"]), "--output", output, "--gather"], capsys)
    assert f"{folder}: checkpoint-last.pth is of epoch 2, after --stop_after_epoch 1; measure checkpoints: [1]" in said
    assert state_of(small(changes, checkpoints=[1]), output) == (["evaluate-1"], [])


def test_a_run_of_another_sweep_is_taken_over(small, tmp_path):
    """Linked, or moved: where its checkpoint lies does not matter, what is in it does."""
    measure = {"linprobe": {"model": "vit_mini_patch4", "epochs": 1, "batch_size": 6, "num_workers": 0}}
    measure["linprobe"]["data_path"] = str(tmp_path / "pictures")
    path = small(measure=measure)
    assert status_of(path, "--output", tmp_path / "one", "--only", "seed=0") == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "seed=0").symlink_to(tmp_path / "one" / "seed=0")
    assert state_of(path, tmp_path / "other") == ([], ["last"])
    pretrain = tmp_path / "one" / "seed=0" / "pretrain"
    content = checkpoint.load(pretrain / "checkpoint-last.pth")
    content["model"]["cls_token"] += 1
    torch.save(content, pretrain / "checkpoint-last.pth")
    assert state_of(path, tmp_path / "other") == (["linprobe-last"], [])


def test_done_is_what_the_checkpoint_and_a_whole_result_say(small, tmp_path, capsys):
    output = tmp_path / "o"
    folder = output / "seed=0" / "pretrain"
    path = small({"epochs": 2, "save_every_epochs": 1}, checkpoints=[0, "last"])
    assert status_of(path, "--output", output, "--only", "seed=0") == 0
    done = ([], ["0", "last"])
    assert state_of(path, output) == done
    (folder / "checkpoint-last.pth").unlink()  # it is a link to checkpoint-1.pth
    shutil.copy(folder / "checkpoint-0.pth", folder / "checkpoint-last.pth")  # log.txt is ahead of it
    assert state_of(path, output) == (["pretrain", "evaluate-last"], ["0"])
    (folder / "checkpoint-last.pth").write_bytes((folder / "checkpoint-1.pth").read_bytes()[:5000])
    assert state_of(path, output) == (["pretrain", "evaluate-last"], ["0"])
    shutil.copy(folder / "checkpoint-1.pth", folder / "checkpoint-last.pth")
    (folder / "checkpoint-0.pth").unlink()  # to make room
    assert state_of(path, output) == done

    # Records that were cut off, or are of another form: not done. Nothing in them is run.
    evil = json.dumps({"flags": {"masking": "os:system"}, "checkpoint": ["echo"], "rank_me": "os:system"})
    deep = "[" * 100_000
    for name, texts in (("result.json", ("{", "[]", "7", deep)), ("command.json", ("[]", '{"seed": 0}', evil, deep))):
        record = output / "seed=0" / "evaluate-last" / name
        whole = record.read_text()
        for text in texts:
            record.write_text(text)
            assert state_of(path, output) == (["evaluate-last"], ["0"]), (name, text[:20])
        record.write_text(whole)
    log = (folder / "log.txt").read_text()
    for text in ("[]\n7\n{}\n" + log, log.replace("train_loss", "loss"), deep, '{"epoch": {}, "train_loss": "x"}'):
        (folder / "log.txt").write_text(text)
        assert state_of(path, output) == done
    content = checkpoint.load(folder / "checkpoint-last.pth")
    for epoch in ("1", None, [1], 1.5):
        torch.save(content | {"epoch": epoch}, folder / "checkpoint-last.pth")
        assert state_of(path, output)[0] == ["pretrain", "evaluate-last"]
    (folder / "command.json").write_text("[]")
    said = refusal(script(), [path, "--output", output, "--gather"], capsys)
    assert f"{folder}: holds a pre-training with no command.json that can be read; name another --output" in said


def test_a_batch_of_other_processes_makes_another_training(small, tmp_path, capsys):
    whole = small({"epochs": 1, "effective_batch_size": 8, "batch_size": 2}).rename(tmp_path / "whole.yaml")
    path = small({"epochs": 1})
    for file, different in ((path, {"ngpus": (1, 2)}), (whole, {})):
        first, other, any_number = (sweep.expand(sweep.load(file), tmp_path / "o", n)[0].steps[0] for n in (1, 2, None))
        first.begin()
        assert other.differences() == different
        assert any_number.differences() == {}
    assert status_of(path, "--output", tmp_path / "p", "--only", "seed=0") == 0
    said = refusal(script(), [path, "--output", tmp_path / "p", "--ngpus", "2"], capsys)
    assert "holds a pre-training with --ngpus 1 (2 is asked for), whose batch is another; give --ngpus 1" in said


def test_a_run_that_another_sweep_is_doing_is_left_to_it(small, tmp_path, capsys):
    path, output = small({"epochs": 0}), tmp_path / "o"
    (output / "seed=0").mkdir(parents=True)
    code = "import sys; from pathlib import Path; from util.training import lock; "
    code += "held = lock.hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(output / "seed=0")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert status_of(path, "--output", output, "--only", "seed=0") == 1
        other.stdin.close()
    assert f"not done: --output {output}/seed=0: process {other.pid} on" in capsys.readouterr().out
    assert not (output / "seed=0" / "pretrain").exists()
    assert status_of(path, "--output", output, "--only", "seed=0") == 0


def test_lists_in_the_grid_an_untrained_model_and_columns_of_later_runs(small, tmp_path, capsys):
    """The first run has no training, so neither loss nor mask ratio. What is measured does not replace a setting."""
    grid = {"epochs": [0, 1], "mask_ratio": [0.5], "crop_scale": [[0.2, 1.0], [0.6, 1.0]]}
    measure = {"evaluate": {"metrics": ["rank_me", "salience"]}}
    path = small(grid=grid, skip=[{"epochs": 1, "crop_scale": [[0.2, 1.0]]}], measure=measure)
    output = tmp_path / "o"
    for run in sweep.expand(sweep.load(path), output):
        assert status_of(path, "--output", output, "--only", run.folder.name) == 0
    assert status_of(path, "--output", output, "--gather") == 0
    table = tables.read_csv(output / "results.csv")
    assert table["crop_scale"].tolist() == ["0.2,1.0", "0.6,1.0", "0.6,1.0"]
    assert table["epochs"].tolist() == [0, 0, 1]
    assert table["mask_ratio"].tolist() == [0.5] * 3
    assert table["evaluate_mask_ratio"].notna().all()
    assert table["train_loss"].notna().tolist() == [False, False, True]
    (epoch,) = tables.read_csv(output / "epochs.csv").to_dict("records")
    assert list(epoch)[:4] == ["epochs", "mask_ratio", "crop_scale", "epoch"]
    assert (epoch["epochs"], epoch["crop_scale"], epoch["epoch"]) == (1, "0.6,1.0", 0)
    assert epoch["train_loss"] == table["train_loss"].iloc[2]
    header = (output / "results.md").read_text().splitlines()[0]
    assert header.startswith("| epochs | mask_ratio | crop_scale | checkpoint | rank_me | ")
    assert header.endswith(" | train_loss | train_mask_ratio | n |")
    capsys.readouterr()
    assert status_of(path, "--output", output) == 0
    assert capsys.readouterr().out.startswith("3 runs, 3 done\n")


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "result.json").write_text("the one before")
    os.link(tmp_path / "result.json", tmp_path / "link")
    flags = (
        "--model mae_vit_mini_patch4 --dataset digits --in_chans 1 --input_size 16 --metrics rank_me --val_images 20"
    )
    main = runpy.run_path(str(ROOT / "scripts/evaluate.py"), run_name="evaluate")["main"]
    main([*flags.split(), "--output", str(tmp_path / "result.json")])
    assert result_of(tmp_path)["rank_me"] > 1
    assert (tmp_path / "link").read_text() == "the one before"  # the file was replaced, not written over
