"""Two gloo processes under the real torchrun equal one process on the same global batch with the same noise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import step_worker
import torch
from helpers import MODEL_STRATEGIES, ROOT, environment, log_lines, run_main

import main_finetune

WORKER = ROOT / "tests" / "step_worker.py"


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict:
    """One optimizer step in every (method, strategy, processes, micro-batches)."""
    outputs = {processes: tmp_path_factory.mktemp("steps") / f"{processes}.pth" for processes in (1, 2)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of the two
    step_worker.main("1,3", str(outputs[1]))
    torch.set_num_threads(threads)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [str(part) for part in [*launcher, WORKER, "1,2", outputs[2]]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == 0, result.stderr
    return {
        (method, strategy, processes, accum_iter): values
        for processes, output in outputs.items()
        for (method, strategy, accum_iter), values in torch.load(output, weights_only=True).items()
    }


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


def test_compiled_blocks_stay_whole_under_ddp_and_compute_the_same(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, ROOT / "tests" / "compile_worker.py", tmp_path / "results.pth"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "results.pth", weights_only=True)
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-5)
    blocks = [(graph.count("qkv_parameters_weight"), graph.count("fc2_parameters_weight")) for graph in found["graphs"]]
    assert {block for block in blocks if any(block)} == {(1, 1)}


def test_finetuning_on_two_processes_equals_one(pictures, tmp_path):
    """Same data order, same augmentation, same weights: the split into processes and micro-batches is invisible.

    The launcher of older torch passes --local-rank on, besides the environment.
    """
    flags = ["--data_path", pictures, "--model", "vit_mini_patch4", "--epochs", 1, "--warmup_epochs", 0, "--lr", 1e-3]
    flags += ["--drop_path", 0, "--aa", "null", "--reprob", 0, "--num_workers", 1, "--effective_batch_size", 8]
    flags += ["--device", "cpu", "--output_dir"]
    for name, size in (("one", 8), ("micro", 2)):
        main_finetune.main([str(value) for value in [*flags, tmp_path / name, "--batch_size", size]])
    launcher = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port=29517"]
    more = [tmp_path / "two", "--batch_size", 4, "--no_dist_eval"]  # the first process counts all validation images
    command = [str(part) for part in [*launcher, ROOT / "main_finetune.py", *flags, *more]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "processes: 2" in (tmp_path / "two" / "config.yaml").read_text()
    lines = {name: log_lines(tmp_path / name)[0] for name in ("one", "two", "micro")}
    for name in ("two", "micro"):
        assert lines[name]["test_images"] == 26
        for key in ("train_loss", "test_loss", "train_lr"):
            assert lines[name][key] == pytest.approx(lines["one"][key], rel=1e-4), key
        assert abs(lines[name]["test_acc1"] - lines["one"]["test_acc1"]) < 4  # one image


def test_an_error_under_torchrun_is_one_line(tmp_path):
    """By what every main does first: one process speaks before the launcher ends all."""
    script = tmp_path / "parse.py"
    script.write_text("from util import cli\nfrom util.config import PretrainSettings\ncli.parse(PretrainSettings)\n")
    result = run_main(str(script), "--mask_ratio", 2, processes=2)
    assert result.returncode != 0
    assert result.stderr.count("--mask_ratio 2.0: must be between 0 and 1") == 1
