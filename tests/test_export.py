"""Checkpoints in other libraries compute the same, and come back bit for bit."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import timm
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

import exporting
import inspection
import main_pretrain
import models_vit
from util import checkpoint
from util.config import PretrainSettings

MINI = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}


@pytest.fixture(params=[False, True], ids=["raw", "norm_pix"])
def saved(request, tmp_path):
    """A pre-training checkpoint with random weights everywhere: (path, model)."""
    settings = PretrainSettings(model="mae_vit_mini_patch4", norm_pix_loss=request.param, in_chans=3, mask_ratio=0.625)
    return save(tmp_path / "ours.pth", main_pretrain.build_model(settings), settings.as_dict(), [4, 4])


def save(path, model, args, grid, **more):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    checkpoint.save(path, {"model": model.state_dict(), "args": args, "grid": grid} | more)
    return path, model.eval()


def classifier(tmp_path, probe=False, **options):
    model = models_vit.create_model("vit_mini_patch4", num_classes=5, **options)
    if probe:
        models_vit.add_probe_head(model)
        model.head[0].running_mean += torch.randn(96)
        model.head[0].running_var += torch.rand(96)
    args = {"model": "vit_mini_patch4", "input_size": [16]}
    return save(tmp_path / "classifier.pth", model, args, [4, 4], classes=list("abcde"))


def convert(path, target, output):
    exporting.write(exporting.read(path), target, output)
    return output


def back(path, source, output):
    exporting.write(exporting.read(path, source), None, output)
    return checkpoint.load(output)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_an_autoencoder_in_hugging_face_and_back(saved, tmp_path):
    path, model = saved
    folder = convert(path, "hf", tmp_path / "hf")
    other, report = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert (other.config.norm_pix_loss, other.config.mask_ratio) == (model.norm_pix_loss, 0.625)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    model.set_masking(main_pretrain.create_strategy(PretrainSettings(mask_ratio=0.625)))
    with torch.no_grad():
        loss, pred, mask = model(images, noise)
        found = other.eval()(images, noise=noise)
        encoder = ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval()
        order = torch.arange(16).expand(3, 16) / 16
        whole = encoder(images, noise=order).last_hidden_state
        torch.testing.assert_close(whole, model.encode(model.embed(images), None), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, pred, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.mask.bool(), mask)
    content = back(folder, "hf", tmp_path / "back.pth")
    assert_same(content["model"], model.state_dict())
    assert (content["args"]["model"], content["args"]["norm_pix_loss"]) == ("mae_vit_mini_patch4", model.norm_pix_loss)
    other.save_pretrained(tmp_path / "again")  # under the names that this version of transformers writes
    assert_same(back(tmp_path / "again", "hf", tmp_path / "again.pth")["model"], model.state_dict())
    processor = ViTImageProcessor.from_pretrained(folder)
    assert processor.size["height"] == 16
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_encoder_in_timm_and_back(saved, tmp_path, suffix):
    path, model = saved
    file = convert(path, "timm", tmp_path / f"timm{suffix}")
    other = timm.create_model("vit_base_patch16_224", num_classes=0, checkpoint_path=str(file), **MINI).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours = model.encode(model.embed(images), None)
        torch.testing.assert_close(other.forward_features(images), ours, rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    encoder = {name: state[name] for name in state if not name.startswith(("decoder", "mask_token"))}
    assert_same(back(file, "timm", tmp_path / "back.pth")["model"], encoder)
    opened = inspection.open_checkpoint(tmp_path / "back.pth")
    assert not opened.has_decoder


def test_safetensors_and_mae_files_hold_everything(saved, tmp_path):
    path, model = saved
    file = convert(path, "safetensors", tmp_path / "all.safetensors")
    content = back(file, "safetensors", tmp_path / "back.pth")
    assert_same(content["model"], model.state_dict())
    assert content["args"]["mask_ratio"] == 0.625
    file = convert(path, "mae", tmp_path / "mae.pth")
    assert_same(torch.load(file, weights_only=True)["model"], model.state_dict())
    assert_same(back(file, "mae", tmp_path / "back.pth")["model"], model.state_dict())
    main_pretrain.main(
        f"--dataset digits --model mae_vit_mini_patch4 --epochs 0 --num_workers 0 --finetune {tmp_path / 'back.pth'} "
        f"--output_dir {tmp_path / 'run'}".split()
    )
    assert_same(checkpoint.load(tmp_path / "run" / "checkpoint-last.pth")["model"], model.state_dict())


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_classifier_in_timm(tmp_path, pool):
    path, model = classifier(tmp_path, global_pool=pool == "avg")
    file = convert(path, "timm", tmp_path / "timm.safetensors")
    other = timm.create_model(
        "vit_base_patch16_224", num_classes=5, global_pool=pool, checkpoint_path=str(file), **MINI
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=1e-5, atol=1e-5)
    assert_same(back(file, "timm", tmp_path / "back.pth")["model"], model.state_dict())


@pytest.mark.parametrize("probe", [False, True], ids=["finetuned", "probed"])
def test_a_class_token_classifier_in_hugging_face(tmp_path, probe):
    path, model = classifier(tmp_path, probe, global_pool=False)
    folder = convert(path, "hf", tmp_path / "hf")
    other, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert other.config.id2label == dict(enumerate("abcde"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images).logits, model(images), rtol=1e-5, atol=1e-5)
    if not probe:
        content = back(folder, "hf", tmp_path / "back.pth")
        assert_same(content["model"], model.state_dict())
        assert content["classes"] == list("abcde")


def test_hugging_faces_own_weights_come_here(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 384, "layer_norm_eps": 1e-6}
    decoder = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 256}
    other = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, decoder_num_attention_heads=2, norm_pix_loss=True))
    other.eval().save_pretrained(tmp_path / "hf")
    back(tmp_path / "hf", "hf", tmp_path / "ours.pth")
    opened = inspection.open_checkpoint(tmp_path / "ours.pth")
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        loss, pred, _ = opened.model(images, noise)
        found = other(images, noise=noise)
    torch.testing.assert_close(loss, found.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pred, found.logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match="4 heads, but mae_vit_mini_patch4 has 3"):
        exporting.read(tmp_path / "hf", "hf")
    ViTForImageClassification(ViTConfig(**sizes, qkv_bias=False)).save_pretrained(tmp_path / "nobias")
    with pytest.raises(ValueError, match=r"attn.qkv.bias is missing"):
        exporting.read(tmp_path / "nobias", "hf")


def test_what_the_other_library_has_not_is_said(tmp_path):
    path, _ = classifier(tmp_path, global_pool=True)
    with pytest.raises(ValueError, match="classifies the class token"):
        convert(path, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    settings = PretrainSettings(model="mae_vit_mini_patch4", input_size=[16, 24])
    path, _ = save(tmp_path / "wide.pth", main_pretrain.build_model(settings), settings.as_dict(), [4, 6])
    with pytest.raises(ValueError, match="16 x 24"):
        convert(path, "hf", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert(path, "safetensors", tmp_path / "x.bin")
    other = timm.create_model("vit_base_patch16_224", num_classes=0, class_token=False, global_pool="avg", **MINI)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not the architecture mae_vit_mini_patch4|square"):
        exporting.read(tmp_path / "other.safetensors", "timm")


def test_the_command(saved, tmp_path):
    import runpy

    from helpers import ROOT

    main = runpy.run_path(str(ROOT / "scripts/export.py"), run_name="export")["main"]
    main([str(saved[0]), "--to", "hf", "--output", str(tmp_path / "hf")])
    main([str(tmp_path / "hf"), "--from", "hf", "--output", str(tmp_path / "back.pth")])
    assert_same(checkpoint.load(tmp_path / "back.pth")["model"], saved[1].state_dict())
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "none.pth"), "--to", "timm", "--output", str(tmp_path / "x.pth")])
    assert stop.value.code == 2
