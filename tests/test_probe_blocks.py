"""--probe_blocks: the first blocks of an encoder are probed and measured as if there were no others."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import log_lines, refusal

import main_linprobe
import models_vit
from evaluation import checkpoints, features, monitor
from exporting import formats
from methods import base
from models_base import keep_blocks
from scripts import evaluate
from util.config import PretrainSettings
from util.data.step_loader import evaluation_loader
from util.training import checkpoint

METHODS = {"mae": "vit_mini_patch4", "simmim": "simmim_vit_mini_patch4", "bootmae": "bootmae_vit_mini_patch4"}
PRETRAINED = {"mae": "mae_vit_mini_patch4"}


@pytest.fixture(params=list(METHODS))
def encoder(request, tmp_path):
    """(method, path, model), all weights random."""
    settings = PretrainSettings(model=PRETRAINED.get(request.param, METHODS[request.param]), dataset="digits")
    torch.manual_seed(0)
    model = base.build_model(settings).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path / "encoder.pth"
    checkpoint.save(path, {"model": model.state_dict(), "args": settings.as_dict(), "grid": [4, 4]})
    return request.param, path, model


def output_of(model, block: int, images: torch.Tensor) -> torch.Tensor:
    """What a block of the whole encoder gives (N, L + 1, D), normalised without learned numbers."""
    outputs = []
    hook = model.blocks[block].register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    with torch.no_grad():
        model.encode(model.embed(images), None)
    hook.remove()
    return F.layer_norm(outputs[0], outputs[0].shape[-1:], eps=1e-6)


def flags(method: str, pictures, encoder, output, *more) -> list[str]:
    given = ["--data_path", pictures, "--model", METHODS[method], "--finetune", encoder, "--probe_blocks", 2]
    given += ["--epochs", 1, "--warmup_epochs", 0, "--batch_size", 16, "--num_workers", 0, "--output_dir", output]
    return [str(flag) for flag in (*given, *more)]


@pytest.mark.parametrize("pool", ["--cls_token", "--global_pool"])
def test_a_probe_has_the_first_blocks_and_is_a_checkpoint_like_others(pictures, encoder, tmp_path, capsys, pool):
    method, path, whole = encoder
    main_linprobe.main(flags(method, pictures, path, tmp_path / "run", pool))
    main_linprobe.main(flags(method, pictures, path, tmp_path / "run", pool, "--epochs", "2"))
    _, last = log_lines(tmp_path / "run")
    probe = tmp_path / "run" / checkpoint.LAST
    state = checkpoint.load(probe)["model"]
    assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == {"0", "1"}
    model = models_vit.create_model(METHODS[method], num_classes=2, global_pool=pool == "--global_pool")
    models_vit.add_probe_head(model, 2)
    model.load_state_dict(state)
    images = torch.randn(3, 3, 16, 16)
    tokens = output_of(whole, 1, images)
    with torch.no_grad():
        if pool == "--cls_token":
            torch.testing.assert_close(model.eval().forward_features(images), tokens, rtol=1e-5, atol=1e-5)
        else:
            found = F.layer_norm(model.eval().forward_features(images), (96,), eps=1e-6)
            torch.testing.assert_close(found, tokens, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    main_linprobe.main(flags(method, pictures, path, tmp_path / "other", pool, "--eval", "--resume", str(probe)))
    acc1, acc5, loss = (last[f"test_{name}"] for name in ("acc1", "acc5", "loss"))
    assert f": {acc1:.2f}% (top 5 {acc5:.2f}%, loss {loss:.4f})" in capsys.readouterr().out


def test_a_probe_of_some_blocks_is_exported_and_opened(pictures, encoder, tmp_path):
    method, path, _ = encoder
    main_linprobe.main(flags(method, pictures, path, tmp_path / "run"))
    probe, file = tmp_path / "run" / checkpoint.LAST, tmp_path / "timm.safetensors"
    formats.write(formats.read(probe), "timm", file)
    formats.write(formats.read(file, "timm"), None, tmp_path / "back.pth")
    assert checkpoint.load(tmp_path / "back.pth")["args"]["probe_blocks"] == 2
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3}
    form = {"bootmae": {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": 0}}.get(method, {})
    name = "vit_base_patch16_224" if method == "mae" else "beit_base_patch16_224"
    other = timm.create_model(name, num_classes=2, global_pool="token", checkpoint_path=str(file), **form, **sizes)
    model = models_vit.create_model(METHODS[method], num_classes=2, global_pool=False)
    models_vit.add_probe_head(model, 2)
    model.load_state_dict(checkpoint.load(probe)["model"])
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images), model.eval()(images), rtol=1e-5, atol=1e-5)
        opened = checkpoints.open_checkpoint(probe)
        found = features.encode_images(opened.model, images, "cls")
        torch.testing.assert_close(found, model.forward_features(images)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_evaluate_measures_the_first_blocks(encoder, tmp_path, pool):
    _, path, whole = encoder
    arguments = [path, "--metrics", "rank_me", "--val_images", 40, "--pool", pool, "--probe_blocks", 2]
    evaluate.main([str(value) for value in [*arguments, "--output", tmp_path / "result.json"]])
    found = json.loads((tmp_path / "result.json").read_text())
    opened = checkpoints.open_checkpoint(path)
    val = monitor.open_sets(opened.settings, opened.size, 40, 40).val
    images, _ = next(iter(evaluation_loader(val, range(len(val)), batch_size=256)))
    tokens = output_of(whole, 1, opened.normalize(images))
    expected = features.rank_me(tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1))
    assert (found["rank_me"], found["probe_blocks"]) == (pytest.approx(expected, rel=1e-4), 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_that_was_fine_tuned_for_the_last_block_starts_anew(method):
    model = models_vit.create_model(METHODS[method], num_classes=2, global_pool=True)
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
    models_vit.add_probe_head(model, 2)
    torch.testing.assert_close(model.fc_norm.state_dict(), torch.nn.LayerNorm(96).state_dict())


def test_all_blocks_are_no_cut(encoder):
    _, path, _ = encoder
    models = [checkpoints.open_checkpoint(path).model for _ in range(2)]
    keep_blocks(models[1], 4)
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))


def test_blocks_that_are_not_there_are_named(pictures, encoder, tmp_path, capsys):
    method, path, _ = encoder
    for number in (0, 5):
        said = refusal(evaluate.main, [path, "--probe_blocks", number], capsys)
        assert f"--probe_blocks {number}: the model has 4 blocks; choose 1 to 4" in said
    main_linprobe.main(flags(method, pictures, path, tmp_path / "run"))
    said = refusal(main_linprobe.main, flags(method, pictures, path, tmp_path / "run", "--probe_blocks", 3), capsys)
    assert "blocks.2" in said
