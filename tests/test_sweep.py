"""Sweeps: what a file asks for, that what is done is skipped, and the table of a real one."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import ROOT, environment, refusal, write_pictures

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
    path.write_text(yaml.safe_dump({**FILE, **changes}, sort_keys=False))
    return path


def script():
    return runpy.run_path(str(ROOT / "scripts/sweep.py"), run_name="sweep")["main"]


def status_of(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        script()(list(map(str, arguments)))
    return stop.value.code


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
    assert first.settings.epochs == 8  # from its config


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
        ({"grid": {name: list(range(90)) for name in "abcde"}}, "asks for 5904900000 runs; at most 10000"),
        ({"grid": {1: [2]}}, "grid: the name 1 must be text"),
        ({"pretrain": {"epochs": 1, 2: 3}}, "pretrain: the name 2 must be text"),
        ({"output": 7}, "output must be text, not 7"),
        ({"measure": {3: {}}}, "measure: the name 3 must be text"),
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
        ({"grid": {"data_path": ["x" * 250]}}, "is too long for the name of a folder"),
    ],
)
@pytest.mark.parametrize("more", [["--dry_run"], ["--only", "x"]], ids=["all", "only"])
def test_every_command_is_checked_before_the_first_run(tmp_path, capsys, changes, message, more):
    path = write(tmp_path, **({"skip": [], "adjust": []} | changes))
    if more[0] == "--only":
        names = [found.folder.name for found in _runs_or_none(path)] or ["x"]
        more = ["--only", names[0]]
    assert message in refusal(script(), [path, "--output", tmp_path / "o", *more], capsys)
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
    said = refusal(script(), [path, "--output", tmp_path / "o", "--dry_run"], capsys)
    assert "1 process(es) makes 24" in said
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
            parsed = cli.parse(settings[step.task], list(step.argv))
            if step.task == "pretrain":
                with torch.device("meta"):
                    patches = base.build_model(parsed).num_patches
                masking.check(base.create_strategy(parsed), patches)


@pytest.fixture
def small(tmp_path):
    """Write a sweep file of runs that take less than a second each, on twelve pictures."""
    pictures = write_pictures(tmp_path / "pictures")
    pretrain = {"model": "mae_vit_mini_patch4", "input_size": 16, "data_path": str(pictures), "batch_size": 4}
    pretrain |= {"epochs": 1, "warmup_epochs": 0, "lr": 0.001, "num_workers": 0, "save_every_epochs": None}

    def write_small(pretrain_changes=(), **changes):
        content = {"grid": {"seed": [0]}, "skip": [], "adjust": [], "measure": {"evaluate": {"metrics": ["rank_me"]}}}
        return write(tmp_path, **{**content, "pretrain": pretrain | dict(pretrain_changes), **changes})

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

    script()([str(path), "--output", str(output), "--dry_run"])
    commands = capsys.readouterr().out.splitlines()
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
    header = (output / "results.md").read_text().splitlines()[0]
    assert header.startswith("| epochs | mask_ratio | crop_scale | checkpoint | rank_me | ")
    assert header.endswith(" | train_loss | train_mask_ratio | n |")
    capsys.readouterr()
    assert status_of(path, "--output", output) == 0
    assert capsys.readouterr().out.startswith("3 runs, 3 done\n")


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


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Hide SLURM and let commands that are named like its own stand in; return what writes one."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def stand_in(name, text=""):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return stand_in


@pytest.mark.parametrize(("flags", "array"), [([], "0-2%3"), (["--parallel", "2"], "0-2%2")])
def test_the_jobs_of_an_array_run_at_a_time_unless_limited(small, slurm, tmp_path, flags, array):
    slurm("srun")
    slurm("sbatch", f"/bin/cp $1 {tmp_path}/given\necho Submitted batch job 7")
    path = small(grid={"seed": [0, 1, 2]})
    assert status_of(path, "--output", tmp_path / "o", "--cluster", "slurm", "--partition", "gpu", *flags) == 0
    script = (tmp_path / "given").read_text()
    assert f"#SBATCH --array={array}\n" in script
    assert "#SBATCH --partition=gpu\n" in script


def test_a_mistake_with_slurm_is_one_sentence(small, slurm, tmp_path, capsys):
    path, output = small(), tmp_path / "o"
    command = [path, "--output", output, "--cluster", "slurm"]
    said = refusal(script(), command, capsys)
    assert "--cluster slurm: sbatch and srun not found on this machine; use one of a SLURM cluster's" in said
    assert not output.exists()
    script()([*map(str, command), "--dry_run"])
    slurm("sbatch", "echo 'sbatch: error: invalid partition specified: none' >&2; exit 1")
    assert "--cluster slurm: srun not found" in refusal(script(), command, capsys)
    slurm("srun")
    said = refusal(script(), [*command, "--partition", "none"], capsys)
    assert "SLURM refuses the jobs: invalid partition specified: none" in said
    evil = "gpu\ntouch /tmp/evil"
    assert "holds a control character" in refusal(script(), [*command, "--partition", evil], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel", "0"], "--parallel 0: must be at least 1"),
        (["--ngpus", "-1"], "--ngpus -1: must be at least 1"),
        (["--output", ""], "--output '': is empty; name a folder"),
        (["--only", "seed=7"], "--only seed=7: no run has this name; one is masking=random-seed=0"),
        (["--output", "/proc/none"], "--output /proc/none: cannot be made (No such file or directory)"),
    ],
)
def test_a_flag_that_cannot_work_is_one_sentence(tmp_path, capsys, flags, message):
    assert message in refusal(script(), [write(tmp_path), *flags], capsys)


def test_a_cluster_job_runs_its_command_in_a_process_of_submitit(tmp_path):
    submitit = pytest.importorskip("submitit")
    job = runpy.run_path(str(ROOT / "scripts/sweep.py"), run_name="sweep")["ClusterJob"]
    executor = submitit.LocalExecutor(tmp_path)
    executor.update_parameters(timeout_min=5)
    done = executor.submit(job(["sh", "-c", f"touch {tmp_path}/ran; exit 3"]))
    assert done.result() == 3
    assert (tmp_path / "ran").exists()
