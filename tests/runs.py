"""Short pre-trainings, here and under torchrun, whole or stopped, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, environment, log_lines

import main_pretrain
from util.distributed import signals
from util.training import checkpoint

MODEL = ["--model", "mae_vit_mini_patch4", "--norm_pix_loss", "--warmup_epochs", 0, "--lr", 1e-3, "--print_freq", 1]


def flags(pictures, output, *more) -> list[str]:
    """Two epochs of six steps of four pictures and one of two."""
    given = [*MODEL, "--data_path", pictures, "--output_dir", output, "--batch_size", 4, "--epochs", 2]
    return [str(value) for value in [*given, "--num_workers", 0, *more]]


def pretrain(pictures, output, *more) -> list[dict]:
    main_pretrain.main(flags(pictures, output, *more))
    return log_lines(output)


def stopped(pictures, output, *more) -> None:
    with pytest.raises(SystemExit) as stop:
        pretrain(pictures, output, *more)
    code = stop.value.code
    del stop  # its frames hold the loader, whose workers end 30 seconds later where only a collection frees it
    assert code == signals.PREEMPTED


def torchrun(pictures, output, faults, *more, processes=2, launcher=()) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *launcher,
    ]
    command += [ROOT / "tests" / "faults.py", *flags(pictures, output, *more)]
    variables = environment(FAULTS=json.dumps(faults))
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, env=variables)


def content(output) -> dict:
    return checkpoint.load(output / checkpoint.LAST)


def assert_same_run(one, other, ignore: str = "\n") -> None:
    """Weights and optimizer, bit for bit; the epochs' lines, up to the order in which means are summed.

    Values whose names begin with `ignore` are left out.
    """
    first, second = content(one), content(other)
    assert first["step"] == second["step"]
    torch.testing.assert_close(second["model"], first["model"], rtol=0, atol=0)
    torch.testing.assert_close(second["optimizer"]["state"], first["optimizer"]["state"], rtol=0, atol=0)
    left_out = {"train_data_wait"}  # the only thing that a clock decides
    for a, b in zip(log_lines(one), log_lines(other), strict=True):
        first, second = (
            {k: v for k, v in line.items() if k not in left_out and not k.startswith(ignore)} for line in (a, b)
        )
        assert first == pytest.approx(second, rel=1e-12, abs=1e-12)
