"""Tables of measurements: Markdown for people, JSON for programs, both with the hardware and the versions."""

from __future__ import annotations

import datetime
import json
import platform
from importlib import metadata
from pathlib import Path

import torch

from util.distributed import world


def table(rows: list[dict[str, object]]) -> str:
    """Format rows with the same keys as a Markdown table; a missing key is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def environment(packages: tuple[str, ...] = ("torch", "torchvision", "timm", "transformers")) -> dict[str, str]:
    """Return date, processor, GPU and versions, for the head of a table."""
    found = {"date": datetime.date.today().isoformat(), "cpu": f"{world.usable_cores()} x {_processor()}"}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    found["threads"] = str(torch.get_num_threads())
    found["python"] = platform.python_version()
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: Path | str, content: dict) -> None:
    """Write `content`, readable."""
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
