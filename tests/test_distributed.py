"""Two gloo processes under the real torchrun equal one process on the same global batch with the same noise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import MODEL_STRATEGIES, ROOT, environment, log_lines, run_main

WORKER = ROOT / "tests" / "step_worker.py"


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict:
    """One optimizer step in every (method, strategy, processes, micro-batches)."""
    found = {}
    for processes, accum_iters in ((1, "1,3"), (2, "1,2")):
        output = tmp_path_factory.mktemp("steps") / f"{processes}.pth"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*(launcher if processes > 1 else [sys.executable]), WORKER, accum_iters, output]
        result = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=environment(), timeout=300
        )
        assert result.returncode == 0, result.stderr
        for (method, strategy, accum_iter), values in torch.load(output, weights_only=True).items():
            found[method, strategy, processes, accum_iter] = values
    return found


@pytest.mark.parametrize("layout", [(1, 3), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("strategy", MODEL_STRATEGIES)
@pytest.mark.parametrize("method", ["mae", "two terms", "partly decoded", "hpm", "simmim", "bootmae", "ibot"])
def test_loss_and_gradients_do_not_depend_on_the_layout(steps, method, strategy, layout):
    """The second method has a term with a denominator of its own, images in place of removed tokens."""
    expected, found = steps[(method, strategy, 1, 1)], steps[(method, strategy, *layout)]
    assert found["kept"] == expected["kept"]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["norm"], expected["norm"], rtol=1e-5, atol=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    assert max(gradient.abs().max() for gradient in expected["gradients"].values()) > 1e-3
    for name, gradient in expected["gradients"].items():
        bound = 1e-6 * max(1.0, gradient.abs().max().item())  # iBOT's new heads have gradients of a thousand
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=bound, msg=name)
    if strategy == "sbam_amr":
        assert len(set(expected["kept"])) > 2


@pytest.mark.parametrize("strategy", MODEL_STRATEGIES)
def test_batch_normalisation_and_negatives_are_those_of_all_processes(steps, strategy):
    expected, found = steps["cmae", strategy, 1, 1], steps["cmae", strategy, 2, 1]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["mae", "two terms", "partly decoded"])
def test_one_step_is_eq_2_over_the_global_batch(steps, method):
    """Sum over the removed tokens / their number: not a mean of the micro-batches' or processes' means."""
    values = steps[method, "sbam_amr", 2, 2]
    torch.testing.assert_close(values["loss"], values["whole_batch_loss"], rtol=1e-5, atol=1e-6)


DIGITS = ["--config", "configs/finetune/digits.yaml", "--epochs", 1, "--warmup_epochs", 0, "--drop_path", 0]


def test_finetuning_on_two_processes_equals_one(tmp_path):
    """Same data order, same augmentation, same weights: the split into processes and micro-batches is invisible."""
    layouts = {"one": (1, []), "two": (2, []), "micro": (1, ["--batch_size", 16])}
    lines = {}
    for name, (processes, more) in layouts.items():
        flags = ["--effective_batch_size", 64, "--batch_size", 32, *more, "--num_workers", 1]
        result = run_main("main_finetune.py", *DIGITS, *flags, "--output_dir", tmp_path / name, processes=processes)
        assert result.returncode == 0, result.stderr
        lines[name] = log_lines(tmp_path / name)[0]
    for name in ("two", "micro"):
        assert lines[name]["test_images"] == 359
        for key in ("train_loss", "test_loss", "train_lr"):
            assert lines[name][key] == pytest.approx(lines["one"][key], rel=1e-4), key
        assert abs(lines[name]["test_acc1"] - lines["one"]["test_acc1"]) < 0.6


def test_pretraining_on_two_processes_continues_on_one(tmp_path):
    flags = ["--config", "configs/pretrain/digits.yaml", "--effective_batch_size", 48, "--output_dir", tmp_path]
    first = run_main("main_pretrain.py", *flags, "--batch_size", 24, "--epochs", 1, "--num_workers", 0, processes=2)
    assert first.returncode == 0, first.stderr
    second = run_main("main_pretrain.py", *flags, "--batch_size", 16, "--epochs", 2, "--num_workers", 0)
    assert second.returncode == 0, second.stderr
    assert "checkpoint-last.pth after epoch 0" in second.stdout
    lines = log_lines(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert all(line["train_kept_tokens_min"] < line["train_kept_tokens_max"] for line in lines)
    assert len(list(tmp_path.glob("events*"))) == 2  # one for each run, not for each process


def test_the_probe_counts_every_validation_image_once_on_two_processes(tmp_path):
    flags = ["--config", "configs/linprobe/digits.yaml", "--epochs", 1, "--warmup_epochs", 0, "--num_workers", 0]
    for evaluation in ("--dist_eval", "--no_dist_eval"):
        output = tmp_path / evaluation
        result = run_main("main_linprobe.py", *flags, evaluation, "--output_dir", output, processes=2)
        assert result.returncode == 0, result.stderr
        assert log_lines(output)[0]["test_images"] == 359


def test_an_error_under_torchrun_is_one_line(tmp_path):
    flags = ["--dataset", "digits", "--mask_ratio", 2, "--output_dir", tmp_path]
    result = run_main("main_pretrain.py", *flags, processes=2)
    assert result.returncode != 0
    assert result.stderr.count("--mask_ratio 2.0: must be between 0 and 1") == 1
