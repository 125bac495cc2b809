"""torch.export's graphs and ONNX files compute what the models compute, for any number of images."""

from __future__ import annotations

import importlib.util
import json
import runpy

import onnx
import onnxruntime
import pytest
import torch
from helpers import ROOT, refusal

import models_mae
import models_vit
from exporting import formats, graph
from methods import base
from models_base import keep_blocks
from util.config import PretrainSettings
from util.training import checkpoint

ENCODERS = [name for name in models_mae.available_models() if "_mini_" in name]
CLASSIFIERS = [name for name in models_vit.available_models() if "_mini_" in name]


def save(folder, model, args, **more):
    """Write a checkpoint with random weights everywhere; return its path and its model."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    content = {"model": model.state_dict(), "args": args, "grid": list(model.patch_embed.grid_size)}
    checkpoint.save(folder / "ours.pth", content | more)
    return folder / "ours.pth", model.eval()


def encoder(folder, name, blocks=None, **changes):
    settings = PretrainSettings(model=name, **changes)
    model = base.build_model(settings)
    keep_blocks(model, blocks)
    return save(folder, model, settings.as_dict() | ({"probe_blocks": blocks} if blocks else {}))


def classifier(folder, name, pools, blocks=None):
    model = models_vit.create_model(name, num_classes=5, global_pool=pools)
    if blocks:
        models_vit.add_probe_head(model, blocks)
        model.head[0].running_mean += torch.randn(96)
        model.head[0].running_var += torch.rand(96)
    args = {"model": name, "input_size": [16]} | ({"probe_blocks": blocks} if blocks else {})
    return save(folder, model, args, classes=list("abcde"))


def expected(model, images):
    with torch.no_grad():
        return graph.Features(model)(images) if hasattr(model, "encode") else model(images)


def assert_computes_the_same(run, model, size=(16, 16)):
    for number in (1, 5):
        images = torch.randn(number, 3, *size)
        torch.testing.assert_close(run(images), expected(model, images), rtol=1e-4, atol=1e-4)


def onnx_session(path, output):
    session = onnxruntime.InferenceSession(path)
    assert [(i.name, i.shape[0]) for i in session.get_inputs()] == [("images", "batch")]
    assert [(o.name, o.shape[0]) for o in session.get_outputs()] == [(output, "batch")]
    return session


def run_with(session):
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture
def command():
    return runpy.run_path(str(ROOT / "scripts/export.py"), run_name="export")["main"]


@pytest.mark.parametrize("name", ENCODERS)
def test_the_graph_of_every_encoder_takes_any_batch(tmp_path, name):
    path, model = encoder(tmp_path, name)
    assert_computes_the_same(graph.trace(formats.read(path)).module(), model)


@pytest.mark.parametrize(("pools", "blocks"), [(True, None), (False, None), (False, 1)], ids=["mean", "cls", "probe"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_graph_of_every_classifier_takes_any_batch(tmp_path, name, pools, blocks):
    path, model = classifier(tmp_path, name, pools, blocks)
    assert_computes_the_same(graph.trace(formats.read(path)).module(), model)


@pytest.mark.parametrize("name", ["mae_vit_mini_patch4", "ibot_vit_mini_patch4"])
def test_the_class_tokens_attention_takes_any_batch(name):
    model = base.build_model(PretrainSettings(model=name)).eval().requires_grad_(False)

    class Attention(torch.nn.Module):
        def forward(self, images):
            return model.class_attention(images)

    attention = Attention()
    attention.model = model
    free = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(attention, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=free)
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(images), model.class_attention(images))


def test_a_saved_graph_needs_nothing_of_this_project(tmp_path):
    path, model = encoder(tmp_path, "mae_vit_mini_patch4", 1)
    torch.export.save(graph.trace(formats.read(path)), tmp_path / "encoder.pt2")
    assert_computes_the_same(torch.export.load(tmp_path / "encoder.pt2").module(), model)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_onnx_file_of_every_encoder(tmp_path, name, command):
    path, model = encoder(tmp_path, name, blocks=1)
    command([str(path), "--to", "onnx", "--output", str(tmp_path / "o" / "encoder.onnx")])
    assert [file.name for file in (tmp_path / "o").iterdir()] == ["encoder.onnx"]
    onnx.checker.check_model(tmp_path / "o" / "encoder.onnx", full_check=True)
    assert_computes_the_same(run_with(onnx_session(tmp_path / "o" / "encoder.onnx", "tokens")), model)


def test_an_onnx_file_tells_how_images_are_prepared(tmp_path):
    path, model = encoder(tmp_path, "mae_vit_mini_patch4", 1, input_size=[8, 32], std=[0.5, 0.6, 0.7])
    formats.write(formats.read(path), "onnx", tmp_path / "wide.onnx")
    session = onnx_session(tmp_path / "wide.onnx", "tokens")
    assert_computes_the_same(run_with(session), model, (8, 32))
    told = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert (told["mean"], told["std"], told["grid"]) == ([0.485, 0.456, 0.406], [0.5, 0.6, 0.7], [2, 8])
    assert (told["args"]["model"], told["args"]["input_size"]) == ("mae_vit_mini_patch4", [8, 32])


def test_an_onnx_file_of_a_probe_has_one_linear_layer(tmp_path):
    path, model = classifier(tmp_path, "simmim_vit_mini_patch4", True, blocks=1)
    formats.write(formats.read(path), "onnx", tmp_path / "probe.onnx")
    session = onnx_session(tmp_path / "probe.onnx", "logits")
    assert_computes_the_same(run_with(session), model)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list("abcde")


def test_an_encoder_that_pools_gives_its_features(tmp_path):
    model = models_vit.create_model("vit_mini_patch4", num_classes=0, global_pool=True)
    path, model = save(tmp_path, model, {"model": "vit_mini_patch4", "input_size": [16]})
    assert_computes_the_same(graph.trace(formats.read(path)).module(), model)


def test_a_mistake_is_one_line(tmp_path, command, capsys, monkeypatch):
    path, _ = encoder(tmp_path, "mae_vit_mini_patch4", 1)
    to_onnx = [path, "--to", "onnx", "--output"]
    assert "x.pth: the name must end in .onnx" in refusal(command, [*to_onnx, tmp_path / "x.pth"], capsys)
    assert "cannot be written" in refusal(command, [*to_onnx, "/proc/x.onnx"], capsys)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    missing = refusal(command, ["none.pth", "--to", "onnx", "--output", tmp_path / "x.onnx"], capsys)
    assert "--to onnx: needs another package: pip install onnxscript" in missing
