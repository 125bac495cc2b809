"""What a run was made with: the resolved configuration, git revision and versions."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from util import yaml_files
from util.files import write_whole

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def describe(settings: dict, resolved: dict) -> dict:
    """Return `settings` as given, `resolved` values that follow from them, revision and versions."""
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"settings": settings, "resolved": resolved, "revision": revision(), "versions": versions, "gpu": gpu}


def write_config(path: Path, description: dict) -> None:
    """Write the settings as YAML that `--config` takes again, under a comment that holds the rest of `description`.

    Whole or not at all.
    """
    rest = {name: value for name, value in description.items() if name != "settings"}
    comment = "".join(f"# {line}\n" for line in yaml_files.dump(rest).splitlines())
    write_whole(path, comment + yaml_files.dump(description["settings"]))


def revision() -> str:
    """Return the git revision of this code, with `-dirty` if files were changed; `unknown` outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
