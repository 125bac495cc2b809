"""Nothing that stands in a file is imported, called or downloaded, whatever the format."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys

import pytest
import torch
from helpers import ROOT, refusal
from safetensors.torch import load_file, save_file

from evaluation import checkpoints, measure
from exporting import formats
from methods import base
from util.config import PretrainSettings
from util.training import checkpoint

MARK = "import pathlib\npathlib.Path('ran').touch()\n"
STRATEGY = "import masking\nclass Mine(masking.SBAM):\n    pass\n"


def script(name: str):
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name=name)["main"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with modules that leave the file `ran` when they are imported."""
    (tmp_path / "hubconf.py").write_text(MARK + "def evil(**options):\n    pass\n")
    (tmp_path / "mine.py").write_text(MARK + STRATEGY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def write(path, **args):
    settings = PretrainSettings(model="mae_vit_mini_patch4", in_chans=1, dataset="digits")
    state = base.build_model(settings).state_dict()
    checkpoint.save(path, {"model": state, "args": settings.as_dict() | args, "grid": [4, 4]})
    return path


NAMED = {
    "module": {"masking": "mine:Mine"},
    "hub": {"masking": "torch.hub:load", "masking_args": ["repo_or_dir=.", "model=evil", "source=local"]},
    "loader": {"loader": "mine:Mine"},
    "unknown": {"masking": "sbamm"},
    "model": {"model": "mine:Mine"},
    "model_and_masking": {"model": "torch.hub:load", "masking": "os:system", "masking_args": ["command=touch ran"]},
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("named", NAMED)
def test_code_that_a_file_names_never_runs(folder, named, suffix):
    path = write(folder / "x.pth", **NAMED[named])
    if suffix == ".safetensors":  # by hand: an export refuses some of these
        metadata = {"args": json.dumps(checkpoint.load(path)["args"]), "grid": "[4, 4]"}
        save_file(checkpoint.load(path)["model"], folder / "x.safetensors", metadata)
        path = folder / "x.safetensors"
        arguments = [["export", path, "--from", "safetensors", "--output", "back.pth"]]
    else:
        arguments = [["export", path, "--to", to, "--output", f"out{i}.{e}"] for i, (to, e) in enumerate(EXPORTS)]
        arguments += [["evaluate", path, "--metrics", *measure.METRICS, "--train_images", 20, "--val_images", 20]]
        arguments += [["visualize", path, "--dataset", "digits", "--output", "x.png", *more] for more in ([], REBUILD)]
    for name, *flags in arguments:
        with contextlib.suppress(SystemExit):  # it may refuse, but it may not fail
            script(name)([str(flag) for flag in flags])
    assert not (folder / "ran").exists()


EXPORTS = [("timm", "pth"), ("mae", "pth"), ("safetensors", "safetensors")]
REBUILD = ["--rebuild", "sbam"]


def test_a_refused_strategy_is_one_sentence_and_what_needs_none_still_works(folder, capsys):
    path = write(folder / "x.pth", masking="mine:Mine")
    sentence = "x.pth: names the masking 'mine:Mine', which is not imported or downloaded on a file's word"
    evaluate = [path, "--train_images", 20, "--val_images", 20, "--metrics"]
    assert sentence in refusal(script("evaluate"), [*evaluate, "salience"], capsys)
    assert sentence in refusal(script("visualize"), [path, "--dataset", "digits"], capsys)
    script("evaluate")([str(flag) for flag in (*evaluate, "knn")])
    assert f"note: {path.parent / sentence}" in capsys.readouterr().out
    script("visualize")([str(path), "--dataset", "digits", "--output", "x.png", *REBUILD])
    assert f"note: {path.parent / sentence}" in capsys.readouterr().out
    assert not (folder / "ran").exists()


def test_a_strategy_that_the_command_line_names_too_is_used_with_the_file_s_options(folder):
    path = write(folder / "x.pth", masking="mine:Mine", masking_args=["temperature=5"])
    opened = checkpoints.open_checkpoint(path, masking="mine:Mine")
    assert (type(opened.strategy).__name__, opened.strategy.temperature, opened.refused) == ("Mine", 5, {})
    assert (folder / "ran").exists()
    for name, more in (("evaluate", ["--metrics", "salience"]), ("visualize", ["--dataset", "digits"])):
        script(name)([str(path), "--masking", "mine:Mine", "--output", f"{name}.png", *more])
    other = checkpoints.open_checkpoint(path, masking="random")  # the file's options are of another strategy
    assert type(other.strategy).__name__ == "RandomMasking" or other.settings.masking == "random"


@pytest.mark.parametrize("dataset", ["hfds/someone/theirs", "hfds"])
def test_a_data_set_of_the_hub_is_not_fetched_on_a_file_s_word(folder, capsys, dataset):
    path = write(folder / "x.pth", dataset=dataset, data_path="someone/theirs")
    said = refusal(script("evaluate"), [path, "--metrics", "rank_me"], capsys)
    assert f"names the dataset '{dataset}', which is not imported or downloaded on a file's word" in said
    script("evaluate")([str(path), "--metrics", "rank_me", "--dataset", "digits"])


WRONG = [
    {"masking": 3},
    {"masking": ["a"]},
    {"masking_args": "delta=1"},
    {"masking_args": [1]},
    {"masking": "sbam", "masking_args": ["no_such=1"]},
    {"mask_ratio": "many"},
    {"mask_ratio": float("nan")},
    {"mask_ratio": 7},
    {"input_size": "16"},
    {"input_size": 10**30},
    {"model": 7},
    {"mean": "grey"},
    {"mean": [1.0, 2.0]},
    {"std": [0.0]},
    {"norm_pix_loss": "yes"},
    {"dataset": 5},
    {"data_path": [1]},
]


@pytest.mark.parametrize("args", WRONG, ids=str)
def test_a_setting_of_the_wrong_kind_is_one_sentence_with_the_file_s_name(folder, capsys, args):
    path = write(folder / "x.pth", **args)
    assert "x.pth: " in refusal(script("visualize"), [path, "--dataset", "digits"], capsys)


@pytest.mark.parametrize("grid", ["4x4", [4, 5], [-4, -4], [4], [4, 4, 1], [10**30, 1]], ids=str)
def test_a_grid_that_cannot_be_is_one_sentence(folder, capsys, grid):
    path = write(folder / "x.pth")
    checkpoint.save(path, checkpoint.load(path) | {"grid": grid})
    assert "x.pth: its grid is" in refusal(script("visualize"), [path, "--dataset", "digits"], capsys)
    assert "x.pth: its grid is" in refusal(script("export"), [path, "--to", "timm", "--output", "y.pth"], capsys)


@pytest.mark.parametrize(
    "metadata", [{"args": "{"}, {"args": "[1]"}, {"grid": '"x"'}, {"classes": "[1]"}, {"args": "[" * 100_000}]
)
def test_metadata_of_safetensors_is_checked(folder, capsys, metadata):
    path = formats.read(write(folder / "x.pth"))
    formats.write(path, "safetensors", folder / "y.safetensors")
    save_file(load_file(folder / "y.safetensors"), folder / "y.safetensors", metadata)
    arguments = [folder / "y.safetensors", "--from", "safetensors", "--output", "z.pth"]
    assert "y.safetensors: its " in refusal(script("export"), arguments, capsys)


def test_weights_that_are_not_finite_are_not_looked_at(folder, capsys):
    path = write(folder / "x.pth")
    content = checkpoint.load(path)
    content["model"]["norm.bias"][0] = torch.nan
    checkpoint.save(path, content)
    for name, more in (("visualize", ["--dataset", "digits"]), ("evaluate", []), ("export", EXPORT)):
        assert "x.pth: norm.bias is not finite" in refusal(script(name), [path, *more], capsys)


EXPORT = ["--to", "timm", "--output", "y.pth"]
