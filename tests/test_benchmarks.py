"""What the benchmark counts and compares is what it says."""

from __future__ import annotations

import argparse
import json
import runpy
import sys

import pytest
import torch
from helpers import ROOT, tiny_mae, varied_images
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import masking
from benchmarks import methods, report, saving, timing, training, views
from benchmarks.contenders import PaddedMAE, SpreadCounts
from benchmarks.measure import peak_memory, training_flops
from benchmarks.pictures import write_jpegs
from methods import At
from util.data import decode
from util.data.multi_crop import MultiCrop
from util.training import checkpoint


def test_flops_are_those_that_torch_counts():
    """All patches embedded once, encoder over 16 of 64, decoder over 65; backward is twice forward."""
    model, images = tiny_mae(), varied_images(3)
    mask = model.choose_mask(images)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.forward_decoder(model.encode(model.embed(images), mask), mask)
    assert training_flops(model, [16, 16, 16]) == 3 * counter.get_total_flops()
    part = masking.predict_part(mask, 0.5)  # the class token's prediction is counted, though it is not computed
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.forward_decoder(model.encode(model.embed(images), part), part)
    assert training_flops(model, [16, 16, 16], [40, 40, 40]) == 3 * counter.get_total_flops()


@pytest.mark.parametrize("num_images", [1, 2, 5, 8])
def test_spread_counts_keep_as_many_tokens_as_a_fixed_ratio(num_images):
    mask = SpreadCounts()(torch.randn(num_images, 196, 8))
    assert mask.num_keep.sum() == 49 * num_images
    assert len(set(mask.num_keep.tolist())) == max(1, num_images - (num_images == 1))


def test_the_padded_encoder_computes_the_same():
    model, images, noise = tiny_mae(masking=masking.create("sbam_amr")), varied_images(6), torch.rand(6, 64)
    packed = model(images, noise)[0]
    model.__class__ = PaddedMAE
    torch.testing.assert_close(model(images, noise)[0], packed, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    counter = CompileCounter()
    model.compile_blocks(backend=counter)
    torch.testing.assert_close(model(images, noise)[0], packed, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 3  # the encoder's block, the decoder's, the loss


def test_contenders_take_turns_and_ratios_are_paired():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleave(contenders, rounds=3, warmup=0)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert all(len(values) == 3 for values in seconds.values())
    spread = timing.ratio({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]}, "a", "b")
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)


def test_peak_memory_counts_what_a_step_allocates():
    megabyte = 2**20
    kept = [torch.zeros(8 * megabyte // 4)]
    peak = peak_memory(lambda: torch.ones(64 * megabyte // 4).sum(), kept)
    assert 60 * megabyte <= peak - 8 * megabyte < 96 * megabyte  # pages are counted by the kernel


@pytest.mark.parametrize("free", [20e9, 47e9, 140e9])
def test_every_contender_fits_beside_the_others(free):
    """Of ViT-B as measured, in bytes: a model, and 256 images in a step of ours and of a plain MAE."""
    model, ours, plain = 1.8e9, 11.5e9, 20.9e9
    batch = training.largest_batch(free, ours / 256, model, limit=512)
    assert 4 * model + batch * plain / 256 < free
    assert batch == {20e9: 64, 47e9: 256, 140e9: 512}[free]


def test_the_cost_of_saving_is_that_of_a_whole_checkpoint(tmp_path):
    arguments = argparse.Namespace(batch_size=1, steps=1, rounds=1)
    row = saving.measure("small", arguments, torch.device("cpu"), tmp_path)
    content = checkpoint.load(tmp_path / checkpoint.LAST)
    parameters = sum(value.numel() for value in content["model"].values())
    assert float(row["checkpoint, GB"]) == pytest.approx(3 * 4 * parameters / 1e9, abs=0.01)  # with Adam's two moments


def test_every_method_is_timed(tmp_path):
    methods.main(["--model", "mini", "--batch_size", "2", "--rounds", "1", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    found = {row["step"].split(",")[0]: float(row["GFLOP/image"]) for row in rows if row["step"].endswith("random")}
    assert found.keys() == methods.MODELS.keys()
    plain = next(float(row["GFLOP/image"]) for row in rows if row["step"] == methods.PLAIN)
    assert found["ibot"] < plain
    assert found["mae"] < min(found["hpm"], found["cmae"], found["bootmae"])  # they have a teacher, or more decoders


def test_the_plain_ibot_has_the_same_losses_and_gradients():
    torch.manual_seed(1)
    images, noise, found = torch.randn(3, 3, 16, 16), torch.rand(6, 16), []
    for name in ("ibot", methods.PLAIN):
        step = methods.MethodStep(name, "mini", images, "none")
        method, at = step.method, At(0, 2.0, 10)
        views = [view + 0.1 * number for number, view in enumerate(step.inputs.views)]
        inputs = step.inputs._replace(noise=noise, views=views)
        torch.nn.init.normal_(method.center_patch)
        plan = method.choose(inputs, at)
        method.student.set_drop_path(0.0)
        losses = method(inputs, plan, at)
        sum(loss.sum / loss.count for loss in losses.values()).backward()
        method.after_step(at, torch.tensor(True))
        gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        found.append((losses, gradients, method.center_cls, method.center_patch))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_compiled_step_is_the_eager_one():
    """Also the operations, which compiled code hides from whom counts them."""
    images, losses, rows = torch.randn(2, 3, 16, 16), [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = methods.MethodStep("mae", "mini", images, "none", compiled)
        call = step.with_strategy(masking.create("sbam"))
        torch.manual_seed(1)
        call()
        losses.append(step.averages.read()["loss"])
        rows.append(methods.row("mae, random", call, {"mae, random": [1.0]}, step, 1e9))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert rows[1]["GFLOP/image"] == rows[0]["GFLOP/image"] != "0"


def test_tables_are_markdown():
    rows = [{"step": "random", "ms": "1.5"}, {"step": "sbam"}]
    lines = report.table(rows).splitlines()
    assert lines == ["| step   | ms  |", "| ------ | --- |", "| random | 1.5 |", "| sbam   |     |"]


def test_an_unknown_benchmark_is_one_sentence(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "speed"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "say train, methods, masks, growth, save, data or views" in capsys.readouterr().err


def test_every_way_to_the_views_is_timed(tmp_path):
    views.main(["--pictures", "1", "--rounds", "1", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(float(row["images/s/core"]) > 0 for row in rows)


def test_the_authors_views_are_as_many_and_as_large_as_ours(tmp_path):
    content = write_jpegs(tmp_path, 1)[0].read_bytes()
    crop = MultiCrop(views.SIZE, views.SCALE, 0.5, views.LOCAL_SIZE, views.LOCAL_SCALE, views.LOCAL_NUMBER)
    large, small = crop(decode.to_pixels(content, 3))
    theirs = views.PILViews()(content)
    assert [view.shape for view in theirs] == [view.shape for view in (*large, *small)]
