"""Imports point down the layers; no file has the name of a standard module."""

from __future__ import annotations

import ast
import sys

from helpers import ROOT

# Each may import what stands above it, and itself.
LAYERS = [
    {"util"},
    {"util.distributed"},
    {"util.config"},
    {"util.cli"},
    {"util.data"},
    {"util.training"},
    {"masking"},
    {"models_base"},
    {"models_mae"},
    {"models_simmim", "models_bootmae", "models_ibot"},
    {"models_vit"},
    {"methods"},
    {"engine_pretrain"},
    {"engine_finetune"},
    {"evaluation"},
    {"exporting", "studies", "main_pretrain", "main_finetune", "main_linprobe"},
    {"submitit_launch"},
    {"submitit_pretrain", "submitit_finetune", "submitit_linprobe"},
    {"benchmarks"},
    {"scripts"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FOLDERS = ("util", "masking", "methods", "evaluation", "exporting", "studies", "scripts", "benchmarks")


def layer(module: str) -> str | None:
    """The longest known prefix of a dotted module's name."""
    parts = module.split(".")
    return next((name for end in (2, 1) if (name := ".".join(parts[:end])) in LEVEL), None)


def imported(path) -> set[str]:
    """Dotted names that a file imports; `from util import cli` gives util.cli."""
    return imported_by(ast.parse(path.read_text()))


def imported_by(tree: ast.AST) -> set[str]:
    """Dotted names that a part of a file imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources() -> dict:
    """Every Python file that is no test, and its dotted name."""
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}


def test_imports_point_down():
    assert len(sources()) > 70
    for path, module in sources().items():
        own = layer(module)
        assert own is not None, f"{module} has no layer"
        for name in imported(path):
            other = layer(name)
            if other is not None and other != own:
                assert LEVEL[other] < LEVEL[own], f"{module} imports {name}"


def test_every_folder_of_python_files_is_looked_at():
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("[a-z]*/**/*.py")}
    assert folders - {"tests"} == set(FOLDERS)


def test_yaml_is_read_and_written_in_one_place():
    """Its loader refuses aliases, depth and keys that stand twice; another would not."""
    assert [module for path, module in sources().items() if "yaml" in imported(path)] == ["util.yaml_files"]


def test_a_script_finds_the_project_from_any_folder():
    """Python puts a script's own folder on the path: what the project has is imported after its root is put there."""
    for path in (ROOT / "scripts").glob("*.py"):
        lines = path.read_text().splitlines()
        own = [n for n, line in enumerate(lines) if line.startswith(("from ", "import ")) and layer(line.split()[1])]
        inserted = [n for n, line in enumerate(lines) if line.startswith("sys.path.insert(")]
        assert not own or inserted, path
        assert not own or min(inserted) < min(own), path


def test_no_file_shadows_the_standard_library():
    for path, module in sources().items():
        top_level = "." not in module or module.startswith("scripts.")  # other files are found through their folder
        assert not top_level or path.stem == "__init__" or path.stem not in sys.stdlib_module_names, path


def test_a_script_imports_the_project_only_once_its_folder_can_be_found():
    for path in (ROOT / "scripts").glob("*.py"):
        nodes = ast.parse(path.read_text()).body
        found = [node for node in nodes if "sys.path.insert" in ast.unparse(node)]
        for node in nodes[: nodes.index(found[0])] if found else nodes:
            assert not any(map(layer, imported_by(node))), f"{path.name}: {ast.unparse(node)}"
