"""A disk that is full, goes away or is read-only, for real: small file systems of their own. Needs root."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from faults import fill, injected
from helpers import log_lines, refusal, run_main, write_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from util.training import checkpoint, record

MODEL = ["--model", "mae_vit_mini_patch4", "--norm_pix_loss", "--warmup_epochs", 0, "--lr", 1e-3, "--print_freq", 1]


@pytest.fixture
def disk(tmp_path):
    """A file system of 24 MB, room for three checkpoints. Skips the test where it cannot be; REQUIRE_TMPFS=1: fails."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        (pytest.fail if os.environ.get("REQUIRE_TMPFS") else pytest.skip)(f"no tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 training pictures: six steps of four."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), per_class=12, size=(20, 24))


def flags(pictures, output) -> list[str]:
    given = [*MODEL, "--data_path", pictures, "--output_dir", output, "--batch_size", 4, "--epochs", 4]
    return [str(value) for value in [*given, "--num_workers", 0]]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The run without faults."""
    output = tmp_path_factory.mktemp("whole")
    main_pretrain.main(flags(pictures, output))
    return output


def weights(output) -> dict[str, torch.Tensor]:
    return checkpoint.load(output / checkpoint.LAST)["model"]


def lines(output) -> list[dict]:
    """Of the log, without what a clock decides."""
    return [{name: value for name, value in line.items() if name != "train_data_wait"} for line in log_lines(output)]


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_points(pictures, whole, disk, capsys, monkeypatch):
    monkeypatch.setattr(record, "RETRY_S", 0.0)
    output, filler = disk / "run", str(disk / "filler")
    full, free = {"kind": "fill", "forward": 8, "path": filler}, {"kind": "free", "forward": 22, "path": filler}
    with injected([full, free]):
        main_pretrain.main(flags(pictures, output))
    said = capsys.readouterr().err
    assert "no checkpoint could be written" in said
    assert lines(output) == lines(whole)
    torch.testing.assert_close(weights(output), weights(whole), rtol=0, atol=0)
    assert not list(output.glob("*.tmp"))
    events = EventAccumulator(str(output)).Reload()
    assert {1, 24} <= {event.step for event in events.Scalars("train/loss")}


def test_a_disk_that_stays_full_ends_the_run_with_a_sentence_and_a_good_checkpoint(pictures, whole, disk, capsys):
    output, filler = disk / "run", disk / "filler"
    faults = [{"kind": "fill", "forward": 8, "path": str(filler)}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS", json.dumps(faults))
        result = run_main("tests/faults.py", *flags(pictures, output))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --output_dir")
    assert "the last checkpoint could not be written" in last
    assert "Traceback" not in result.stderr
    assert checkpoint.find_own(output)[1]["epoch"] == 0
    said = refusal(main_pretrain.main, flags(pictures, output), capsys)
    assert "cannot be written (No space left on device)" in said
    filler.unlink()
    main_pretrain.main(flags(pictures, output))
    assert lines(output) == lines(whole)
    torch.testing.assert_close(weights(output), weights(whole), rtol=0, atol=0)


def test_a_disk_that_goes_away_and_one_that_is_read_only(pictures, disk, capsys, monkeypatch):
    monkeypatch.setattr(record, "RETRY_S", 0.0)
    output = disk / "run"
    with injected([{"kind": "unmount", "forward": 8, "path": str(disk)}]), pytest.raises(SystemExit) as stop:
        main_pretrain.main(flags(pictures, output))
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith("error: --output_dir")
    assert "No such file or directory" in said
    assert not output.exists()  # nothing is begun anew where the disk was mounted
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", disk], check=True)
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main(flags(pictures, output))
    assert stop.value.code == 2
    assert "cannot be written (Read-only file system)" in capsys.readouterr().err


def test_lines_wait_for_room_and_are_whole(disk):
    path, filler = disk / "log.txt", disk / "filler"
    text = record.Lines(path, lambda line: True)
    text.add("first")
    fill(filler)
    for number in range(3000):  # the last page of the file takes some of them
        text.add(f"line {number}")
    assert len(path.read_text()) < 4097
    filler.unlink()
    text.add("last")
    assert path.read_text().splitlines() == ["first", *(f"line {number}" for number in range(3000)), "last"]
