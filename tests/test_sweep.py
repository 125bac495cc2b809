"""Sweeps: what a file asks for, that what is done is skipped, and the table of a real one."""

from __future__ import annotations

import runpy
import shlex
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import ROOT, environment

from util import checkpoint, cli, config, control, sweep, tables

FILE = {
    "output": "out",
    "pretrain": {
        "config": str(ROOT / "configs/pretrain/digits.yaml"),
        "epochs": 1,
        "warmup_epochs": 0,
        "num_workers": 0,
    },
    "grid": {"masking": ["random", "sbam_amr"], "seed": [0, 1]},
    "skip": [{"masking": "random", "seed": 1}],
    "adjust": [{"when": {"masking": "sbam_amr"}, "set": {"masking_args.delta_r": 0.05}}],
    "measure": {"evaluate": {"metrics": ["knn"], "val_images": 100}},
}


def write(tmp_path, **changes):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**FILE, **changes}))
    return path


def run(*arguments):
    command = [sys.executable, str(ROOT / "scripts/sweep.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment())


def script():
    return runpy.run_path(str(ROOT / "scripts/sweep.py"), run_name="sweep")["main"]


def test_the_grid(tmp_path):
    runs = sweep.expand(sweep.load(write(tmp_path)), tmp_path / "o")
    assert [found.folder.name for found in runs] == [
        "masking=random-seed=0",
        "masking=sbam_amr-seed=0",
        "masking=sbam_amr-seed=1",
    ]
    pretrain, evaluate = runs[1].steps
    folder = tmp_path / "o" / "masking=sbam_amr-seed=0" / "pretrain"
    own = f"--masking sbam_amr --seed 0 --masking_args delta_r=0.05 --output_dir {folder}"
    assert shlex.join(pretrain.argv).endswith(own)
    assert evaluate.argv[0].endswith("pretrain/checkpoint-last.pth")
    assert "--masking_args" not in runs[0].steps[0].argv


def test_probes_at_intermediate_epochs(tmp_path):
    measure = {"linprobe": {"config": str(ROOT / "configs/linprobe/digits.yaml")}}
    runs = sweep.expand(sweep.load(write(tmp_path, checkpoints=[0, "last"], measure=measure)), tmp_path)
    _, first, last = runs[0].steps
    assert first.argv[first.argv.index("--finetune") + 1].endswith("checkpoint-0.pth")
    assert first.folder != last.folder
    assert first.epochs == 8  # from its config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gird": {}}, "gird: unknown (did you mean 'grid'?)"),
        ({"measure": {"evalute": {}}}, "did you mean 'evaluate'?"),
        ({"grid": {"seed": 3}}, "grid.seed must be a list"),
        ({"skip": [{"maskng": "random"}]}, "did you mean 'masking'?"),
        ({"output": None}, "the key output is missing"),
        ({"pretrain": {"seed": 1}}, "pretrain.epochs is missing"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"sweep\.yaml: ") as error:
        sweep.load(write(tmp_path, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_every_command_of_our_sweeps_is_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {"pretrain": config.PretrainSettings, "linprobe": config.LinprobeSettings}
    settings |= {"finetune": config.FinetuneSettings}
    runs = sweep.expand(sweep.load(path))
    assert len({found.folder for found in runs}) == len(runs) > 3
    import main_pretrain
    import masking

    for found in runs:
        for step in found.steps:
            if step.task == "evaluate":
                continue
            parsed = cli.parse(settings[step.task], [str(part) for part in step.argv])
            assert parsed.epochs == step.epochs
            if step.task == "pretrain":
                with torch.device("meta"):
                    patches = main_pretrain.build_model(parsed).num_patches
                masking.check(main_pretrain.create_strategy(parsed), patches)


def test_a_sweep_runs_gathers_and_skips_what_is_done(tmp_path, capsys):
    """One of two runs fails: it does not end the sweep, and it alone is left."""
    path, output = write(tmp_path, grid={"lr": [1e30, 1e-3]}, skip=[], adjust=[]), tmp_path / "o"
    result = run(path, "--output", output)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"pretrain failed, see {output}/lr=1e+30/pretrain/output.txt" in result.stdout
    assert "lower --blr" in (output / "lr=1e+30" / "pretrain" / "output.txt").read_text()
    (row,) = tables.read_csv(output / "results.csv")
    assert row["lr"] == 1e-3
    assert 0 < row["knn"] <= 100
    assert 0.6 < row["train_mask_ratio"] < 0.9
    assert (output / "results.md").read_text() in result.stdout
    main = script()
    main([str(path), "--output", str(output), "--dry_run"])
    commands = capsys.readouterr().out.splitlines()
    assert [command.split()[1] for command in commands] == ["main_pretrain.py", "scripts/evaluate.py"]
    assert all("lr=1e+30" in command for command in commands)
    stamp = (output / "lr=0.001" / "pretrain" / "checkpoint-last.pth").stat().st_mtime_ns
    with pytest.raises(SystemExit) as stop:
        main([str(write(tmp_path, grid={"lr": [1e-3]}, skip=[], adjust=[])), "--output", str(output)])
    assert stop.value.code == 0
    assert "1 runs, 1 done" in capsys.readouterr().out
    assert (output / "lr=0.001" / "pretrain" / "checkpoint-last.pth").stat().st_mtime_ns == stamp


def test_a_sweep_that_is_stopped_leaves_no_process_and_continues(tmp_path):
    changes = {"pretrain": {**FILE["pretrain"], "epochs": 3, "num_workers": 1}, "skip": [], "adjust": []}
    path, output = write(tmp_path, grid={"seed": [0, 1, 2]}, **changes), tmp_path / "o"
    command = [sys.executable, ROOT / "scripts/sweep.py", path, "--output", output, "--parallel", 2]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment())
    first = output / "seed=0" / "pretrain" / "log.txt"
    end = time.monotonic() + 240
    while not (first.exists() and first.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == control.PREEMPTED
    assert "pretrain was stopped" in said
    assert said.endswith("stopped; the same command continues\n")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(output) not in listed
    steps = checkpoint.load(output / "seed=0" / "pretrain" / "checkpoint-last.pth")["step"]
    result = run(path, "--output", output, "--parallel", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(tables.read_csv(output / "results.csv")) == 3
    said = (output / "seed=0" / "pretrain" / "output.txt").read_text()
    assert steps > 0
    assert "continuing after epoch" in said


def test_through_submitit_without_slurm(tmp_path):
    path = write(tmp_path, grid={"masking": ["random"], "seed": [0]}, skip=[], adjust=[])
    result = run(path, "--output", tmp_path / "o", "--cluster", "local", "--cpus_per_task", 1, "--timeout", 5)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(tables.read_csv(tmp_path / "o" / "results.csv")) == 1
