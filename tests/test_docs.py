"""What the documents say can be done as they say it."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from helpers import ROOT

import masking
import methods

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


def test_nothing_is_left_to_fill_in():
    for path in DOCUMENTS:
        assert not re.search(r"DEMO_|TODO|FIXME|XXX", path.read_text()), path.name
