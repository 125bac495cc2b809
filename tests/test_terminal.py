"""What a run prints cannot end it: a full disk, a closed pipe, closed streams, an encoding without the letters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, environment
from runs import MODEL, content

# Each stream refuses in each way: closed, full, a pipe that nobody reads. They are protected one by one.
PLACES = ["<&- >&- 2>/dev/full", "2>&1 | true", ">/dev/full 2>&-"]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Files, one of which is bad and has an odd name, and a loader that prints and warns; flags to train on them."""
    folder = tmp_path_factory.mktemp("noisy")
    (folder / "data").mkdir()
    for index in range(7):
        np.save(folder / "data" / f"{index}.npy", np.full((20, 24, 3), 9 * index, dtype=np.uint8))
    (folder / "data" / "\N{SNOWMAN}\udcff.npy").write_text("bad")
    (folder / "noisy_loader.py").write_text(
        "import sys, warnings, numpy\n"
        "def load(path):\n"
        "    print('\N{SNOWMAN}' * 5000, flush=True)\n"
        "    warnings.warn(f'{path}')\n"
        "    print(path, file=sys.stderr, flush=True)\n"
        "    return numpy.load(path)\n"
        "load.extensions = ('.npy',)\n"
    )
    flags = [*MODEL, "--data_path", folder / "data", "--loader", "noisy_loader:load", "--max_bad_images", 0.5]
    return folder, [str(value) for value in [*flags, "--batch_size", 2, "--epochs", 1]]


def train(noisy, output, place: str, workers: int = 0, **variables) -> subprocess.CompletedProcess:
    folder, flags = noisy
    shell = ["bash", "-o", "pipefail", "-c", f'"$@" {place}', "bash", sys.executable, str(ROOT / "main_pretrain.py")]
    command = [*shell, *flags, "--num_workers", str(workers), "--output_dir", str(output)]
    variables = environment(**variables)
    variables["PYTHONPATH"] += f":{folder}"
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)


@pytest.mark.parametrize("place", PLACES)
def test_nothing_that_is_printed_ends_a_run(noisy, tmp_path, place):
    """The training process prints its log, its worker, which has the same streams, what the loader prints."""
    assert train(noisy, tmp_path, place, workers=1).returncode == 0
    assert content(tmp_path)["step"] == 4


def test_a_reader_that_goes_away_ends_no_sweep(tmp_path):
    sweep = ["scripts/sweep.py", "configs/sweeps/digits_methods.yaml", "--output", str(tmp_path), "--gather"]
    shell = ["bash", "-o", "pipefail", "-c", '"$@" | true', "bash", sys.executable, *sweep]
    result = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment())
    assert (result.returncode, result.stderr) == (0, "")


def test_letters_that_the_encoding_lacks_are_escaped(noisy, tmp_path):
    result = train(noisy, tmp_path, "", workers=1, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "\\u2603\\u2603" in result.stdout
    assert "bad picture: " in result.stderr
    assert content(tmp_path)["step"] == 4


def test_a_mistake_has_status_2_even_if_nobody_can_read_it(noisy, tmp_path):
    result = train(noisy, tmp_path / "o", "--epochs -1 >/dev/full 2>/dev/full")
    assert result.returncode == 2
    assert not (tmp_path / "o").exists()
