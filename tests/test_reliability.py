"""Runs that are broken on purpose end as the run that was not: stops, kills, NaN, hangs, stalled loaders."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import injected
from helpers import ROOT, environment, log_lines, write_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import main_pretrain
import masking
from util import checkpoint, control, lock
from util.step import GradientStep

MODEL = ["--model", "mae_vit_mini_patch4", "--norm_pix_loss", "--warmup_epochs", 0, "--lr", 1e-3, "--print_freq", 1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """26 training pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), per_class=13, size=(20, 24))


def flags(pictures, output, *more) -> list[str]:
    """Two epochs of six steps of four pictures and one of two."""
    given = [*MODEL, "--data_path", pictures, "--output_dir", output, "--batch_size", 4, "--epochs", 2]
    return [str(value) for value in [*given, "--num_workers", 0, *more]]


def pretrain(pictures, output, *more) -> list[dict]:
    main_pretrain.main(flags(pictures, output, *more))
    return log_lines(output)


def stopped(pictures, output, *more) -> None:
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, output, *more)
    code = stop.value.code
    del stop  # its frames hold the loader, whose workers end 30 seconds later where only a collection frees it
    assert code == control.PREEMPTED


def torchrun(pictures, output, faults, *more, processes=2, launcher=()) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *launcher,
    ]
    command += [ROOT / "tests" / "faults.py", *flags(pictures, output, *more)]
    variables = environment(FAULTS=json.dumps(faults))
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, env=variables)


def content(output) -> dict:
    return checkpoint.load(output / checkpoint.LAST)


def assert_same_run(one, other) -> None:
    """Weights and optimizer, bit for bit; the epochs' lines, up to the order in which means are summed."""
    first, second = content(one), content(other)
    assert first["step"] == second["step"]
    torch.testing.assert_close(second["model"], first["model"], rtol=0, atol=0)
    torch.testing.assert_close(second["optimizer"]["state"], first["optimizer"]["state"], rtol=0, atol=0)
    left_out = {"train_data_wait"}  # the only thing that a clock decides
    for a, b in zip(log_lines(one), log_lines(other), strict=True):
        first, second = ({k: v for k, v in line.items() if k not in left_out} for line in (a, b))
        assert first == pytest.approx(second, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("strategy", masking.available())
def test_a_run_stopped_before_every_step_ends_like_one_that_was_not(pictures, tmp_path, strategy):
    pretrain(pictures, tmp_path / "whole", "--masking", strategy)
    stops = 0
    with injected([{"kind": "SIGTERM", "forward": list(range(1, 200))}]):
        while not (tmp_path / "parts").exists() or content(tmp_path / "parts")["step"] < 13:
            stopped(pictures, tmp_path / "parts", "--masking", strategy)
            stops += 1
    pretrain(pictures, tmp_path / "parts", "--masking", strategy)
    assert stops >= 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("number_of_workers", [(0, 2), (3, 0)], ids=str)
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR2"])
def test_workers_may_change_when_a_stopped_run_continues(pictures, tmp_path, number_of_workers, name):
    before, after = number_of_workers
    pretrain(pictures, tmp_path / "whole", "--masking", "sbam_amr")
    with injected([{"kind": name, "forward": 9}]):
        stopped(pictures, tmp_path / "parts", "--masking", "sbam_amr", "--num_workers", before)
    assert content(tmp_path / "parts")["step"] == 10
    pretrain(pictures, tmp_path / "parts", "--masking", "sbam_amr", "--num_workers", after)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_fp16_continues_with_its_scale(pictures, tmp_path):
    """The scale starts at 65536 and is halved by the step with NaN; a run that forgot it would step otherwise."""
    given = ["--amp", "fp16"]
    with injected([{"kind": "nan", "forward": 2}]):
        pretrain(pictures, tmp_path / "whole", *given)
    with injected([{"kind": "nan", "forward": 2}, {"kind": "SIGTERM", "forward": 9}]):
        stopped(pictures, tmp_path / "parts", *given)
    assert content(tmp_path / "parts")["scaler"]["scale"] == 2**15
    pretrain(pictures, tmp_path / "parts", *given)
    assert content(tmp_path / "parts")["scaler"] == content(tmp_path / "whole")["scaler"]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_fine_tuning_with_everything_random_continues_exactly(tmp_path):
    """Mixup, cutmix, erasing, colours, drop path; a stop at every fourth step of two epochs of 12."""
    given = ["--config", ROOT / "configs/finetune/digits.yaml", "--epochs", 2, "--warmup_epochs", 1, "--num_workers", 0]
    given += ["--mixup", 0.8, "--cutmix", 1.0, "--reprob", 0.5, "--drop_path", 0.2, "--effective_batch_size", 128]
    given += ["--batch_size", 128, "--aa", "rand-m9-mstd0.5-inc1"]

    def finetune(output) -> None:
        main_finetune.main([str(value) for value in [*given, "--output_dir", output]])

    finetune(tmp_path / "whole")
    apply, calls, stops = GradientStep.apply, 0, 0

    def apply_and_stop(self, *arguments):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return apply(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientStep, "apply", apply_and_stop)
        while not stops or content(tmp_path / "parts")["epoch"] < 1:
            with contextlib.suppress(control.Preempted):
                finetune(tmp_path / "parts")
            stops += 1
    assert stops >= 5
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_ctrl_c_leaves_at_once(pictures, tmp_path):
    """Within the step, without a checkpoint; the same command continues all the same."""
    pretrain(pictures, tmp_path / "whole")
    twice = [{"kind": "SIGINT", "forward": 9}, {"kind": "SIGINT", "forward": 9}]
    with injected(twice), pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path / "parts")
    assert stop.value.code == 130
    assert content(tmp_path / "parts")["step"] == 7
    pretrain(pictures, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_points_of_steps_that_are_run_again_are_there_once(pictures, tmp_path):
    """Also where the run was killed before its first checkpoint."""
    with injected([{"kind": "crash", "forward": 4}]), pytest.raises(RuntimeError, match="struck"):
        pretrain(pictures, tmp_path, "--epochs", 1)
    assert not (tmp_path / checkpoint.LAST).exists()
    with injected([{"kind": "SIGTERM", "forward": 2}]):
        stopped(pictures, tmp_path, "--epochs", 1)
    pretrain(pictures, tmp_path, "--epochs", 1)
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, 8))


def test_within_an_epoch_the_pictures_must_be_the_same(pictures, tmp_path, capsys):
    """Even if they make as many steps."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    with injected([{"kind": "SIGTERM", "forward": 2}]):
        stopped(folder, tmp_path / "run")
    shutil.copy(next(folder.rglob("train/**/*.jpg")), next(folder.glob("train/*")) / "one_more.jpg")
    with pytest.raises(SystemExit) as stop:
        pretrain(folder, tmp_path / "run")
    assert stop.value.code == 2
    assert "within an epoch of 26 pictures, and --data_path has 27" in capsys.readouterr().err


def test_no_step_is_made_of_blank_pictures(pictures, tmp_path, capsys):
    """The pictures go in the middle of an epoch whose log has no line soon: the checkpoint has seen only good ones."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    pretrain(folder, tmp_path / "whole")
    calls, original = itertools.count(), GradientStep.apply

    def apply_and_lose(self, *arguments):
        if next(calls) == 2:
            os.rename(folder, tmp_path / "gone")
        return original(self, *arguments)

    given = ["--print_freq", 1000, "--save_every_minutes", 0, "--max_bad_images", 0.1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientStep, "apply", apply_and_lose)
        with pytest.raises(SystemExit) as stop:
            pretrain(folder, tmp_path / "parts", *given)
    assert stop.value.code == 2
    assert "pictures cannot be decoded, more than --max_bad_images 0.1 allows" in capsys.readouterr().err
    assert content(tmp_path / "parts")["step"] == 3
    os.rename(tmp_path / "gone", folder)
    pretrain(folder, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_within_the_epoch_is_written_in_time(pictures, tmp_path):
    """Every step, here; a kill then loses one step at most, and repeats it exactly."""
    pretrain(pictures, tmp_path / "whole")
    with injected([{"kind": "crash", "forward": 9}]), pytest.raises(RuntimeError, match="struck"):
        pretrain(pictures, tmp_path / "parts", "--save_every_minutes", 0)
    assert 7 <= content(tmp_path / "parts")["step"] <= 9
    lines = pretrain(pictures, tmp_path / "parts")
    torch.testing.assert_close(
        content(tmp_path / "parts")["model"], content(tmp_path / "whole")["model"], rtol=0, atol=0
    )
    assert len(lines) == 2


def test_a_stop_during_evaluation_and_a_stop_before_the_first_step(pictures, tmp_path):
    given = ["--config", ROOT / "configs/linprobe/digits.yaml", "--epochs", 2, "--num_workers", 0, "--warmup_epochs", 0]

    def probe(output) -> None:
        main_linprobe.main([str(value) for value in [*given, "--output_dir", output]])

    probe(tmp_path / "whole")
    import engine_finetune

    evaluate = engine_finetune.evaluate

    def interrupted(model, batches, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, batches, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_finetune, "evaluate", interrupted)
        for _ in range(2):  # the second time there is nothing left but to evaluate
            with pytest.raises(SystemExit) as stop:
                probe(tmp_path / "parts")
            assert stop.value.code == control.PREEMPTED
    found = content(tmp_path / "parts")
    assert (found["epoch"], found["step"]) == (-1, found["steps_per_epoch"])
    probe(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_one_step_with_nan_is_as_if_its_batch_had_been_left_out(pictures, tmp_path):
    """Its images carry no weight: the same run, in which that step's gradient is thrown away by hand."""
    with injected([{"kind": "nan", "forward": 3}]):
        lines = pretrain(pictures, tmp_path / "nan", "--epochs", 1)
    assert lines[0]["train_skipped_steps"] == 1
    assert np.isfinite(lines[0]["train_loss"])
    calls, original = iter(range(100)), GradientStep._step_unless
    with pytest.MonkeyPatch.context() as patch:
        step = lambda self, *arguments: next(calls) == 3 or original(self, *arguments)  # noqa: E731
        patch.setattr(GradientStep, "_step_unless", step)
        pretrain(pictures, tmp_path / "without", "--epochs", 1)
    torch.testing.assert_close(
        content(tmp_path / "nan")["model"], content(tmp_path / "without")["model"], rtol=0, atol=0
    )


def test_too_many_in_a_row_end_the_run_with_names_and_a_good_checkpoint(pictures, tmp_path, capsys):
    with injected([{"kind": "nan", "forward": list(range(3, 23))}]), pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path, "--epochs", 4)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "11 steps in a row were skipped, more than --max_skipped_steps 10" in error
    assert "the loss of rank 0 was not finite on" in error
    assert ".jpg" in error
    found = content(tmp_path)
    assert found["step"] == 14
    assert all(value.isfinite().all() for value in found["model"].values())
    assert int(found["optimizer"]["state"][0]["step"]) == 3


def test_twenty_in_a_row_on_one_of_two_processes_end_both(pictures, tmp_path):
    faults = [{"kind": "nan", "forward": list(range(3, 23)), "rank": 1}]
    result = torchrun(pictures, tmp_path, faults, "--batch_size", 2, "--epochs", 4)
    assert result.returncode == 1
    assert "error: 11 steps in a row were skipped, more than --max_skipped_steps 10" in result.stderr
    assert "the loss of rank 1 was not finite on" in result.stderr
    assert "the loss of rank 0" not in result.stderr
    found = content(tmp_path)
    assert found["step"] == 14
    assert all(value.isfinite().all() for value in found["model"].values())
    assert int(found["optimizer"]["state"][0]["step"]) == 3


def test_a_skipped_step_leaves_running_statistics_alone():
    """BatchNorm, in the probe's head, changes them in the forward pass already."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    scaler = torch.amp.GradScaler(enabled=False)
    update = GradientStep(model, torch.optim.SGD(model.parameters(), 0.1), scaler, nominal_count=4)

    def step(inputs) -> bool:
        loss = model(inputs).sum()
        update.backward(loss)
        return bool(update.apply(torch.tensor(4.0), loss, 4).skipped)

    assert not step(torch.randn(4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert step(torch.full((4, 3), float("nan")))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not step(torch.randn(4, 3))
    assert not torch.equal(model[0].running_mean, before["0.running_mean"])


def test_an_optimizer_that_was_not_fused_continues(pictures, tmp_path):
    pretrain(pictures, tmp_path / "one", "--epochs", 1)
    saved = content(tmp_path / "one")
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = None
    checkpoint.save(tmp_path / "unfused.pth", saved)
    assert len(pretrain(pictures, tmp_path / "two", "--resume", tmp_path / "unfused.pth")) == 1
    saved["optimizer"]["param_groups"].pop()
    checkpoint.save(tmp_path / "unfused.pth", saved)
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path / "three", "--resume", tmp_path / "unfused.pth")
    assert stop.value.code == 2


def test_other_settings_of_a_continued_run_are_said(pictures, tmp_path, capsys):
    pretrain(pictures, tmp_path, "--epochs", 1)
    capsys.readouterr()
    pretrain(pictures, tmp_path, "--epochs", 1, "--masking", "sbam", "--num_workers", 1)
    said = capsys.readouterr().out
    assert "settings that were others before: --masking random -> sbam\n" in said


def test_processes_that_find_different_checkpoints_do_not_train(pictures, tmp_path):
    pretrain(pictures, tmp_path / "0", "--effective_batch_size", 4, "--epochs", 1)
    script = tmp_path / "local_folders.py"
    script.write_text(
        "import os, sys, main_pretrain\n"
        f"main_pretrain.main([*sys.argv[1:], '--output_dir', r'{tmp_path}/' + os.environ['RANK']])\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    given = flags(pictures, tmp_path / "1", "--effective_batch_size", 4, "--batch_size", 2)
    result = subprocess.run([*map(str, launcher), *given], capture_output=True, text=True, env=environment())
    assert result.returncode != 0
    assert "the processes found different checkpoints there, of step 0 and of step 7" in result.stderr
    assert content(tmp_path / "0")["step"] == 7


@pytest.mark.parametrize("more", [[], ["--eval"]], ids=["training", "eval"])
def test_a_signal_ends_the_waiting_for_validation_pictures(pictures, tmp_path, more):
    """A pipe that nobody writes to stands for a file server that does not answer."""
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    task = ["--data_path", folder, "--model", "vit_tiny_patch4", "--input_size", 16, "--batch_size", 4, "--epochs", 1]
    task = [str(value) for value in [*task, "--warmup_epochs", 0, "--num_workers", 1, "--output_dir", tmp_path / "out"]]
    if more:
        main_linprobe.main(task)
    first = folder / "val" / "class0" / "0.jpg"
    first.unlink()
    os.mkfifo(first)
    writer = os.open(first, os.O_RDWR)
    resume = ["--resume", str(tmp_path / "out" / checkpoint.LAST)] if more else []
    command = [sys.executable, str(ROOT / "main_linprobe.py"), *task, *more, *resume]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    wait_for_reader(first, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == (128 + signal.SIGTERM if more else control.PREEMPTED)


def wait_for_reader(pipe, process) -> None:
    """Until another process than this one has opened `pipe`, and so waits for what never comes."""
    end = time.monotonic() + 120
    while not any(held_by(path, pipe) for path in Path("/proc").glob("[0-9]*/fd") if path.parts[2] != str(os.getpid())):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)


def held_by(descriptors, path) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(link) == str(path) for link in descriptors.iterdir())
    return False


def test_validation_pictures_that_never_come_end_the_run(pictures, tmp_path, capfd):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    first = folder / "val" / "class0" / "0.jpg"
    first.unlink()
    os.mkfifo(first)
    task = ["--data_path", folder, "--model", "vit_tiny_patch4", "--input_size", 16, "--batch_size", 4, "--epochs", 1]
    task += ["--warmup_epochs", 0, "--num_workers", 1, "--output_dir", tmp_path / "out", "--dist_timeout", 5]
    with pytest.raises(SystemExit) as stop:
        main_linprobe.main([str(value) for value in task])
    assert stop.value.code == 1
    assert "waited 5 s for data, for batch 0 of" in capfd.readouterr().err


def test_a_stalled_loader_is_named_and_can_be_stopped(tmp_path, capfd):
    (tmp_path / "data").mkdir()
    for index in range(8):
        np.save(tmp_path / "data" / f"{index}.npy", np.zeros((20, 24, 3), dtype=np.uint8))
    (tmp_path / "slow_loader.py").write_text(
        "import time, numpy\n"
        "def load(path):\n"
        "    time.sleep(60 if str(path).endswith('5.npy') else 0)\n"
        "    return numpy.load(path)\n"
        "load.extensions = ('.npy',)\n"
    )
    more = ["--loader", "slow_loader:load", "--num_workers", 1, "--batch_size", 2, "--dist_timeout", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        start = time.monotonic()
        with pytest.raises(SystemExit) as stop:
            pretrain(tmp_path / "data", tmp_path / "out", *more)
    assert stop.value.code == 1
    assert time.monotonic() - start < 50
    error = capfd.readouterr().err
    assert "waited 3 s for data, for worker 0, which loads" in error
    assert "5.npy" in error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_a_picture_is_read_is_no_bad_picture(tmp_path, workers):
    """Readers catch every exception of a decoder, but not this one."""
    (tmp_path / "data").mkdir()
    for index in range(8):
        np.save(tmp_path / "data" / f"{index}.npy", np.full((20, 24, 3), 9 * index, dtype=np.uint8))
    (tmp_path / f"signalling_loader_{workers}.py").write_text(
        "import os, pathlib, signal, time, numpy\n"
        "mark = pathlib.Path(__file__).with_name('struck')\n"
        "def load(path):\n"
        "    if str(path).endswith('5.npy') and not mark.exists():\n"
        "        mark.write_text('')\n"
        f"        os.kill({os.getpid()}, signal.SIGTERM)\n"
        "        time.sleep(2)\n"
        "    return numpy.load(path)\n"
        "load.extensions = ('.npy',)\n"
    )
    more = ["--loader", f"signalling_loader_{workers}:load", "--num_workers", workers, "--batch_size", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        stopped(tmp_path / "data", tmp_path / "parts", *more)
        pretrain(tmp_path / "data", tmp_path / "parts", *more)
        pretrain(tmp_path / "data", tmp_path / "whole", *more)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert log_lines(tmp_path / "parts")[0]["train_bad_images"] == 0


def test_a_killed_worker_is_restarted_by_torchrun_and_nan_on_one_rank_is_everyones(pictures, tmp_path):
    """Two processes: rank 1 sees NaN in one step and is killed in another; the run ends by itself, unharmed."""
    nan = {"kind": "nan", "forward": 1, "rank": 1}
    more = ["--masking", "sbam_amr", "--batch_size", 2, "--save_every_minutes", 0]
    whole = torchrun(pictures, tmp_path / "whole", [nan], *more)
    assert whole.returncode == 0, whole.stderr
    kill = {"kind": "SIGKILL", "forward": 9, "rank": 1, "once": str(tmp_path / "killed")}
    # After the restart the process counts from 0 again, and its second step is another one.
    nan_once = nan | {"once": str(tmp_path / "seen")}
    broken = torchrun(pictures, tmp_path / "parts", [nan_once, kill], *more, launcher=["--max-restarts=3"])
    assert broken.returncode == 0, broken.stderr
    assert (tmp_path / "killed").exists()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert log_lines(tmp_path / "whole")[0]["train_skipped_steps"] == 1


def test_workers_whose_launcher_is_killed_stop_and_continue(pictures, tmp_path):
    more = ["--masking", "sbam_amr", "--batch_size", 2]
    assert torchrun(pictures, tmp_path / "whole", [], *more).returncode == 0
    orphan = {"kind": "orphan", "forward": 5, "rank": 1}
    assert torchrun(pictures, tmp_path / "parts", [orphan], *more).returncode == -signal.SIGKILL
    # The same command at once waits for the workers that write their checkpoint.
    again = torchrun(pictures, tmp_path / "parts", [], *more)
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "parts") not in listed


def test_two_runs_do_not_write_to_one_folder(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WAIT_S", 0.5)
    script = "import sys, time; from pathlib import Path; from util import lock; file = lock.hold(Path(sys.argv[1])); "
    script += "print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, tmp_path)
    assert stop.value.code == 2
    assert f"--output_dir {tmp_path}: process {other.pid} on" in capsys.readouterr().err
    assert not (tmp_path / "log.txt").exists()
    other.kill()
    other.wait()
    assert len(pretrain(pictures, tmp_path)) == 2


def test_the_number_of_processes_may_change(pictures, tmp_path):
    """2, then 1, then 2: the same global batches and masks, so the same losses."""
    more = ["--masking", "sbam_amr", "--effective_batch_size", 4, "--epochs", 3]
    whole = pretrain(pictures, tmp_path / "whole", *more)
    stop = [{"kind": "SIGTERM", "forward": 4, "rank": 1}]
    assert torchrun(pictures, tmp_path / "parts", stop, *more, "--batch_size", 2).returncode != 0
    assert content(tmp_path / "parts")["step"] == 5
    with injected([{"kind": "SIGTERM", "forward": 7}]):
        stopped(pictures, tmp_path / "parts", *more)
    last = torchrun(pictures, tmp_path / "parts", [], *more, "--batch_size", 2)
    assert last.returncode == 0, last.stderr
    losses = [[line["train_loss"] for line in lines] for lines in (whole, log_lines(tmp_path / "parts"))]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


@pytest.mark.parametrize("still", [0, 1])
def test_a_process_that_stands_still_is_named(pictures, tmp_path, still):
    """And killed by the other: torchrun need not wait 30 seconds for it to obey SIGTERM."""
    faults = [{"kind": "SIGSTOP", "forward": 2, "rank": still, "once": str(tmp_path / "struck")}]
    result = torchrun(pictures, tmp_path, faults, "--batch_size", 2, "--dist_timeout", 10)
    assert result.returncode != 0
    said = f"rank {1 - still} could not reach all other processes within --dist_timeout: rank {still} did not answer"
    assert said in result.stderr
    assert "forcefully exiting" not in result.stderr


def test_workers_end_with_their_process(pictures, tmp_path):
    """They ignore SIGTERM while it trains, which Python sends them, and waits, when it ends."""
    result = torchrun(pictures, tmp_path, [], "--num_workers", 2, "--epochs", 1, processes=1)
    assert result.returncode == 0, result.stderr
