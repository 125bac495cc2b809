"""Sweeps: what a file asks for, that what is done is skipped, and the table of a real one."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import ROOT, environment

from methods import base
from studies import sweep, tables
from util import cli, config
from util.distributed import signals
from util.training import checkpoint

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
    assert sweep.flags({"epochs": 3, "config": "a.yaml"}) == ["--config", "a.yaml", "--epochs", "3"]


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
        ({"pretrain": "epochs"}, "pretrain must be a mapping"),
        ({"measure": ["evaluate"]}, "measure must be a mapping"),
        ({"measure": {"evaluate": ["knn"]}}, "measure.evaluate must be a mapping"),
        ({"skip": {"seed": 0}}, "skip must be a list"),
        ({"skip": ["seed"]}, "must be a mapping, such as {name: value}, not seed"),
        ({"adjust": None}, "adjust must be a list"),
        ({"adjust": [{"set": {"lr": 1}}]}, "must have the keys when and set"),
        ({"adjust": [{"when": {"seed": 0}}]}, "must have the keys when and set"),
        ({"checkpoints": "last"}, "checkpoints must be a list"),
        ({"checkpoints": ["first"]}, "checkpoints: first must be last, or an epoch"),
        ({"grid": {"seed": [0, 1, 0]}}, "grid.seed has 0 twice"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"sweep\.yaml: ") as error:
        sweep.load(write(tmp_path, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": FILE["pretrain"] | {"mask_ration": 0.5}}, "pretrain: there is no setting 'mask_ration'"),
        ({"pretrain": FILE["pretrain"] | {"epochs": "ten"}}, "pretrain: --epochs ten: must be a whole number"),
        ({"grid": {"masking": ["sbam"], "maskin": [1]}}, "(did you mean 'masking'?)"),
        ({"measure": {"evaluate": {"metrcs": ["knn"]}}}, "measure.evaluate: unrecognized arguments: --metrcs"),
        ({"measure": {"linprobe": {"config": "no/such.yaml"}}}, "no/such.yaml"),
        ({"checkpoints": [7]}, "checkpoints: 7: masking=random-seed=0 keeps none of this epoch"),
        ({"checkpoints": [0]}, "--save_every_epochs None"),
        ({"skip": [{"seed": [0, 1]}]}, "sweep.yaml: skip: leaves no run"),
        (
            {"pretrain": FILE["pretrain"] | {"masking_args": ["delta=0.1"]}, "grid": {"masking_args.delta_r": [0.1]}},
            "masking_args: ['delta=0.1'] must be a mapping, such as {name: value}",
        ),
        ({"grid": {"data_path": ["a/b", "a_b"]}}, "two runs have the name data_path=a_b"),
    ],
)
@pytest.mark.parametrize("more", [["--dry_run"], ["--only", "x"]], ids=["all", "only"])
def test_every_command_is_checked_before_the_first_run(tmp_path, capsys, changes, message, more):
    path = write(tmp_path, **({"skip": [], "adjust": []} | changes))
    if more[0] == "--only":
        names = [found.folder.name for found in _runs_or_none(path)] or ["x"]
        more = ["--only", names[0]]
    with pytest.raises(SystemExit) as stop:
        script()([str(path), "--output", str(tmp_path / "o"), *more])
    said = capsys.readouterr()
    assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err
    assert not (tmp_path / "o").exists()


def _runs_or_none(path):
    try:
        return sweep.expand(sweep.load(path))
    except ValueError:
        return []


def test_the_batch_is_checked_for_the_processes_of_a_run(tmp_path, capsys):
    batch = {"batch_size": 12, "accum_iter": 2, "effective_batch_size": 48}
    path = write(tmp_path, pretrain=FILE["pretrain"] | batch)
    script()([str(path), "--output", str(tmp_path / "o"), "--ngpus", "2", "--dry_run"])
    assert "--accum_iter 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script()([str(path), "--output", str(tmp_path / "o"), "--dry_run"])
    assert "1 process(es) makes 24" in capsys.readouterr().err
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_every_command_of_our_sweeps_is_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {"pretrain": config.PretrainSettings, "linprobe": config.LinprobeSettings}
    settings |= {"finetune": config.FinetuneSettings}
    runs = sweep.expand(sweep.load(path))
    assert len({found.folder for found in runs}) == len(runs) > 3
    sweep.check(runs)
    import masking

    for found in runs:
        for step in found.steps:
            if step.task == "evaluate":
                continue
            parsed = cli.parse(settings[step.task], [str(part) for part in step.argv])
            assert parsed.epochs == step.epochs
            if step.task == "pretrain":
                with torch.device("meta"):
                    patches = base.build_model(parsed).num_patches
                masking.check(base.create_strategy(parsed), patches)


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
    assert process.returncode == signals.PREEMPTED
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
    assert "checkpoint-last.pth after epoch" in said


def tiny(tmp_path, **changes):
    """One run of one epoch, measured by what costs least."""
    measure = {"evaluate": {"metrics": ["knn"], "val_images": 100, "train_images": 200}}
    return write(tmp_path, **({"grid": {"seed": [0]}, "skip": [], "adjust": [], "measure": measure} | changes))


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_longer_training_is_measured_again_and_other_flags_are_an_error(tmp_path):
    output, long = tmp_path / "o", FILE["pretrain"] | {"epochs": 2}
    assert run(tiny(tmp_path), "--output", output).returncode == 0
    first = result_of(output / "seed=0" / "evaluate-last")
    result = run(tiny(tmp_path, pretrain=long), "--output", output)
    assert result.returncode == 0, result.stdout
    assert "1 runs, 0 done" in result.stdout
    assert "checkpoint-last.pth after epoch 0" in (output / "seed=0" / "pretrain" / "output.txt").read_text()
    second = result_of(output / "seed=0" / "evaluate-last")
    assert second["knn"] != first["knn"]
    assert tables.read_csv(output / "results.csv")[0]["knn"] == second["knn"]
    (aside,) = (output / "seed=0").glob("evaluate-last-replaced-*")
    assert result_of(aside) == first

    # What only makes it fast may differ; what is measured may, and is measured again.
    quick = tiny(tmp_path, pretrain=long | {"num_workers": 1}, measure={"evaluate": {"metrics": ["rank_me"]}})
    (found,) = sweep.expand(sweep.load(quick), output)
    assert [step.task for step in found.left()] == ["evaluate"]
    assert found.rows() == []

    for changes, told in (({"lr": 1e-9}, "--lr 0.002 (1e-09 is asked for)"), ({"epochs": 1}, "--epochs 2 (1 is")):
        for flag in ("--parallel=1", "--gather", "--dry_run"):
            result = run(tiny(tmp_path, pretrain=long | changes), "--output", output, flag)
            assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
            assert f"{output}/seed=0/pretrain: holds a pre-training with {told}" in result.stderr


def test_done_is_what_the_checkpoint_and_a_whole_result_say(tmp_path):
    pretrain = FILE["pretrain"] | {"epochs": 2, "save_every_epochs": 1}
    output = tmp_path / "o"
    path = tiny(tmp_path, pretrain=pretrain, checkpoints=[0, "last"])
    assert run(path, "--output", output).returncode == 0

    def left():
        (found,) = sweep.expand(sweep.load(path), output)
        found.check()
        return [step.folder.name for step in found.left()], [row["checkpoint"] for row in found.rows()]

    assert left() == ([], ["0", "last"])
    result = output / "seed=0" / "evaluate-last" / "result.json"
    whole = result.read_text()
    result.write_text(whole[:20])  # as a process leaves it that is killed while it writes
    assert left() == (["evaluate-last"], ["0"])
    result.write_text(whole)
    folder = output / "seed=0" / "pretrain"
    (folder / "checkpoint-last.pth").unlink()  # it is a link to checkpoint-1.pth
    shutil.copy(folder / "checkpoint-0.pth", folder / "checkpoint-last.pth")  # log.txt is ahead of it
    assert left() == (["pretrain", "evaluate-last"], ["0"])
    (folder / "checkpoint-last.pth").write_bytes((folder / "checkpoint-1.pth").read_bytes()[:5000])
    assert left() == (["pretrain", "evaluate-last"], ["0"])
    shutil.copy(folder / "checkpoint-1.pth", folder / "checkpoint-last.pth")
    assert left() == ([], ["0", "last"])
    (folder / "checkpoint-0.pth").unlink()  # to make room
    assert left() == ([], ["0", "last"])


def test_results_of_an_earlier_version_are_adopted_unless_the_checkpoint_is_newer(tmp_path):
    path, output = tiny(tmp_path), tmp_path / "o"
    assert run(path, "--output", output).returncode == 0
    (output / "seed=0" / "evaluate-last" / "command.json").unlink()
    result = run(path, "--output", output)
    assert "1 runs, 1 done\n1 measurements have no command.json: taken to be those" in result.stdout
    assert len(tables.read_csv(output / "results.csv")) == 1
    os.utime(output / "seed=0" / "evaluate-last" / "result.json", (0, 0))
    (found,) = sweep.expand(sweep.load(path), output)
    assert [step.task for step in found.left()] == ["evaluate"]


def test_a_run_that_another_sweep_is_doing_is_left_to_it(tmp_path):
    path, output = tiny(tmp_path), tmp_path / "o"
    (output / "seed=0").mkdir(parents=True)
    code = "import sys; from pathlib import Path; from util.training import lock; held = lock.hold(Path(sys.argv[1])); "
    code += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(output / "seed=0")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as other:
        assert other.stdout.readline() == "held\n"
        result = run(path, "--output", output)
        other.stdin.close()
    assert result.returncode == 1
    assert f"[1/1] seed=0: not done: --output {output}/seed=0: process {other.pid} on" in result.stdout
    assert not (output / "seed=0" / "pretrain").exists()
    assert run(path, "--output", output).returncode == 0


def test_lists_in_the_grid_an_untrained_model_and_columns_of_later_runs(tmp_path):
    """The first run has no training, so neither loss nor mask ratio."""
    grid = {"epochs": [0, 1], "crop_scale": [[0.2, 1.0], [0.6, 1.0]]}
    path, output = tiny(tmp_path, grid=grid, skip=[{"epochs": 1, "crop_scale": [[0.2, 1.0]]}]), tmp_path / "o"
    result = run(path, "--output", output, "--parallel", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = tables.read_csv(output / "results.csv")
    assert [(row["crop_scale"], row["epochs"]) for row in rows] == [("0.2,1.0", 0), ("0.6,1.0", 0), ("0.6,1.0", 1)]
    assert "train_loss" not in rows[0]
    header = (output / "results.md").read_text().splitlines()[0]
    assert header == "| crop_scale | epochs | checkpoint | knn | train_loss | train_mask_ratio | n |"
    assert run(path, "--output", output).stdout.startswith("3 runs, 3 done\n")


def test_runs_at_the_same_time_share_gpus_and_cores(monkeypatch):
    module = runpy.run_path(str(ROOT / "scripts/sweep.py"), run_name="sweep")
    name, shares = "CUDA_VISIBLE_DEVICES", module["shares"]
    monkeypatch.setenv(name, "0,1,2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [share[name] for share in shares(4, 1)] == ["0", "1", "2", "0"]
    assert [share[name] for share in shares(2, 2)] == ["0,1", "0,1"]
    assert shares(1, 4) == [{"OMP_NUM_THREADS": "3"}]
    monkeypatch.setenv(name, "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    assert shares(1, 1) == [{"OMP_NUM_THREADS": str(cores)}]
    assert shares(cores, 1) == shares(2 * cores, 1)[:cores] == [{"OMP_NUM_THREADS": "1"}] * cores
    command = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert module["Processes"]()(command, CUDA_VISIBLE_DEVICES="1") == (0, "1")
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)


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


@pytest.mark.parametrize(("flags", "array"), [([], "0-2%3"), (["--parallel", 2], "0-2%2")])
def test_the_jobs_of_an_array_run_at_a_time_unless_limited(tmp_path, flags, array):
    """A command named sbatch stands in for SLURM's; what it is given is read."""
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\ncp $1 {tmp_path}/given\necho Submitted batch job 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    path, variables = tiny(tmp_path, grid={"seed": [0, 1, 2]}), {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [
        sys.executable,
        ROOT / "scripts/sweep.py",
        path,
        "--output",
        tmp_path / "o",
        "--cluster",
        "slurm",
        *flags,
    ]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(**variables), cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert f"#SBATCH --array={array}\n" in (tmp_path / "given").read_text()


def test_through_submitit_without_slurm(tmp_path):
    path = write(tmp_path, grid={"masking": ["random"], "seed": [0]}, skip=[], adjust=[])
    result = run(path, "--output", tmp_path / "o", "--cluster", "local", "--cpus_per_task", 1, "--timeout", 5)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(tables.read_csv(tmp_path / "o" / "results.csv")) == 1
