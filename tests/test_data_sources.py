"""Every source trains on two processes, each picture once; what is wrong with a source is said with its name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import data_files
import numpy as np
import pytest
from helpers import ROOT, environment, log_lines, write_pictures

from util.data import datasets, tar_index, tar_shards
from util.training import checkpoint

TINY = ["--model", "mae_vit_mini_patch4", "--input_size", 16, "--batch_size", 3, "--epochs", 1, "--warmup_epochs", 0]
TINY += ["--num_workers", 0, "--device", "cpu", "--print_freq", 1]
COUNTS = {"cifar10": 15, "digits": 1438}
NAMES = ["folder", "flat", "wds", "parquet", "arrow", "cifar10", "mnist", "npy", "tiff", "few_bad", "digits"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of pre-training on two processes, for all sources under one torchrun."""
    folder = tmp_path_factory.mktemp("sources")
    sources = {name: [*map(str, TINY), *map(str, flags)] for name, flags in data_files.all_sources(folder).items()}
    assert list(sources) == NAMES
    (folder / "sources.json").write_text(json.dumps(sources))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, ROOT / "tests" / "data_worker.py", folder / "sources.json", folder]
    variables = environment(HF_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1")
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=variables, timeout=300)
    assert result.returncode == 0, result.stderr
    (folder / "stderr").write_text(result.stderr)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_see_every_picture_once(trained, name):
    seen = [json.loads((trained / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    assert len(set(seen[0] + seen[1])) == len(seen[0] + seen[1]) == COUNTS.get(name, 12)
    assert abs(len(seen[0]) - len(seen[1])) <= 1
    (line,) = log_lines(trained / "runs" / name)
    assert np.isfinite(line["train_loss"])
    assert line["train_bad_images"] == (name == "few_bad")
    assert 0 <= line["train_data_wait"] <= 1


def test_bad_pictures_are_named_once_over_all_processes_and_too_many_stop_them_all(trained):
    said = (trained / "stderr").read_text()
    assert said.count("bad picture: ") == 2  # in the run that goes on, and in the one that stops
    assert said.count("3.jpg: cannot be decoded") == 2
    assert said.count("error: 1 of 12 pictures cannot be decoded, more than --max_bad_images 0.05 allows") == 1
    assert [json.loads((trained / f"stopped-{rank}.json").read_text()) for rank in (0, 1)] == [2, 2]
    step = checkpoint.load(trained / "runs" / "bad" / checkpoint.LAST)["step"]
    assert step == 1  # before the one with the bad picture


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tar")
    return write_pictures(folder / "pictures"), data_files.write_shards(folder / "pictures", folder / "shards")


def copied(shards, tmp_path):
    place = tmp_path / "shards"
    place.mkdir()
    for path in shards[1].glob("*.tar"):
        (place / path.name).write_bytes(path.read_bytes())
    return place


def test_shards_give_the_pictures_and_classes_of_the_folder(shards):
    folder, place = shards
    for split, count in (("train", 3), ("val", 1)):
        images = datasets.open_labelled("wds", str(place), split, 3)
        files = data_files.jpegs(folder)
        expected = [sample for shard in range(count) for sample in files[shard::count]]
        assert [images.source.read(i) for i in range(12)] == [data for data, _ in expected]
        assert list(images.labels) == [label for _, label in expected]
        assert images.classes == ("0", "1")
    assert (place / "train-001.tar.idx").is_file()
    again = datasets.open_labelled("wds", str(place), "train", 3)
    assert again.source.read(7) == datasets.open_unlabelled("wds", str(place), 3).source.read(7)
    assert again.source.name(0).endswith("train-000.tar:00000.jpg")


@pytest.mark.parametrize("name", ["folder", "wds"])
def test_the_hash_of_the_names_is_the_same_however_the_folder_is_written(tmp_path, monkeypatch, name):
    pictures = write_pictures(tmp_path / "pictures")
    folder = data_files.write_shards(pictures, tmp_path / "shards") if name == "wds" else pictures / "val"
    monkeypatch.chdir(folder)
    written = [str(folder), ".", f"../{folder.name}", f"./../{folder.name}/"]
    assert len({datasets.open_unlabelled(name, path, 3).digest for path in written}) == 1


def test_shards_chosen_by_a_pattern(shards):
    place = str(shards[1])
    assert len(datasets.open_unlabelled("wds/train-{001..002}.tar", place, 3)) == 8
    assert len(datasets.open_unlabelled("wds/*-000.tar", place, 3)) == 16
    with pytest.raises(ValueError, match=r"train-003\.tar: this shard is missing"):
        datasets.open_unlabelled("wds/train-{000..003}.tar", place, 3)
    with pytest.raises(ValueError, match="give the pattern below --data_path"):
        datasets.open_unlabelled(f"wds/{place}/train-000.tar", place, 3)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("keep", [0.4, None])
def test_a_shard_cut_short_is_named(shards, tmp_path, indexed, keep):
    place = copied(shards, tmp_path)
    if indexed:
        datasets.open_unlabelled("wds", str(place), 3)
    path = place / "train-001.tar"
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    path.write_bytes(data[: int(len(data) * keep)] if keep else data[: end - end % 512])  # None: between two members
    with pytest.raises(ValueError, match=r"train-001\.tar.*(cut short|copy it again)"):
        datasets.open_unlabelled("wds", str(place), 3)


def test_an_index_that_does_not_match_is_named(shards, tmp_path):
    place = copied(shards, tmp_path)
    datasets.open_unlabelled("wds", str(place), 3)
    index = place / "train-000.tar.idx"
    whole = index.read_text()
    lines = whole.splitlines()
    first = lines[1].split("\t")
    moved = "\t".join([str(int(first[0]) + 512), *first[1:]])
    for text in ("", "\n".join(lines[:-1]), "\n".join([lines[0], moved, *lines[2:]]), whole.replace("\t", " ")):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"train-000\.tar\.idx: (this index does not match|not a whole index)"):
            datasets.open_unlabelled("wds", str(place), 3)


def test_shards_that_the_description_names_must_be_there_and_whole(shards, tmp_path):
    place = copied(shards, tmp_path)
    names, lengths = [f"train-00{n}.tar" for n in range(3)], [4, 4, 4]
    split = {"name": "train", "num_samples": 12, "filenames": names, "shard_lengths": lengths}
    info = {"splits": {"train": split}, "classes": ["cat", "dog"]}
    (place / tar_shards.INFO).write_text(json.dumps(info))
    assert datasets.open_labelled("wds", str(place), "train", 3).classes == ("cat", "dog")
    lengths[1] = 5
    (place / tar_shards.INFO).write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"train-001\.tar: holds 4 pictures, but .*_info\.json says 5"):
        datasets.open_unlabelled("wds", str(place), 3)
    (place / "train-001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-001\.tar: this shard is missing"):
        datasets.open_unlabelled("wds", str(place), 3)
    (place / tar_shards.INFO).write_text("{")
    with pytest.raises(ValueError, match=r"_info\.json: not a description"):
        datasets.open_unlabelled("wds", str(place), 3)


def test_a_picture_without_its_class_is_named(shards, tmp_path):
    place = data_files.write_shards(shards[0], tmp_path / "shards", labels=False)
    assert len(datasets.open_unlabelled("wds", str(place), 3)) == 12
    with pytest.raises(ValueError, match=r"train-000\.tar:00000\.jpg: this picture has no class"):
        datasets.open_labelled("wds", str(place), "train", 3)


def opened(folder) -> tuple[list[bytes], list[int]]:
    """Contents and classes, twice: from the shard, then from its index."""
    first, again = (datasets.open_unlabelled("wds", str(folder), 3) for _ in range(2))
    contents = [first.source.read(i) for i in range(len(first))]
    assert contents == [again.source.read(i) for i in range(len(again))]
    assert list(first.source.names) == list(again.source.names)
    assert list(first.labels) == list(again.labels)
    return contents, list(first.labels)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["a.jpg", "a.seg.png", "b.seg.png", "b.jpg"], ["a.jpg", "b.jpg"]),
        (["a.jpg", "a.npy", "a.seg.npy", "b.npy", "b.JPEG"], ["a.jpg", "b.JPEG"]),
        (["v1.0/x.3/a.jpg", "v1.0/x.4/a.jpg", "._a.jpg"], ["v1.0/x.3/a.jpg", "v1.0/x.4/a.jpg"]),
        (["a.jpg", "a.png"], r"train-0\.tar: several pictures of one key \(a\.jpg, a\.png\)"),
        (["a.jpg", "./a.jpg"], "several pictures of one key"),
        (["img.000.jpg", "img.001.jpg"], r"after the first dot \(img\.000\.jpg, img\.001\.jpg\)"),
        (["a.jpg", "b.seg.png", "b.npy"], r"after the first dot \(b\.seg\.png\)"),
    ],
)
def test_a_key_of_a_shard_has_one_picture(tmp_path, members, expected):
    data_files.write_tar(tmp_path / "train-0.tar", {name: name.encode() for name in members})
    if isinstance(expected, list):
        assert list(datasets.open_unlabelled("wds", str(tmp_path), 3).source.names) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            datasets.open_unlabelled("wds", str(tmp_path), 3)


def test_links_in_a_shard_are_followed(tmp_path):
    def write(target):
        with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
            data_files.add_member(tar, "./x/a.jpg", b"picture")
            data_files.add_member(tar, "x/a.cls", b"3")
            for name, kind, linked in (
                ("x/b.jpg", tarfile.LNKTYPE, "./x/a.jpg"),
                ("y/c.jpg", tarfile.SYMTYPE, "../x/b.jpg"),
                ("x/b.cls", tarfile.SYMTYPE, "a.cls"),
                ("x/d.jpg", tarfile.SYMTYPE, target),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, linked
                tar.addfile(member)

    write("./b.jpg")
    assert opened(tmp_path) == ([b"picture"] * 4, [3, 3, -1, -1])
    for target in ("/data/d.jpg", "d.jpg", "../nothing.jpg"):
        write(target)
        with pytest.raises(ValueError, match=r"train-0\.tar: x/d\.jpg is a link to .*(d|nothing)\.jpg, which"):
            opened(tmp_path)


def test_what_is_no_class_number_is_no_class(tmp_path):
    caption = json.dumps({"caption": "a cat", "url": "http://x", "status": "success"}).encode()
    texts = [caption, b'[{"bbox": [1, 2]}]', b'{"label": null}', b'{"label": "cat"}', b"\xff\xfe{", b'{"label": 2}']
    members = {f"{i}.{kind}": data for i, text in enumerate(texts) for kind, data in (("json", text), ("jpg", b""))}
    data_files.write_tar(tmp_path / "train-0.tar", {**members, "6.json": caption, "6.cls": b"4\n", "6.jpg": b""})
    assert opened(tmp_path)[1] == [-1] * 5 + [2, 4]
    with pytest.raises(ValueError, match=r"train-0\.tar:0\.jpg: this picture has no class"):
        datasets.open_labelled("wds", str(tmp_path), "train", 3)


def test_any_name_in_a_shard_can_be_indexed(tmp_path):
    names = ["caf\udce9.jpg", "a\u2028b.jpg", "a\nb.jpg", "a\tb.jpg", "long" * 60 + "é.jpg"]
    data_files.write_tar(tmp_path / "train-0.tar", {name: name.encode("utf-8", "surrogateescape") for name in names})
    assert opened(tmp_path)[0] == [name.encode("utf-8", "surrogateescape") for name in names]
    assert list(datasets.open_unlabelled("wds", str(tmp_path), 3).source.names) == names


@pytest.mark.parametrize("damage", [b"\0" * 512, b"\x17" * 512])
def test_damage_in_the_middle_of_a_shard_is_named(tmp_path, damage):
    shard = data_files.write_tar(tmp_path / "train-0.tar", {f"{i}.jpg": b"picture" * 100 for i in range(20)})
    with tarfile.open(shard) as tar:
        place = tar.getmembers()[10].offset
    data = bytearray(shard.read_bytes())
    data[place : place + 512] = damage
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"train-0\.tar: damaged or cut short at byte {place}, .*copy it again"):
        datasets.open_unlabelled("wds", str(tmp_path), 3)


def test_a_shard_of_which_the_end_was_never_written_is_named(tmp_path):
    shard = data_files.write_tar(tmp_path / "train-0.tar", {f"{i}.jpg": bytes([i]) * 10**5 for i in range(40)})
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(ValueError, match=r"train-0\.tar: \d+ bytes follow its last member at byte \d+, too many"):
        datasets.open_unlabelled("wds", str(tmp_path), 3)


def test_an_index_older_than_its_shard_or_of_an_earlier_format_is_made_anew(tmp_path):
    shard = data_files.write_tar(tmp_path / "train-0.tar", {"a.jpg": b"a", "a.cls": b"0"})
    index = tmp_path / "train-0.tar.idx"
    assert opened(tmp_path) == ([b"a"], [0])
    second = shard.stat().st_mtime_ns + 10**9
    data_files.write_tar(shard, {"a.jpg": b"b", "a.cls": b"5"})
    os.utime(shard, ns=(second, second))
    assert opened(tmp_path) == ([b"b"], [5])
    for magic in ("tar-index-1", "tar-index-2"):
        index.write_text(f"{magic}\t{shard.stat().st_size}\t1\n512\t1\t7\ta.jpg\n")
        os.utime(index, ns=(second, second))
        assert opened(tmp_path) == ([b"b"], [5])
        assert index.read_text().startswith("tar-index-3")


def test_two_machines_with_the_same_process_number_index_a_shared_folder(tmp_path, monkeypatch):
    """Containers may both be process 1: the other one keeps its index between this one's writing and its rename."""
    shard = data_files.write_tar(tmp_path / "train-0.tar", {"a.jpg": b"a"})
    index, replace, names = tar_index.scan(shard), Path.replace, []

    def replace_after_the_other(self, target):
        names.append(self.name)
        if len(names) == 1:
            index.save(shard)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_after_the_other)
    index.save(shard)
    assert len(set(names)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"train-0.tar", "train-0.tar.idx"}


def test_an_index_that_cannot_be_kept_leaves_nothing(tmp_path, monkeypatch):
    data_files.write_tar(tmp_path / "train-0.tar", {"a.jpg": b"a", "a.cls": b"0"})

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert opened(tmp_path) == ([b"a"], [0])
    assert [path.name for path in tmp_path.iterdir()] == ["train-0.tar"]


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        ("part-0 part-1 val-0", "part-0 part-1", "val-0"),
        ("part-0 val.0 part-test-1", "part-0", "val.0"),
        ("in1k-train-00 in1k-validation-00 in1k-test-00", "in1k-train-00", "in1k-validation-00"),
        ("in1k_Train_00 other", "in1k_Train_00", ""),
        ("evaluate-0 trained-0", "evaluate-0 trained-0", ""),
        ("train/0 train/1 train-2 val/0", "train/0 train/1", "val/0"),
        ("val-0 test-0", "", "val-0"),
    ],
)
def test_shards_of_another_split_are_never_trained_on(tmp_path, names, train, val):
    for name in names.split():
        data_files.write_tar(tmp_path / f"{name}.tar", {"a.jpg": b"", "a.cls": b"0"})
    for split, expected in (("train", train), ("val", val)):
        if expected:
            found = tar_shards.find_shards(tmp_path, "", split)
            assert found == [tmp_path / f"{name}.tar" for name in expected.split()]
        else:
            with pytest.raises(ValueError, match=f"no shards of the split {split}"):
                tar_shards.find_shards(tmp_path, "", split)


@pytest.mark.parametrize("name", ["train-val-0", "train/validation-0"])
def test_a_shard_of_two_splits_is_asked_about(tmp_path, name):
    data_files.write_tar(tmp_path / f"{name}.tar", {"a.jpg": b""})
    with pytest.raises(ValueError, match=r"0\.tar: train or val\? Rename this shard, or"):
        tar_shards.find_shards(tmp_path, "", "train")


def test_a_missing_part_of_a_library_s_data_set_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data_files.write_mnist(tmp_path)
    assert datasets.open_labelled("torch/mnist", str(tmp_path), "val", 1).picture(3).size == (28, 28)
    (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "nothing").mkdir()
    cases = [
        ("torch/mnist", tmp_path, r"torch/mnist: .*Dataset not found"),
        ("torch/cifar", tmp_path, r"torch/cifar: .*Unknown torchvision dataset"),
        ("torch", tmp_path, "such as torch/cifar10"),
        (f"hfds/{tmp_path / 'nothing'}", None, "has no split to take for train"),
        ("hfds", None, "name the folder with --data_path"),
        ("hfids/imagenet-1k", None, "a stream cannot be resumed exactly"),
        ("wds", tmp_path, "no shards of the split train"),
        ("wds/*.tar", tmp_path, "this shard is missing"),
        ("wdz", tmp_path, "did you mean 'wds'"),
    ]
    for name, place, message in cases:
        with pytest.raises(ValueError, match=message):
            datasets.open_unlabelled(name, place and str(place), 1)


def test_parquet_has_its_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = data_files.write_parquet(write_pictures(tmp_path / "pictures"), tmp_path / "parquet")
    images = datasets.open_labelled(f"hfds/{place}", str(tmp_path / "cache"), "val", 3)
    assert images.classes == ("no", "yes")
    assert list(images.labels) == [0] * 6 + [1] * 6
    assert images.picture(11).size == (40, 48)
    assert images.source.name(11).endswith("validation, row 11 (11.jpg)")
