"""How a run starts: it locks its folder, then looks what is in it, and refuses in one sentence what cannot be."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, environment, log_lines, refusal
from runs import content, flags, pretrain, torchrun

import main_finetune
import main_pretrain
from util.distributed import signals
from util.training import checkpoint


@pytest.fixture
def start():
    """A function that starts a pre-training with faults, under torchrun if there are several processes."""
    started = []

    def start(pictures, output, faults, *more, processes=1) -> subprocess.Popen:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, str(ROOT / "tests" / "faults.py"), *flags(pictures, output, *more)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment(FAULTS=json.dumps(faults)), **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def stop_itself(start, pictures, output, *more) -> subprocess.Popen:
    """A run that stands still in its second epoch."""
    first = start(pictures, output, [{"kind": "SIGSTOP", "forward": 8}], *more)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert first.poll() is None
    return first


def wait_for_waiting(processes: list[subprocess.Popen], folder, holder: subprocess.Popen) -> None:
    """Until each of `processes`, or a child of it, has opened the lock of `folder`, which `holder` holds."""
    others = {str(holder.pid), str(os.getpid())}

    def waiting() -> list[Path]:
        numbers = [path for path in Path("/proc").glob("[0-9]*") if path.name not in others]
        return [path for path in numbers if opened(path, folder / ".lock")]

    while len(waiting()) < len(processes):
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def opened(process: Path, file: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(link) == str(file) for link in (process / "fd").iterdir())
    return False


def test_commands_that_waited_find_what_the_first_left(pictures, tmp_path, start):
    """It is asked to stop when two others wait already, and writes its checkpoint.

    One of them, of two processes, continues from it; the other, of another architecture, is refused. Either may be
    the first to get the folder.
    """
    more, output = ["--effective_batch_size", 4], tmp_path / "parts"
    first = stop_itself(start, pictures, output, *more)
    second = start(pictures, output, [], *more, "--batch_size", 2, processes=2)
    wait_for_waiting([second], output, first)  # so that the third, which waits a minute, comes last
    third = start(pictures, output, [], "--input_size", 8)
    wait_for_waiting([second, third], output, first)
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == signals.PREEMPTED
    said, wrong = second.communicate(timeout=120)
    assert second.returncode == 0, wrong
    assert f"continuing {output / checkpoint.LAST} after epoch 0 and 2 steps" in said
    _, said = third.communicate(timeout=120)
    assert third.returncode == 2
    assert "a checkpoint of another architecture" in said.strip().splitlines()[-1]
    assert content(output)["step"] == 14
    whole, parts = pretrain(pictures, tmp_path / "whole", *more), log_lines(output)
    losses = [[line["train_loss"] for line in lines] for lines in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_two_processes_refuse_with_one_sentence(pictures, tmp_path):
    pretrain(pictures, tmp_path, "--epochs", 1)
    result = torchrun(pictures, tmp_path, [], "--input_size", 8, "--batch_size", 2)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == result.stderr.count("another architecture") == 1
    assert content(tmp_path)["step"] == 7


@pytest.mark.parametrize("folder", ["", "  "])
def test_no_folder_to_save_in_is_refused(pictures, capsys, folder):
    said = refusal(main_pretrain.main, flags(pictures, folder), capsys)
    assert "--output_dir ''" in said
    assert "MAE then saves nothing, but a run here needs a folder" in said


@pytest.mark.parametrize("name", [".lock", "config.yaml", "log.txt"])
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_stands_where_a_file_of_the_run_goes(pictures, tmp_path, capsys, name, kind):
    """A link's target is never written to; what cannot be a file is refused, or leaves the training alone."""
    target, output = tmp_path / "precious", tmp_path / "run"
    target.write_text("precious")
    output.mkdir()
    if kind == "folder":
        (output / name).mkdir()
    elif kind == "link":
        (output / name).symlink_to(target)
    else:
        os.mkfifo(output / name)
    if (name, kind) in {(".lock", "link"), (".lock", "pipe"), ("log.txt", "pipe")} or kind == "folder":
        said = refusal(main_pretrain.main, flags(pictures, output), capsys)
        assert f"--output_dir {output}: {name} in it" in said
    else:
        pretrain(pictures, output)
        assert (output / name).is_file()
        assert not (output / name).is_symlink()
    assert target.read_text() == "precious"


def test_a_log_with_a_broken_byte_is_mended(pictures, tmp_path):
    pretrain(pictures, tmp_path, "--epochs", 1)
    with open(tmp_path / "log.txt", "ab") as file:
        file.write(b'{"epoch": 0, "note": "\xff"}\n\xff\xfe\n')
    lines = pretrain(pictures, tmp_path)
    assert [line["epoch"] for line in lines] == [0, 0, 1]


def test_weights_that_are_not_finite_are_not_started_from(pictures, tmp_path, capsys):
    main_pretrain.main(flags(pictures, tmp_path / "run", "--epochs", 0))
    saved = content(tmp_path / "run")
    saved["model"]["cls_token"].fill_(float("nan"))
    torch.save(saved, tmp_path / "nan.pth")
    for flag in ("--finetune", "--resume"):
        given = flags(pictures, tmp_path / flag, flag, tmp_path / "nan.pth")
        said = refusal(main_pretrain.main, given, capsys)
        assert "nan.pth: cls_token is not finite" in said
    given = ["--data_path", pictures, "--model", "vit_mini_patch4", "--finetune", tmp_path / "nan.pth"]
    given += ["--output_dir", tmp_path / "finetuned", "--num_workers", 0, "--batch_size", 4]
    assert "nan.pth: cls_token is not finite" in refusal(main_finetune.main, given, capsys)
