"""Tar shards, indices and _info.json with wrong numbers and types: one sentence with the name, or right bytes."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile

import data_files
import pytest
from helpers import refusal

import main_finetune
import main_pretrain
from util.data import datasets, tar_index, tar_shards


@pytest.fixture
def shard(tmp_path):
    members = {f"{i}.{kind}": f"{kind} {i}".encode() for i in range(3) for kind in ("jpg", "txt")}
    return data_files.write_tar(tmp_path / "train-0.tar", members | {"0.cls": b"1", "1.cls": b"0"})


def contents(shard) -> list[bytes]:
    images = datasets.open_unlabelled("wds", str(shard.parent), 3)
    return [images.source.read(index) for index in range(len(images))]


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_are_refused(tmp_path, format):
    """Their bytes do not lie in a row, so a read would take those of their neighbours."""
    picture = tmp_path / "a.jpg"
    with open(picture, "wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "b.jpg").write_bytes(b"neighbour")
    command = [
        "tar",
        "--sparse",
        f"--format={format}",
        "-cf",
        tmp_path / "train-0.tar",
        "-C",
        tmp_path,
        "a.jpg",
        "b.jpg",
    ]
    subprocess.run(command, check=True)
    with tarfile.open(tmp_path / "train-0.tar") as tar:
        assert tar.getmember("a.jpg").issparse()
    with pytest.raises(
        ValueError, match=r"train-0\.tar: a\.jpg is a sparse file; write the shard anew without --spars"
    ):
        contents(tmp_path / "train-0.tar")


def with_size(shard, size: bytes, member: int = 2, **headers: str) -> None:
    """Write another size into a member's header, and mend its checksum."""
    with tarfile.open(shard) as tar:
        place = tar.getmembers()[member].offset
    data = bytearray(shard.read_bytes())
    header = data[place : place + 512]
    header[124:136] = size
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(header)[0]
    data[place : place + 512] = header
    shard.write_bytes(data)


NUMBERS = {
    "-1": b"\xff" * 12,
    "-1024": b"\xff" * 10 + b"\xfc\x00",
    "2^33": b"\x80\0\0\0\0\0\0\x02\0\0\0\0",
    "2^80": b"\x80\x01" + bytes(10),
    "largest octal": b"77777777777\0",
    "no number": b"abcdefghijk\0",
}


@pytest.mark.parametrize("member", [0, 2, 7])
@pytest.mark.parametrize("size", NUMBERS)
def test_a_size_that_cannot_be_is_named(shard, size, member):
    with_size(shard, NUMBERS[size], member)
    with pytest.raises(ValueError, match=r"train-0\.tar.*copy it again"):
        contents(shard)


@pytest.mark.parametrize("size", ["-512", "99999999999999999999", "x"])
def test_a_size_in_an_extended_header_that_cannot_be_is_named(tmp_path, size):
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 7, {"size": size}
            tar.addfile(member, io.BytesIO(b"picture"))
    with pytest.raises(ValueError, match=r"train-0\.tar.*copy it again"):
        contents(tmp_path / "train-0.tar")


def test_headers_changed_at_random_give_right_bytes_or_a_sentence(tmp_path):
    """Every outcome is one of the pictures' bytes that were written, or a ValueError that names the shard."""
    random.seed(0)
    members = {f"{i}.jpg": bytes([65 + i]) * (40 + i) for i in range(4)}
    path = data_files.write_tar(tmp_path / "train-0.tar", members | {"long" * 40 + ".jpg": b"L" * 9, "0.cls": b"1"})
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar.getmembers()]
    whole, outcomes = path.read_bytes(), set()
    for _ in range(400):
        data = bytearray(whole)
        place = random.choice(headers)
        for _ in range(random.randrange(1, 4)):
            data[place + random.choice((*range(124, 136), *range(156, 160), *range(256, 512)))] = random.randrange(256)
        header = data[place : place + 512]
        header[148:156] = b"%06o\0 " % tarfile.calc_chksums(header)[0]
        data[place : place + 512] = header
        path.write_bytes(data)
        try:
            index = tar_index.scan(path)
        except ValueError as error:
            outcomes.add("train-0.tar" in str(error))
            continue
        for start, size in zip(index.starts, index.sizes, strict=True):
            assert 512 <= start <= start + size <= len(data)
        outcomes.add("read")
    assert outcomes == {True, "read"}


INDEX = [
    ("tar-index-3\t10240", "tar-index-3\t{length}\t-3"),
    ("tar-index-3\t{length}\t3", "tar-index-3\t{length}\t99999999999999999999999"),
    ("tar-index-3\t{length}\t3", "tar-index-3\tten\t3"),
    ("512\t5\t", "-512\t5\t"),
    ("512\t5\t", "512\t-5\t"),
    ("512\t5\t", "512\t99999999999999999999999\t"),
    ("512\t5\t", "512\t9223372036854775807\t"),
    ("512\t5\t", "9223372036854775807\t5\t"),
    ("512\t5\t", "0\t5\t"),
    ("512\t5\t1", "512\t5\t-7"),
    ("512\t5\t1", "512\t5\tcat"),
    ("512\t5\t1", "512\t5.5\t1"),
    ('"0.jpg"', "7"),
    ('"0.jpg"', '["0.jpg"]'),
    ('"0.jpg"', "[" * 100000),
    ('"0.jpg"', ""),
    ("\n", "\x00"),
]


@pytest.mark.parametrize("change", range(len(INDEX)))
def test_an_index_with_a_wrong_number_or_type_is_named(shard, change, capsys):
    contents(shard)
    index = tar_index.index_path(shard)
    before, after = (text.replace("{length}", str(shard.stat().st_size)) for text in INDEX[change])
    text = index.read_text()
    before = "tar-index-3\t" + text.split("\t")[1] if before.startswith("tar-index-3\t10240") else before
    assert before in text
    index.write_text(text.replace(before, after, 1))
    flags = ["--dataset", "wds", "--data_path", shard.parent, "--output_dir", shard.parent / "run", "--device", "cpu"]
    said = refusal(main_pretrain.main, flags, capsys)
    assert str(index) in said
    assert "delete" in said


INFO = [
    [],
    {"splits": []},
    {"splits": {"train": 3}},
    {"splits": {"train": {"filenames": "train-0.tar", "shard_lengths": [1] * 11}}},
    {"splits": {"train": {"filenames": [7], "shard_lengths": [3]}}},
    {"splits": {"train": {"filenames": ["train-0.tar"], "shard_lengths": ["3"]}}},
    {"splits": {"train": {"filenames": ["train-0.tar"], "shard_lengths": [3.0]}}},
    {"splits": {"train": {"filenames": ["train-0.tar"], "shard_lengths": []}}},
    {"splits": {}, "classes": 3},
    {"splits": {}, "classes": ["cat", 7]},
    {"splits": {}, "classes": {"cat": 0}},
    "[" * 100000,
    "\udce9",
]


@pytest.mark.parametrize("number", range(len(INFO)))
def test_an_info_of_a_wrong_type_is_named(shard, number, capsys):
    info = INFO[number] if isinstance(INFO[number], str) else json.dumps(INFO[number])
    (shard.parent / tar_shards.INFO).write_bytes(info.encode("utf-8", "surrogateescape"))
    flags = ["--dataset", "wds", "--data_path", shard.parent, "--output_dir", shard.parent / "run", "--device", "cpu"]
    said = refusal(main_pretrain.main, flags, capsys)
    assert f"{shard.parent / tar_shards.INFO}: not a description of shards" in said


def test_what_an_info_names_is_never_imported(shard, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"splits": {}, "classes": ["trap", "trap:load"], "masking": "trap:load", "loader": "trap:load"}
    (shard.parent / tar_shards.INFO).write_text(json.dumps(named))
    assert datasets.open_unlabelled("wds", str(shard.parent), 3).classes == ("trap", "trap:load")
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    "label", [b"8589934592", b"1" + b"0" * 20, b"1" + b"0" * 5000, b"-1", b"1.5", b"[" * 100000, b""]
)
def test_a_number_that_is_no_class_is_named_where_classes_are_needed(tmp_path, label, capsys):
    members = {"a.jpg": b"a", "a.cls": label, "b.jpg": b"b", "b.cls": b"0", "c.jpg": b"c", "c.cls": b"1"}
    for split in ("train", "val"):
        data_files.write_tar(tmp_path / f"{split}-0.tar", members)
    assert datasets.open_unlabelled("wds", str(tmp_path), 3).labels.tolist() == [-1, 0, 1]
    flags = ["--dataset", "wds", "--data_path", tmp_path, "--output_dir", tmp_path / "run", "--device", "cpu"]
    said = refusal(main_finetune.main, flags, capsys)
    assert "train-0.tar:a.jpg: this picture has no class" in said
    assert "a class is a number from 0 to 999999" in said


def test_a_class_number_that_would_take_all_memory_is_named(tmp_path):
    members = {"a.jpg": b"a", "a.cls": b"1000000", "b.jpg": b"b", "b.cls": b"0"}
    data_files.write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(ValueError, match=r"train-0\.tar:a\.jpg: this picture has no class.*a number from 0 to 999999"):
        datasets.open_labelled("wds", str(tmp_path), "train", 3)


def test_a_pattern_of_very_many_shards_ends_at_the_first_missing_one(shard):
    with pytest.raises(ValueError, match=r"train-1\.tar: this shard is missing"):
        datasets.open_unlabelled("wds/train-{0..99999999999}.tar", str(shard.parent), 3)
