"""Pre-training, fine-tuning and measuring from weights of MAE, DINO, timm and Hugging Face."""

from __future__ import annotations

import argparse
import json
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from helpers import log_lines, refusal
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

import main_finetune
import main_pretrain
from evaluation import checkpoints
from util.pos_embed import sincos_2d
from util.training import checkpoint, foreign

MINI = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
HF = {"image_size": 16, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
HF |= {"intermediate_size": 384, "layer_norm_eps": 1e-6}
DECODER = {"decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 256}
FLAGS = ["--dataset", "digits", "--in_chans", 3, "--num_workers", 0, "--batch_size", 512, "--warmup_epochs", 0]
FLAGS += ["--epochs", 0]
FEW = ["--dataset", "folder", "--batch_size", 16, "--data_path"]


def shaken(model):
    """Give every parameter random values, so that none could be lost unseen."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def timm_vit(**options):
    return shaken(timm.create_model("vit_base_patch16_224", **({"num_classes": 7} | MINI | options)))


def mae_encoder(folder):
    """The layout of the encoders that MAE published: a fixed position table, no decoder, no head."""
    model = timm_vit(num_classes=0)
    model.pos_embed.data = sincos_2d(96, (4, 4))
    torch.save({"model": model.state_dict()}, folder / "mae.pth")
    return folder / "mae.pth", model.forward_features


def dino(folder):
    """A whole checkpoint of DINO: student under DistributedDataParallel, teacher, their heads, the loss's centre."""
    teacher, student = timm_vit(num_classes=0), timm_vit(num_classes=0).state_dict()
    head = {f"head.{name}": torch.randn(8, 8) for name in ("mlp.0.weight", "last_layer.weight_g")}
    content = {
        "student": {f"module.backbone.{name}": torch.zeros_like(value) for name, value in student.items()}
        | {f"module.{name}": value for name, value in head.items()},
        "teacher": {f"backbone.{name}": value for name, value in teacher.state_dict().items()} | head,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, out_dim=65536, data_path="/theirs", seed=0),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    torch.save(content, folder / "dino.pth")
    return folder / "dino.pth", teacher.forward_features


def timm_weights(folder):
    model = timm_vit()
    torch.save(model.state_dict(), folder / "timm.pth")
    return folder / "timm.pth", model.forward_features


def timm_safetensors(folder):
    model = timm_vit()
    safetensors.torch.save_file(model.state_dict(), folder / "timm.safetensors")
    return folder / "timm.safetensors", model.forward_features


def timm_training(folder):
    """What timm's train.py writes."""
    model = timm_vit()
    args = argparse.Namespace(model="vit_small_patch16_224", input_size=[3, 224, 224], mean=None, std=None, lr=0.1)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": "vit_small_patch16_224", "state_dict": state, "args": args}, folder / "t.pth.tar")
    return folder / "t.pth.tar", model.forward_features


def timm_hub(folder, **options):
    """What timm keeps on the hub of Hugging Face: by default the weights are in a `pytorch_model.bin`."""
    model = timm_vit()
    save_for_hf(model, folder / "hub", **options)
    return folder / "hub", model.forward_features


def lightly(folder):
    """The encoder of lightly's masked autoencoder."""
    modules = pytest.importorskip("lightly.models.modules")
    backbone = modules.MaskedVisionTransformerTIMM(vit=timm_vit())
    shaken(backbone)
    torch.save(backbone.vit.state_dict(), folder / "encoder.pth")
    return folder / "encoder.pth", backbone.encode


def hugging_face(kind, config):
    def write(folder):
        model = shaken(kind(config))
        model.save_pretrained(folder / "hf")
        encoder = getattr(model, "vit", model)
        if isinstance(encoder, ViTMAEModel):
            encoder.config.mask_ratio = encoder.embeddings.config.mask_ratio = 0.0
            order = {"noise": torch.arange(16).expand(2, 16) / 16}
        else:
            order = {}
        return folder / "hf", lambda images: encoder(images, **order).last_hidden_state

    return write


SOURCES = {
    "mae": mae_encoder,
    "dino": dino,
    "timm": timm_weights,
    "timm safetensors": timm_safetensors,
    "timm training": timm_training,
    "timm hub": timm_hub,
    "timm hub safetensors": partial(timm_hub, safe_serialization=True),
    "lightly": lightly,
    "hf vit": hugging_face(ViTModel, ViTConfig(**HF)),
    "hf classifier": hugging_face(ViTForImageClassification, ViTConfig(**HF, num_labels=5)),
    "hf mae encoder": hugging_face(ViTMAEModel, ViTMAEConfig(**HF)),
    "hf mae": hugging_face(ViTMAEForPreTraining, ViTMAEConfig(**HF, **DECODER, decoder_num_attention_heads=2)),
}


def pretrain(output, *more):
    """Run; return what its last checkpoint holds, opened."""
    model = [] if "--model" in more else ["--model", "mae_vit_mini_patch4"]
    main_pretrain.main([str(flag) for flag in (*FLAGS, *model, "--output_dir", output, *more)])
    return checkpoints.open_checkpoint(output / checkpoint.LAST).model


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The tensors of a new model from the same seed."""
    return pretrain(tmp_path_factory.mktemp("fresh")).state_dict()


@pytest.mark.parametrize("source", SOURCES)
def test_pre_training_begins_with_the_features_of_the_library(source, fresh, tmp_path, capsys):
    path, features = SOURCES[source](tmp_path)
    ours = pretrain(tmp_path / "run", "--finetune", path)
    said = capsys.readouterr().out
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = features(images)
        torch.testing.assert_close(ours.encode(ours.embed(images), None), expected, rtol=1e-5, atol=1e-5)
        opened = checkpoints.open_checkpoint(path).model
        torch.testing.assert_close(opened.encode(opened.embed(images), None), expected, rtol=1e-5, atol=1e-5)
    has_decoder = source == "hf mae"
    assert ("the decoder starts anew: " in said) != has_decoder
    same = [torch.equal(fresh[name], value) for name, value in ours.state_dict().items() if name.startswith("decoder_")]
    assert all(same) != has_decoder
    assert ("its teacher is taken, not its student" in said) == (source == "dino")
    assert ("projection head is left out" in said) == (source == "dino")


@pytest.mark.parametrize("source", ["mae", "dino", "timm hub", "hf vit"])
def test_fine_tuning_begins_with_them_too(source, pictures, tmp_path, capsys):
    path, _ = SOURCES[source](tmp_path)
    flags = [*FLAGS, *FEW, pictures, "--model", "vit_mini_patch4", "--output_dir", tmp_path / "run", "--cls_token"]
    flags += ["--finetune", path, "--epochs", 1, "--lr", 0, "--min_lr", 0, "--reprob", 0, "--aa", "null"]
    main_finetune.main([str(flag) for flag in flags])
    assert "the head starts anew: " in capsys.readouterr().out
    found, expected = checkpoint.load(tmp_path / "run" / checkpoint.LAST)["model"], foreign.read(path)["model"]
    encoder = [name for name in expected if not name.startswith("head.")]
    assert len(encoder) == 4 + 4 * 12 + 2
    assert all(torch.equal(found[name], expected[name]) for name in encoder)


def test_a_run_that_has_begun_needs_the_file_no_more(tmp_path):
    path, _ = timm_weights(tmp_path)
    pretrain(tmp_path / "run", "--finetune", path, "--epochs", 1)
    path.unlink()
    pretrain(tmp_path / "run", "--finetune", path, "--epochs", 2)
    lines = log_lines(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [0, 1]
    assert 0 < lines[1]["train_loss"] < lines[0]["train_loss"] < 10


@pytest.mark.parametrize("source", ["mae", "timm"])
def test_the_position_table_is_resized_and_stays_fixed(source, pictures, tmp_path):
    """Fixed or learned, for larger images it is resized as everywhere, and training does not move it."""
    path, _ = SOURCES[source](tmp_path)
    more = [*FEW, pictures, "--finetune", path, "--input_size", 24, 20, "--epochs", 1, "--lr", 1e-30]
    ours = pretrain(tmp_path / "run", *more)
    theirs = timm_vit(img_size=(24, 20))
    state = torch.load(path, weights_only=True)
    state = state.get("model", state)
    table = resample_abs_pos_embed(state["pos_embed"], (6, 5), antialias=False)
    theirs.load_state_dict(state | {"pos_embed": table}, strict=False)
    images = torch.randn(2, 3, 24, 20)
    with torch.no_grad():
        found = ours.encode(ours.embed(images), None)
        torch.testing.assert_close(found, theirs.forward_features(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.pos_embed, table)
    assert torch.equal(ours.decoder_pos_embed, sincos_2d(64, (6, 5)))


def test_a_whole_checkpoint_of_ours_continues_at_another_size_with_its_decoder(tmp_path, capsys):
    first = pretrain(tmp_path / "first", "--seed", 5).state_dict()
    path = tmp_path / "first" / checkpoint.LAST
    larger = pretrain(tmp_path / "larger", "--finetune", path, "--input_size", 24).state_dict()
    assert "anew" not in capsys.readouterr().out
    tables = {"pos_embed", "decoder_pos_embed"}
    assert all(torch.equal(larger[name], first[name]) for name in first.keys() - tables)
    assert {larger[name].shape[1] for name in tables} == {37}


def test_ibot_continues_from_dino_and_trains_its_table(tmp_path):
    path, features = dino(tmp_path)
    ibot = ["--model", "ibot_vit_mini_patch4", "--method", "ibot", "--finetune", path]
    ibot += ["--method_args", "out_dim=32", "local_size=8"]
    ours, images = pretrain(tmp_path / "run", *ibot), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = ours.encode(ours.embed(images), None)
        torch.testing.assert_close(found, features(images), rtol=1e-5, atol=1e-5)
    assert ours.pos_embed.requires_grad


def test_images_are_normalised_as_the_library_s_files_tell(tmp_path):
    path, _ = timm_hub(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    (path / "config.json").write_text(json.dumps(config))
    pretrain(tmp_path / "run", "--finetune", path)
    args = checkpoint.load(tmp_path / "run" / checkpoint.LAST)["args"]
    assert (args["mean"], args["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])


def resnet(folder):
    torch.save(timm.create_model("resnet18").state_dict(), folder / "x.pth")


def bert(folder):
    hugging_face(ViTModel, ViTConfig(**HF))(folder)
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    (folder / "hf").rename(folder / "x.pth")


def other_heads(folder):
    hugging_face(ViTModel, ViTConfig(**(HF | {"num_attention_heads": 4})))(folder)
    (folder / "hf").rename(folder / "x.pth")


def timm_like(**options):
    return lambda folder: torch.save(timm_vit(**options).state_dict(), folder / "x.pth")


def wider_decoder(folder):
    decoder = DECODER | {"decoder_hidden_size": 32, "decoder_intermediate_size": 128}
    config = ViTMAEConfig(**HF, **decoder, decoder_num_attention_heads=1)
    hugging_face(ViTMAEForPreTraining, config)(folder)
    (folder / "hf").rename(folder / "x.pth")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "x.pth: there is no such checkpoint"),
        (
            lambda folder: (folder / "x.pth").mkdir(),
            "x.pth: needs config.json and model.safetensors, as save_pretrained",
        ),
        (resnet, "x.pth: its tensors are called conv1.weight, bn1.weight, bn1.bias, which is none of the known lay"),
        (bert, "x.pth: model_type is 'bert'; vit_mae and vit can be converted"),
        (other_heads, "x.pth: 4 heads, but --model has 3; choose a --model with 4"),
        (timm_like(embed_dim=48), "it has width 48, 4 blocks, patches of 4 x 4 and 3 channel(s), the model width 96"),
        (timm_like(depth=5), "it has width 96, 5 blocks, patches of 4 x 4 and 3 channel(s), the model width 96, 4 bl"),
        (timm_like(patch_size=2), "choose --model, --patch_size and --in_chans to match; "),
        (timm_like(init_values=1e-5), "another architecture than --model: blocks.0.ls1.gamma is not in the model"),
        (timm_like(img_size=(16, 20)), "the checkpoint's position table has 20 places, not a square grid"),
        (wider_decoder, "its decoder is not that of --model: mask_token is (1, 1, 32) in it and (1, 1, 64) in the mod"),
    ],
)
def test_what_cannot_be_continued_is_one_sentence(write, message, tmp_path, capsys):
    write(tmp_path)
    flags = [*FLAGS, "--model", "mae_vit_mini_patch4", "--output_dir", tmp_path / "run"]
    said = refusal(main_pretrain.main, [*flags, "--finetune", tmp_path / "x.pth"], capsys)
    assert message in said
    assert "x.pth" in said
