"""Checkpoints in other libraries compute the same, and come back bit for bit."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers import ROOT, write_pictures
from PIL import Image
from runs import pretrain
from transformers import (
    BeitForImageClassification,
    BeitModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

import main_linprobe
import main_pretrain
import models_vit
from evaluation import checkpoints
from exporting import formats
from methods import base
from util.config import PretrainSettings
from util.data import transforms
from util.training import checkpoint, tensor_names

MINI = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}


@pytest.fixture(params=[False, True], ids=["raw", "norm_pix"])
def saved(request, tmp_path):
    """A pre-training checkpoint with random weights everywhere: (path, model)."""
    settings = PretrainSettings(model="mae_vit_mini_patch4", norm_pix_loss=request.param, in_chans=3, mask_ratio=0.625)
    return save(tmp_path / "ours.pth", base.build_model(settings), settings.as_dict(), [4, 4])


def save(path, model, args, grid, **more):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    last = {"memory_format": torch.channels_last}  # as --channels_last leaves them
    state = {name: value.contiguous(**last) if value.ndim == 4 else value for name, value in model.state_dict().items()}
    checkpoint.save(path, {"model": state, "args": args, "grid": grid} | more)
    return path, model.eval()


def classifier(tmp_path, probe=False, name="vit_mini_patch4", **options):
    model = models_vit.create_model(name, num_classes=5, **options)
    if probe:
        models_vit.add_probe_head(model)
        model.head[0].running_mean += torch.randn(96)
        model.head[0].running_var += torch.rand(96)
    args = {"model": name, "input_size": [16]}
    return save(tmp_path / "classifier.pth", model, args, [4, 4], classes=list("abcde"))


def convert(path, target, output):
    formats.write(formats.read(path), target, output)
    return output


def back(path, source, output):
    formats.write(formats.read(path, source), None, output)
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
    model.set_masking(base.create_strategy(PretrainSettings(mask_ratio=0.625)))
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
    opened = checkpoints.open_checkpoint(tmp_path / "back.pth")
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


TIMM_BEITS = {
    "simmim": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    "simmim classifier": {},
    "bootmae": {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": 0},
}
TIMM_BEITS["bootmae classifier"] = TIMM_BEITS["bootmae"]


@pytest.mark.parametrize("method", ["simmim", "bootmae"])
def test_a_beit_encoder_in_other_libraries_and_back(tmp_path, method):
    """All weights random, so that no bias and no layer scale could be lost unseen."""
    settings = PretrainSettings(model=f"{method}_vit_mini_patch4", std=[0.5, 0.6, 0.7])
    path, model = save(tmp_path / "ours.pth", base.build_model(settings), settings.as_dict(), [4, 4])
    images = torch.randn(2, 3, 16, 16)
    file = convert(path, "timm", tmp_path / "timm.safetensors")
    form = {"num_classes": 0, "global_pool": ""} | TIMM_BEITS[method] | MINI
    other = timm.create_model("beit_base_patch16_224", checkpoint_path=str(file), **form).eval()
    theirs = BeitModel.from_pretrained(convert(path, "hf", tmp_path / "hf")).eval()
    with torch.no_grad():
        ours = model.encode(model.embed(images), None)
        torch.testing.assert_close(other.forward_features(images), ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(images).last_hidden_state, ours, rtol=1e-5, atol=1e-5)
    content = back(file, "timm", tmp_path / "back.pth")
    assert_same(content["model"], tensor_names.encoder_or_classifier(model.state_dict()))
    assert content["args"]["model"] == settings.model
    file = convert(path, "safetensors", tmp_path / "all.safetensors")
    assert_same(back(file, "safetensors", tmp_path / "back.pth")["model"], model.state_dict())
    with pytest.raises(ValueError, match=f"--to mae: {settings.model} is a BEiT, whose biases MAE's ViT lacks"):
        convert(path, "mae", tmp_path / "mae.pth")


@pytest.mark.parametrize("probe", [False, True], ids=["finetuned", "probed"])
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("method", ["simmim", "bootmae"])
def test_a_beit_classifier_in_other_libraries(tmp_path, method, pool, probe):
    path, model = classifier(tmp_path, probe, f"{method}_vit_mini_patch4", global_pool=pool == "avg")
    file = convert(path, "timm", tmp_path / "timm.safetensors")
    form = {"num_classes": 5, "global_pool": pool} | TIMM_BEITS[f"{method} classifier"] | MINI
    other = timm.create_model("beit_base_patch16_224", checkpoint_path=str(file), **form).eval()
    folder = convert(path, "hf", tmp_path / "hf")
    theirs, report = BeitForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.id2label == dict(enumerate("abcde"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.eval()(images).logits, model(images), rtol=1e-5, atol=1e-5)
    if not probe:
        assert_same(back(file, "timm", tmp_path / "back.pth")["model"], model.state_dict())


@pytest.mark.parametrize("method", ["cmae", "hpm"])
def test_what_cmae_and_hpm_leave_is_exported_as_maes(tmp_path, method):
    pictures = write_pictures(tmp_path / "pictures", classes=1, per_class=4)
    options = ["--method_args", "feature_depth=1"] if method == "cmae" else []
    pretrain(pictures, tmp_path / "run", "--method", method, "--epochs", 1, *options)
    path = tmp_path / "run" / checkpoint.LAST
    file, folder = convert(path, "timm", tmp_path / "timm.safetensors"), convert(path, "hf", tmp_path / "hf")
    other = timm.create_model("vit_base_patch16_224", num_classes=0, checkpoint_path=str(file), **MINI).eval()
    theirs, report = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    model, images, noise = checkpoints.open_checkpoint(path).model, torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        ours = model.encode(model.embed(images), None)
        torch.testing.assert_close(other.forward_features(images), ours, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(images, noise=noise).logits, model(images, noise)[1], rtol=1e-5, atol=1e-5)


def test_hugging_faces_own_weights_come_here(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 384, "layer_norm_eps": 1e-6}
    decoder = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 256}
    other = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, decoder_num_attention_heads=2, norm_pix_loss=True))
    other.eval().save_pretrained(tmp_path / "hf")
    back(tmp_path / "hf", "hf", tmp_path / "ours.pth")
    opened = checkpoints.open_checkpoint(tmp_path / "ours.pth")
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        loss, pred, _ = opened.model(images, noise)
        found = other(images, noise=noise)
    torch.testing.assert_close(loss, found.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pred, found.logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match="4 heads, but mae_vit_mini_patch4 has 3"):
        formats.read(tmp_path / "hf", "hf")
    ViTForImageClassification(ViTConfig(**sizes, qkv_bias=False)).save_pretrained(tmp_path / "nobias")
    with pytest.raises(ValueError, match=r"attn.qkv.bias is missing"):
        formats.read(tmp_path / "nobias", "hf")


def test_what_the_other_library_has_not_is_said(tmp_path):
    path, _ = classifier(tmp_path, global_pool=True)
    with pytest.raises(ValueError, match="classifies the class token"):
        convert(path, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    settings = PretrainSettings(model="mae_vit_mini_patch4", input_size=[16, 24])
    path, _ = save(tmp_path / "wide.pth", base.build_model(settings), settings.as_dict(), [4, 6])
    with pytest.raises(ValueError, match="16 x 24"):
        convert(path, "hf", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert(path, "safetensors", tmp_path / "x.bin")
    other = timm.create_model("vit_base_patch16_224", num_classes=0, class_token=False, global_pool="avg", **MINI)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not the architecture mae_vit_mini_patch4|square"):
        formats.read(tmp_path / "other.safetensors", "timm")


@pytest.fixture
def command():
    return runpy.run_path(str(ROOT / "scripts/export.py"), run_name="export")["main"]


def mistake(command, capsys, *arguments) -> str:
    """What the command says in the one line that it ends with."""
    with pytest.raises(SystemExit) as stop:
        command([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1), error
    return error


def test_the_command(saved, tmp_path, command):
    command([str(saved[0]), "--to", "hf", "--output", str(tmp_path / "hf")])
    command([str(tmp_path / "hf"), "--from", "hf", "--output", str(tmp_path / "back.pth")])
    assert_same(checkpoint.load(tmp_path / "back.pth")["model"], saved[1].state_dict())
    with pytest.raises(SystemExit) as stop:
        command([str(tmp_path / "none.pth"), "--to", "timm", "--output", str(tmp_path / "x.pth")])
    assert stop.value.code == 2


@pytest.mark.parametrize("file", ["mae.pth", "timm.pth", "timm.safetensors", "safetensors.safetensors"])
def test_images_that_are_not_square_keep_their_shape(tmp_path, file):
    settings = PretrainSettings(model="mae_vit_mini_patch4", input_size=[8, 32])  # 2 x 8 patches; 4 x 4 would fit, too
    path, model = save(tmp_path / "wide.pth", base.build_model(settings), settings.as_dict(), [2, 8])
    source = file.partition(".")[0]
    convert(path, source, tmp_path / file)
    content = back(tmp_path / file, source, tmp_path / "back.pth")
    assert tuple(content["grid"]) == (2, 8)
    opened = checkpoints.open_checkpoint(tmp_path / "back.pth")
    images = torch.randn(2, 3, 8, 32)
    with torch.no_grad():
        ours = model.encode(model.embed(images), None)
        torch.testing.assert_close(opened.model.encode(opened.model.embed(images), None), ours)
        if file == "timm.pth":
            sizes = MINI | {"img_size": (8, 32)}
            other = timm.create_model(
                "vit_base_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / file), **sizes
            )
            torch.testing.assert_close(other.eval().forward_features(images), ours, rtol=1e-5, atol=1e-5)


def test_a_shape_that_a_file_does_not_tell_can_be_given(tmp_path, command, capsys):
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **(MINI | {"img_size": (8, 32)}))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    arguments = [str(tmp_path / "theirs.safetensors"), "--from", "timm", "--output", str(tmp_path / "ours.pth")]
    command(arguments)
    assert (
        "note: the file does not tell the shape of its images: 16 patches are taken as 4 x 4" in capsys.readouterr().out
    )
    command([*arguments, "--overwrite", "--input_size", "8", "32"])
    assert "note" not in capsys.readouterr().out
    opened = checkpoints.open_checkpoint(tmp_path / "ours.pth")
    images = torch.randn(2, 3, 8, 32)
    with torch.no_grad():
        expected = model.eval().forward_features(images)
        found = opened.model.encode(opened.model.embed(images), None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    error = mistake(command, capsys, *arguments, "--overwrite", "--input_size", "32")
    assert "--input_size [32]: " in error
    assert "is of images of 16 patches of 4 x 4" in error


@pytest.mark.parametrize("target", ["mae", "safetensors"])
def test_a_probe_comes_back_whole(pictures, tmp_path, target):
    flags = "--model vit_mini_patch4 --in_chans 1 --batch_size 16 --num_workers 0 --warmup_epochs 0 --epochs 1"
    flags = [*flags.split(), "--data_path", str(pictures), "--output_dir", str(tmp_path / "run")]
    main_linprobe.main(flags)
    probe = tmp_path / "run" / checkpoint.LAST
    file = convert(probe, target, tmp_path / f"theirs.{'pth' if target == 'mae' else target}")
    content = back(file, target, tmp_path / "back.pth")
    assert_same(content["model"], checkpoint.load(probe)["model"])
    main_linprobe.main([*flags, "--eval", "--resume", str(tmp_path / "back.pth")])


def test_only_what_describes_the_model_goes_along(tmp_path):
    private = {"data_path": "/data/mine", "output_dir": "/home/me/run", "finetune": "/home/me/start.pth"}
    settings = PretrainSettings(model="mae_vit_mini_patch4", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], **private)
    path, _ = save(tmp_path / "ours.pth", base.build_model(settings), settings.as_dict(), [4, 4])
    for target, name in (
        ("timm", "a.safetensors"),
        ("safetensors", "b.safetensors"),
        (None, "c.pth"),
        ("mae", "d.pth"),
    ):
        content = convert(path, target, tmp_path / name).read_bytes()
        assert not [value for value in private.values() if value.encode() in content]
    content = back(tmp_path / "a.safetensors", "timm", tmp_path / "back.pth")
    assert (content["args"]["mean"], content["args"]["std"]) == (settings.mean, settings.std)


def test_hugging_faces_processor_prepares_pictures_as_here(tmp_path):
    settings = PretrainSettings(model="mae_vit_mini_patch4", mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    path, _ = save(tmp_path / "ours.pth", base.build_model(settings), settings.as_dict(), [4, 4])
    processor = ViTImageProcessor.from_pretrained(convert(path, "hf", tmp_path / "hf"))
    noise = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    opened = checkpoints.open_checkpoint(path)
    ours = opened.normalize(transforms.evaluation_transform((16, 16), 1.0)(picture)[None])
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    assert (theirs - ours).abs().max() < 0.03  # 8 bits of rounding are 1 / 255 / 0.5 = 0.008
    nearest = opened.normalize(
        torch.from_numpy(np.array(picture.resize((16, 16), Image.Resampling.NEAREST))).permute(2, 0, 1)[None]
    )
    assert (nearest - ours).abs().max() > 0.3


HF_SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
HF_SIZES |= {"intermediate_size": 384}
HF_DECODER = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 256}
HF_DECODER |= {"decoder_num_attention_heads": 2}


def test_another_epsilon_or_activation_is_not_passed_over(tmp_path, command, capsys):
    for epsilon in (1e-6, None):  # None: transformers' default
        options = {} if epsilon is None else {"layer_norm_eps": epsilon}
        ViTMAEForPreTraining(ViTMAEConfig(**HF_SIZES, **HF_DECODER, **options)).save_pretrained(tmp_path / "hf")
        command([str(tmp_path / "hf"), "--from", "hf", "--output", str(tmp_path / "x.pth"), "--overwrite"])
        said = "note: layer_norm_eps is 1e-12 there and 1e-06 here" in capsys.readouterr().out
        assert said == (epsilon is None)
    for activation in ("relu", "quick_gelu"):
        config = ViTMAEConfig(**HF_SIZES, **HF_DECODER, layer_norm_eps=1e-6, hidden_act=activation)
        ViTMAEForPreTraining(config).save_pretrained(tmp_path / "hf")
        with pytest.raises(ValueError, match=f"hidden_act is '{activation}'; models here have the exact gelu only"):
            formats.read(tmp_path / "hf", "hf")


@pytest.mark.parametrize("kind", ["mae", "vit"])
def test_hugging_faces_encoders_alone_come_here(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "mae":
        other = ViTMAEModel(ViTMAEConfig(**HF_SIZES, layer_norm_eps=1e-6, mask_ratio=0.0)).eval()
    else:
        other = ViTModel(ViTConfig(**HF_SIZES, layer_norm_eps=1e-6)).eval()
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "hf")
    back(tmp_path / "hf", "hf", tmp_path / "ours.pth")
    found = formats.read(tmp_path / "hf", "hf")
    assert found.kind == "encoder"
    assert any("pooler is left out" in note for note in found.notes) == (kind == "vit")
    opened, images = checkpoints.open_checkpoint(tmp_path / "ours.pth"), torch.randn(2, 3, 16, 16)
    noise = {"noise": torch.arange(16).expand(2, 16) / 16} if kind == "mae" else {}
    with torch.no_grad():
        expected = other(images, **noise).last_hidden_state
        tokens = opened.model.encode(opened.model.embed(images), None)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_what_exists_is_not_replaced_unless_told_to(saved, tmp_path, command, capsys):
    path, _ = saved
    content = path.read_bytes()
    other = tmp_path / "run.pth"
    other.write_bytes(content)
    assert "is what is converted" in mistake(command, capsys, path, "--to", "mae", "--output", path, "--overwrite")
    (tmp_path / "link.pth").symlink_to(path)
    link = tmp_path / "link.pth"
    assert "is what is converted" in mistake(command, capsys, path, "--to", "mae", "--output", link, "--overwrite")
    assert "run.pth exists" in mistake(command, capsys, path, "--to", "mae", "--output", other)
    (tmp_path / "x.onnx.data").touch()  # weights of a graph that may have another name by now
    assert "x.onnx.data exists" in mistake(command, capsys, path, "--to", "onnx", "--output", tmp_path / "x.onnx")
    assert path.read_bytes() == other.read_bytes() == content
    command([str(path), "--to", "mae", "--output", str(other), "--overwrite"])
    assert checkpoint.load(other).keys() == {"model", "grid"}
    command([str(path), "--to", "hf", "--output", str(tmp_path / "hf")])
    weights = tmp_path / "hf" / "model.safetensors"
    assert "model.safetensors exists" in mistake(command, capsys, path, "--to", "hf", "--output", tmp_path / "hf")
    again = [tmp_path / "hf", "--from", "hf", "--output"]
    assert "must end in .pth" in mistake(command, capsys, *again, tmp_path / "hf" / "x.safetensors")
    back_into_itself = [weights, "--to", "hf", "--output", tmp_path / "hf", "--overwrite"]
    assert "is what is converted" in mistake(command, capsys, *back_into_itself)


def test_a_mistake_is_one_line(saved, tmp_path, command, capsys):
    path, _ = saved
    (tmp_path / "d.pth").mkdir()
    (tmp_path / "file").write_text("x")
    to_timm, to_hf = [path, "--to", "timm", "--output"], [path, "--to", "hf", "--output"]
    assert "d.pth: is a folder; name a file" in mistake(command, capsys, *to_timm, tmp_path / "d.pth")
    assert "file: is a file; name a folder" in mistake(command, capsys, *to_hf, tmp_path / "file")
    assert "cannot be written" in mistake(command, capsys, *to_hf, tmp_path / "file" / "sub")
    assert "cannot be written" in mistake(command, capsys, *to_timm, "/proc/none/x.pth")
    assert "cannot be written" in mistake(command, capsys, *to_timm, "/proc/x.safetensors")
    convert(path, "hf", tmp_path / "hf")
    config, from_hf = tmp_path / "hf" / "config.json", [tmp_path / "hf", "--from", "hf", "--output", tmp_path / "x.pth"]
    good = json.loads(config.read_text())
    broken = [
        ("{", "config.json: cannot be read as JSON"),
        ("[1]", "config.json: holds a list, not the settings of a model"),
        (json.dumps({"model_type": "vit_mae"}), "config.json: num_attention_heads is missing"),
        (json.dumps(good | {"model_type": "bert"}), "model_type is 'bert'"),
    ]
    for text, message in broken:
        config.write_text(text)
        assert message in mistake(command, capsys, *from_hf)
    config.write_text(json.dumps(good))
    (tmp_path / "hf" / "model.safetensors").write_text("x")
    assert "model.safetensors: damaged, or no safetensors file" in mistake(command, capsys, *from_hf)
