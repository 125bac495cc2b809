"""Imports point down the layers; no file has the name of a standard module."""

from __future__ import annotations

import ast
import sys

from helpers import ROOT

LAYERS = [
    {"util"},
    {"masking"},
    {"models_mae", "models_vit"},
    {"engine_pretrain", "engine_finetune"},
    {"supervised", "views"},
    {"monitor"},
    {"main_pretrain", "main_finetune", "main_linprobe", "submitit_launch"},
    {"inspection"},
    {"exporting"},
]


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def sources() -> dict:
    found = {path: path.stem for path in ROOT.glob("*.py")}
    return found | {path: package for package in ("util", "masking") for path in (ROOT / package).glob("*.py")}


def test_imports_point_down():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert len(sources()) > 25
    for path, module in sources().items():
        assert module in level, f"{path.name} has no layer"
        for name in imported(path) & set(level):
            below = level[name] < level[module]
            assert below or name == module in ("util", "masking"), f"{path.name} imports {name}"


def test_no_file_shadows_the_standard_library():
    for path in sources():
        assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names, path
