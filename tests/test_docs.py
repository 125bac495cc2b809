"""What the documents say can be done as they say it."""

from __future__ import annotations

import inspect
import itertools
import re
import runpy
import shlex

import pytest
import torch
from helpers import ROOT

import masking
import methods
from util import cli
from util.config import FinetuneSettings, LinprobeSettings, PretrainSettings

MAINS = {"pretrain": PretrainSettings, "finetune": FinetuneSettings, "linprobe": LinprobeSettings}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", ["README.md", "docs/MASKING.md"])
def test_the_example_strategy_works(document, tmp_path, monkeypatch):
    text = (ROOT / document).read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class LargestNorm" in block]
    module = f"example_{document.split('/')[-1].split('.')[0].lower()}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    strategy = masking.create(f"{module}:LargestNorm", mask_ratio=0.6, randomness=0)
    tokens = torch.randn(2, 10, 8)
    mask = strategy(tokens)
    assert mask.num_keep.tolist() == [4, 4]
    norms = tokens.norm(dim=-1)
    assert all(norm[removed].min() >= norm[~removed].max() for norm, removed in zip(norms, mask.mask, strict=True))


def test_the_example_that_needs_the_grid_works(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "MASKING.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Middle" in block]
    (tmp_path / "example_middle.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    strategy = masking.create("example_middle:Middle", mask_ratio=0.75, randomness=0)
    mask = masking.call(strategy, torch.zeros(2, 64, 8), grid=(8, 8)).mask.view(2, 8, 8)
    assert mask[:, 2:6, 2:6].all()
    assert not mask[:, [0, 0, 7, 7], [0, 7, 0, 7]].any()


def test_every_strategy_has_a_row():
    text = (ROOT / "docs" / "MASKING.md").read_text()
    for name in masking.available():
        assert f"\n| `{name}`" in text, name


def test_every_method_and_each_of_its_options_is_described():
    text = (ROOT / "docs" / "METHODS.md").read_text()
    for name in set(methods.available()) - {"mae"}:
        assert f"\n| `{name}`" in text, name
        section = text.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]
        found = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", section, re.MULTILINE)))
        options = inspect.signature(methods.base._REGISTRY.find(name)).parameters.keys() - {"model", "strategy"}
        assert set(found) == options, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:configs|scripts|util|masking|docs|tests)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, *sorted((ROOT / "configs").glob("*/*.yaml"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_commands_have_flags_and_values_that_exist(path, monkeypatch):
    """Parsed as the mains do, recipe included; of the scripts with a parser the names of the flags."""
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        if words[0].startswith("main_"):
            cli.parse(MAINS[words[0].removeprefix("main_").removesuffix(".py")], words[1:])
        elif words[0].endswith("_8gpu.sh"):  # recipe, checkpoint, data, output, then flags
            flags = itertools.dropwhile(lambda word: not word.startswith("--"), words)
            cli.parse(MAINS[words[0].split("/")[1].split("_")[0]], ["--config", words[1], *flags])
        else:
            parser = runpy.run_path(str(ROOT / words[0]), run_name="docs").get("make_parser")
            known = parser()._option_string_actions if parser else words
            assert {word.split("=")[0] for word in words[1:] if word.startswith("--")} <= set(known), words


def commands(path) -> list[list[str]]:
    """The words of each command of ours, from the name of the script on: of a document, or of a recipe's header."""
    text = path.read_text()
    if path.suffix == ".md":
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        text = "\n".join(
            [*blocks, *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]
        )
    else:
        text = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#   "))
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = re.search(
            r"(?:^|\s)((?:main_(?:pretrain|finetune|linprobe)\.py|scripts/\w+(?:_8gpu\.sh|\.py)) .*)", line
        )
        if match:
            found.append([word for word in shlex.split(match[1], comments=True) if word != "..."])
    return [words for words in found if words[1:]]


def test_the_documents_have_commands():
    assert sum(len(commands(path)) for path in DOCUMENTS) > 60


def test_nothing_is_left_to_fill_in():
    for path in DOCUMENTS:
        assert not re.search(r"DEMO_|TODO|FIXME|XXX", path.read_text()), path.name
