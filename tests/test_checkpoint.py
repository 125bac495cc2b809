"""Checkpoints: safe to load, whole or absent, clear about what does not fit."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import fractions
import io
import os
import pathlib
import pickle
import random
import resource
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from helpers import tiny_mae

from util.training import checkpoint, record
from util.training.saver import Saver


def test_a_published_checkpoint_with_a_pickled_namespace_loads(tmp_path):
    path = tmp_path / "mae.pth"
    torch.save({"model": tiny_mae().state_dict(), "args": argparse.Namespace(model="mae", epochs=800)}, path)
    content = checkpoint.load(path)
    assert checkpoint.arguments(content)["epochs"] == 800
    checkpoint.check_state(path, tiny_mae(), checkpoint.model_state(content))


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Bomb()}, "bomb.pth")
    with pytest.raises(ValueError, match=r"^bomb.pth: holds an object of posix.system, and loading it would run code"):
        checkpoint.load("bomb.pth")
    assert not (tmp_path / "exploded").exists()


HARMLESS = {
    "posix": pathlib.PurePosixPath("/a/b"),
    "windows": pathlib.PureWindowsPath(r"C:\a\b"),
    "here": pathlib.Path("a") / "b",
    "float": np.float64(3.5),
    "half": np.float16(2),
    "int": np.int64(-7),
    "big_endian": np.dtype(">i4").type(5),
    "bool": np.bool_(True),
    "text": np.str_("abc"),
    "ordered": collections.OrderedDict(a=1),
    "size": torch.Size([1, 2]),
    "set": {1, 2},
    "none": None,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_harmless_objects_of_published_files_load_as_plain_values(tmp_path, zipped):
    path = tmp_path / "slurm.pth"
    content = {"model": {"w": torch.ones(1)}, "args": argparse.Namespace(**HARMLESS), "best": np.float32(0.5)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = checkpoint.load(path)
    expected = HARMLESS | {name: str(HARMLESS[name]) for name in ("posix", "windows", "here")}
    assert checkpoint.arguments(found) == expected
    assert not [value for value in checkpoint.arguments(found).values() if isinstance(value, np.generic)]
    assert found["best"] == 0.5


@pytest.mark.parametrize("name", ["pathlib.WindowsPath", "pathlib._local.PosixPath", "numpy.core.multiarray.scalar"])
def test_names_of_other_systems_and_versions_load_too(tmp_path, name):
    """A file made on Windows, under Python 3.13, or with numpy 1."""
    written = {"numpy.core.multiarray.scalar": (b"cnumpy._core.multiarray\nscalar", np.float64(1.5))}
    written |= {"pathlib.WindowsPath": (b"cpathlib\nPureWindowsPath", pathlib.PureWindowsPath("a"))}
    written |= {"pathlib._local.PosixPath": (b"cpathlib\nPurePosixPath", pathlib.PurePosixPath("a"))}
    old, value = written[name]
    module, _, leaf = name.rpartition(".")
    buffer = io.BytesIO()
    torch.save({"args": {"value": value}}, buffer, _use_new_zipfile_serialization=False)
    assert old in buffer.getvalue()
    (tmp_path / "x.pth").write_bytes(buffer.getvalue().replace(old, f"c{module}\n{leaf}".encode()))
    assert checkpoint.load(tmp_path / "x.pth")["args"]["value"] in (1.5, "a")


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), np.zeros(2), slice(1), fractions.Fraction(1, 2)])
def test_a_class_that_is_not_allowed_is_named_in_one_whole_sentence(tmp_path, value):
    torch.save({"model": {}, "extra": value}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: holds an object of \S+, and .*dictionaries only$") as caught:
        checkpoint.load(tmp_path / "x.pth")
    said = str(caught.value)
    assert "\x1b" not in said
    assert "\n" not in said
    assert type(value).__name__ in said or "numpy" in said


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"model": {"w": torch.zeros(50_000_000)}}, tmp_path / "big.pth")
    with zipfile.ZipFile(tmp_path / "big.pth") as source, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert (tmp_path / "bomb.pth").stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.pth: damaged \(compressed, and could unpack to any size"):
        checkpoint.load(tmp_path / "bomb.pth")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_parts_that_share_their_bytes_are_refused(tmp_path):
    """A directory that names the same bytes many times would unpack to any size, too."""
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", bytes(1000))
        info = copy.copy(archive.infolist()[0])
        for number in range(5):
            other = copy.copy(info)
            other.filename = f"x/data/{number}"
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other
        archive._didModify = True
    with pytest.raises(ValueError, match="its parts are larger than the file"):
        checkpoint.load(tmp_path / "x.pth")


@pytest.mark.parametrize("args", [[1], "text", 3, torch.ones(2)])
def test_settings_that_are_no_dictionary_are_refused(tmp_path, args):
    torch.save({"model": {"w": torch.ones(1)}, "args": args}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: its args are a \w+, not a dictionary of settings"):
        checkpoint.load(tmp_path / "x.pth")


VIT = {"patch_embed.proj.weight": torch.ones(1), "blocks.0.attn.qkv.bias": torch.ones(1)}


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "student", "teacher", "model_ema", None])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "encoder.", "backbone.", "model.", "module._orig_mod.", "module.backbone."]
)
def test_known_wrappers_are_taken_off(key, prefix):
    state = {prefix + name: value for name, value in VIT.items()}
    assert checkpoint.model_state({key: state, "epoch": 3} if key else state).keys() == VIT.keys()


def test_what_stands_beside_a_wrapped_encoder_keeps_its_name():
    state = {f"encoder.{name}": value for name, value in VIT.items()} | {"decoder.0.weight": torch.ones(1)}
    assert checkpoint.model_state({"model": state}).keys() == VIT.keys() | {"decoder.0.weight"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": VIT, "model_ema": VIT}, "holds several models, student, model_ema; save the one that is meant"),
        ({f"{who}.{name}": VIT[name] for name in VIT for who in ("a", "b")}, r"called a\. and b\.patch_embed"),
        ({f"visual.{name}": VIT[name] for name in VIT}, r"called visual\.patch_embed"),
        (
            {f"{who}.{name}": VIT[name] for name in VIT for who in ("student", "teacher")},
            r"called student\. and teacher",
        ),
        ({"w": torch.ones(1), "module.w": torch.ones(1)}, "two tensors of one name"),
        ({"w": torch.ones(2).to_sparse()}, "w is not a dense tensor"),
        ({"w": torch.ones(2, device="meta")}, "w is not a dense tensor"),
    ],
)
def test_what_could_mean_anything_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.model_state(content)


def test_weights_that_are_not_finite_or_of_another_kind_are_refused_at_the_start():
    state = tiny_mae().state_dict()
    with pytest.raises(ValueError, match=r"norm.weight is torch.complex64 in it and torch.float32 in the model"):
        checkpoint.check_state("x.pth", tiny_mae(), state | {"norm.weight": state["norm.weight"].to(torch.complex64)})
    state["norm.weight"][3] = float("inf")
    with pytest.raises(ValueError, match=r"^x.pth: norm.weight is not finite"):
        checkpoint.check_state("x.pth", tiny_mae(), state)


def test_what_is_no_checkpoint_is_said(tmp_path):
    whole = tmp_path / "whole.pth"
    checkpoint.save(whole, {"model": tiny_mae().state_dict()})
    data = whole.read_bytes()
    cases = {"empty": b"", "truncated": data[: len(data) // 2], "text": b"hello " * 100, "pickle": pickle.dumps([1])}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            checkpoint.load(tmp_path / name)
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"/proc/self/mem: cannot be read \(Input/output error\)"):
        checkpoint.load("/proc/self/mem")  # is there, and refuses whoever reads it, root too


def test_saving_leaves_nothing_but_the_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "a.pth", {"epoch": 1})
    checkpoint.save(tmp_path / "a.pth", {"epoch": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert checkpoint.load(tmp_path / "a.pth") == {"epoch": 2}


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "a.pth", {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.save(tmp_path / "a.pth", {"epoch": lambda: 2})
    assert checkpoint.load(tmp_path / "a.pth") == {"epoch": 1}


def test_state_dicts_come_in_several_wrappings():
    state = {"weight": torch.ones(1)}
    for content in ({"model": state}, {"state_dict": state}, state, {"model": {"module.weight": torch.ones(1)}}):
        assert list(checkpoint.model_state(content)) == ["weight"]
    with pytest.raises(ValueError, match="no model weights"):
        checkpoint.model_state({"epoch": 3})


def test_differing_tensors_are_named():
    with pytest.raises(ValueError, match=r"decoder_pred.weight is \(48, 32\) in it and \(16, 32\) in the model"):
        checkpoint.check_state("x.pth", tiny_mae(in_chans=1), tiny_mae().state_dict())
    state = tiny_mae().state_dict()
    del state["mask_token"]
    with pytest.raises(ValueError, match="mask_token is missing"):
        checkpoint.check_state("x.pth", tiny_mae(), state)


def fill(folder, steps=(1, 2)):
    """A run's folder with two generations of the last checkpoint."""
    saver = Saver(folder, every_minutes=10, keep_last=None)
    for step in steps:
        saver.save({"model": tiny_mae().state_dict(), "step": step})
    assert saver.finish() == ""


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert checkpoint.find_own(tmp_path) is None
    fill(tmp_path)
    assert checkpoint.find_own(tmp_path)[1]["step"] == 2
    (tmp_path / checkpoint.LAST).unlink()  # killed between the two renames
    assert checkpoint.find_own(tmp_path)[1]["step"] == 1


@pytest.mark.parametrize("tenth", range(10))
def test_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path, tenth):
    fill(tmp_path)
    last = tmp_path / checkpoint.LAST
    last.write_bytes(last.read_bytes()[: last.stat().st_size * tenth // 10])
    with pytest.warns(UserWarning, match="checkpoint-last.pth: damaged") as warned:
        path, content = checkpoint.find_own(tmp_path)
    assert (path.name, content["step"], len(warned)) == (checkpoint.PREVIOUS, 1, 1)


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    """Alignment between tensors has no checksum, and needs none."""
    fill(tmp_path)
    last = tmp_path / checkpoint.LAST
    whole, expected = last.read_bytes(), checkpoint.load(last)["model"]
    rng, noticed = random.Random(0), 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        last.write_bytes(data)
        try:
            found = checkpoint.load(last)["model"]
        except ValueError:
            noticed += 1
            continue
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert noticed > 100


def test_a_damaged_checkpoint_does_not_replace_the_one_before_it(tmp_path):
    fill(tmp_path)
    (tmp_path / checkpoint.LAST).write_bytes(b"PK")
    fill(tmp_path, steps=(3,))
    steps = [checkpoint.load(tmp_path / name)["step"] for name in (checkpoint.LAST, checkpoint.PREVIOUS)]
    assert steps == [3, 1]


@pytest.mark.parametrize("killed_at", range(4))
def test_killed_at_a_rename_nothing_is_lost(tmp_path, monkeypatch, killed_at):
    """Until the new one is the last, the run continues with the old one, and writes the epoch's checkpoint again."""
    fill(tmp_path, steps=(1,))
    replace, calls = os.replace, iter(range(100))

    def kill(*paths):
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            save_and_keep(tmp_path)
    assert checkpoint.find_own(tmp_path)[1]["step"] == 1
    save_and_keep(tmp_path)
    assert checkpoint.find_own(tmp_path)[1]["step"] == 2
    assert checkpoint.load(tmp_path / "checkpoint-7.pth")["step"] == 2


def save_and_keep(folder) -> None:
    saver = Saver(folder, every_minutes=10, keep_last=None)
    saver.save({"model": tiny_mae().state_dict(), "step": 2}, keep_as=7)
    saver.wait()


def test_all_damaged_is_said(tmp_path):
    fill(tmp_path)
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="all its checkpoints are damaged"):
        checkpoint.find_own(tmp_path)


def test_only_the_newest_are_kept_and_all_are_whole(tmp_path):
    saver = Saver(tmp_path, every_minutes=10, keep_last=2)
    for epoch in range(11):
        saver.save({"model": {"weight": torch.full((2,), float(epoch))}, "epoch": epoch}, keep_as=epoch)
    assert saver.finish() == ""
    names = {"checkpoint-9.pth", "checkpoint-10.pth", checkpoint.LAST, checkpoint.PREVIOUS}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert checkpoint.load(tmp_path / "checkpoint-9.pth")["epoch"] == 9
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["epoch"] == 9


def test_what_is_saved_is_what_was_there_at_the_time(tmp_path):
    weight, saver = torch.zeros(100_000), Saver(tmp_path, 10, None)
    saver.save({"model": {"weight": weight}})
    weight += 1
    assert saver.finish() == ""
    assert not checkpoint.load(tmp_path / checkpoint.LAST)["model"]["weight"].any()


def test_weights_that_are_not_finite_replace_nothing(tmp_path):
    fill(tmp_path)
    with pytest.raises(FloatingPointError, match="weight is not finite"):
        Saver(tmp_path, 10, None).save({"model": {"weight": torch.tensor([float("nan")])}})
    assert checkpoint.find_own(tmp_path)[1]["step"] == 2


def test_a_full_disk_is_survived_and_the_next_try_succeeds(tmp_path, capsys):
    """The limit on the size of files makes the system refuse to write, as a full disk does."""
    fill(tmp_path)
    saver, before = Saver(tmp_path, 10, None), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        saver.save({"model": tiny_mae().state_dict(), "step": 3})
        saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "no checkpoint could be written" in capsys.readouterr().err
    assert checkpoint.find_own(tmp_path)[1]["step"] == 2
    assert not list(tmp_path.glob("*.tmp"))
    saver.save({"model": tiny_mae().state_dict(), "step": 4})
    assert saver.finish() == ""
    assert checkpoint.find_own(tmp_path)[1]["step"] == 4


def test_a_failed_write_is_noticed_before_the_next_one_is_due_and_tried_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "RETRY_S", 0.0)
    folder = tmp_path / "run"
    saver = Saver(folder, 10, None)  # a folder that is not there
    saver.save({"model": {"weight": torch.zeros(2)}})
    end = time.monotonic() + 60
    while not saver.due():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "no checkpoint could be written" in capsys.readouterr().err
    folder.mkdir()
    saver.save({"model": {"weight": torch.ones(2)}})
    assert saver.finish() == ""
    assert checkpoint.find_own(folder)[1]["model"]["weight"].all()


def test_one_to_keep_that_could_not_be_written_comes_before_the_next(tmp_path, capsys):
    folder = tmp_path / "run"
    saver = Saver(folder, 10, None)  # a folder that is not there
    for step, keep_as in ((1, 400), (2, 420), (3, None)):
        saver.save({"model": {"weight": torch.full((2,), float(step))}, "step": step}, keep_as)
        saver.wait()
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("in a minute")[2] for line in said] == [
        ", checkpoint-400.pth first",
        ", checkpoint-420.pth first; checkpoint-400.pth is given up",
        ", checkpoint-420.pth first",
    ]
    folder.mkdir()
    saver.save({"model": {"weight": torch.zeros(2)}, "step": 4})
    assert saver.finish() == ""
    found = {path.name: checkpoint.load(path)["step"] for path in folder.iterdir()}
    assert found == {"checkpoint-420.pth": 2, checkpoint.PREVIOUS: 2, checkpoint.LAST: 4}


def test_a_folder_that_is_gone_fails_the_final_save_with_a_sentence(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    saver = Saver(folder, 10, None)
    folder.rmdir()
    saver.save({"model": {"weight": torch.zeros(2)}})
    assert "the last checkpoint could not be written" in saver.finish()
