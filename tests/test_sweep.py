"""Sweeps: what a file asks for, that what is done is skipped, and the table of a real one."""

from __future__ import annotations

import os
import runpy
import shlex
import signal
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, refusal

from studies import sweep

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
    assert sweep.flags({"masking_args": {"attempts": None}}) == ["--masking_args", "attempts=null"]


def test_what_is_measured_of_some_runs_alone(tmp_path):
    linprobe = str(ROOT / "configs/linprobe/digits.yaml")
    rule = {"when": {"masking": "sbam_amr"}, "measure": {"linprobe": {"config": linprobe}, "evaluate": {"pool": "cls"}}}
    random, amr, _ = sweep.expand(sweep.load(write(tmp_path, adjust=[rule])), tmp_path)
    assert [step.task for step in random.steps] == ["pretrain", "evaluate"]
    assert [step.task for step in amr.steps] == ["pretrain", "evaluate", "linprobe"]
    assert random.steps[1].given == FILE["measure"]["evaluate"]
    assert amr.steps[1].given == FILE["measure"]["evaluate"] | {"pool": "cls"}
    assert amr.steps[2].settings.epochs == 8


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
        ({"adjust": [{"when": {"seed": 0}, "measure": {"evalute": {}}}]}, "did you mean 'evaluate'?"),
        ({"adjust": [{"when": {"seed": 0}, "measure": ["evaluate"]}]}, "adjust: measure must be a mapping"),
        ({"adjust": [{"when": {"seed": 0}, "measure": {"evaluate": 3}}]}, "adjust: measure.evaluate must be a mapping"),
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


SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))


def test_every_figure_and_table_of_the_paper_has_a_sweep():
    names = {path.stem.partition("_")[0] for path in SWEEPS}
    assert names >= {"fig3", "fig4", "fig6", "fig7a", "fig7bc", "tab1", "tab2", "tab3"}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_command_of_our_sweeps_is_accepted_and_has_a_cost(path, tmp_path, monkeypatch, capsys):
    """Every method is built, so a mask that does not fit is refused."""
    monkeypatch.chdir(ROOT)
    ngpus = "8" if path.stem.startswith(("fig", "tab")) else "1"  # CMAE accumulates no steps
    script()([str(path), "--output", str(tmp_path / "o"), "--dry_run", "--ngpus", ngpus])
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("# ")]
    folders = {word for command in commands for word in command if word.endswith("/pretrain")}
    assert len(folders) == sum(command[1] == "main_pretrain.py" for command in commands) > 1
    costs = [line for line in lines if line.startswith("# ")]
    assert costs[0].startswith(f"# {len(commands)} commands: ")
    assert "GPU hours" in costs[0]
    assert "NOT counted" not in "".join(costs)
    assert sum(int(line.split()[1]) for line in costs if " FLOP " in line) == len(commands)
    if ngpus == "8":
        assert f"scripts/sweep.py configs/sweeps/{path.name} --ngpus 8 --dry_run" in path.read_text()
        hours = costs[0].partition("commands: ")[2].partition(" GPU")[0]
        row = next(line for line in (ROOT / "docs/PAPER.md").read_text().splitlines() if f"/{path.name}`" in line)
        assert row.endswith(f" | {hours} |")


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
def test_the_jobs_of_an_array_run_at_a_time_unless_limited(slurm, tmp_path, flags, array):
    slurm("srun")
    slurm("sbatch", f"/bin/cp $1 {tmp_path}/given\necho Submitted batch job 7")
    path = write(tmp_path)
    assert (
        status_of(path, "--output", tmp_path / "o", "--cluster", "slurm", "--ngpus", "2", "--partition", "gpu", *flags)
        == 0
    )
    script = (tmp_path / "given").read_text()
    assert f"#SBATCH --array={array}\n" in script
    assert "#SBATCH --signal=USR2@300\n" in script
    assert "#SBATCH --requeue\n" in script
    assert "#SBATCH --cpus-per-task=20\n" in script  # of two processes
    assert "wckey" not in script
    assert "#SBATCH --partition=gpu\n" in script


def test_a_mistake_with_slurm_is_one_sentence(slurm, tmp_path, capsys):
    path, output = write(tmp_path), tmp_path / "o"
    command = [path, "--output", output, "--cluster", "slurm"]
    said = refusal(script(), command, capsys)
    assert "--cluster slurm: sbatch and srun not found on this machine; use one of a SLURM cluster's" in said
    assert not output.exists()
    script()([*map(str, command), "--dry_run"])
    slurm("sbatch", "echo 'sbatch: error: invalid partition specified: none' >&2; exit 1")
    assert "--cluster slurm: srun not found" in refusal(script(), command, capsys)
    slurm("srun")
    said = refusal(script(), [*command, "--partition", "none"], capsys)
    assert "SLURM refuses the job: invalid partition specified: none" in said
    evil = "gpu\ntouch /tmp/evil"
    assert "has a control character" in refusal(script(), [*command, "--partition", evil], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel", "0"], "--parallel 0: must be at least 1"),
        (["--ngpus", "-1"], "--ngpus -1: must be at least 1"),
        (["--output", ""], "--output '': is empty; name a folder"),
        (["--gather", "--only", "seed=7"], "--gather --only seed=7: the table is of all runs; choose one"),
        (["--only", "seed=7"], "--only seed=7: no run has this name; one is masking=random-seed=0"),
        (["--output", "/proc/none"], "--output /proc/none: cannot be made (No such file or directory)"),
    ],
)
def test_a_flag_that_cannot_work_is_one_sentence(tmp_path, capsys, flags, message):
    assert message in refusal(script(), [write(tmp_path), *flags], capsys)


def test_who_waits_for_torchrun_outlives_the_signals_that_it_gets():
    outliving = runpy.run_path(str(ROOT / "scripts/sweep.py"), run_name="sweep")["outliving"]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    with outliving() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
        # A process that it starts has the usual handler, or a worker that imports could not be stopped.
        shown = "import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
        assert subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True).stdout == "True\n"
    assert asked == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)] == before
