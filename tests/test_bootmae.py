"""BootMAE: against the goldens, also under AMR, and everything around it that a user of the method meets."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import transformers
from faults import injected
from helpers import golden, golden_json, log_lines, refusal, varied_images, with_config, write_pictures
from reference import bootmae, bootmae_amr
from runs import assert_same_run, content, flags

import main_finetune
import main_linprobe
import main_pretrain
import masking
import models_vit
from evaluation import checkpoints, figures, measure
from methods import At, BootMAE, Inputs
from models_bootmae import BootMAEViT, bootmae_vit_base_patch16
from scripts import export
from util import optim
from util.packing import PackedLayout, packed_cross_attention
from util.training import checkpoint, fitting
from util.training.averages import Averages
from util.training.step import GradientStep, train_step

MODEL = ["--method", "bootmae", "--model", "bootmae_vit_mini_patch4"]
BLOCKS = ["--masking", "block", "--masking_args", "covered=0.5", "min_patches=2", "roll=2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=1, per_class=14)


def run(pictures, output, *more) -> list[dict]:
    main_pretrain.main(flags(pictures, output, *MODEL, *more))
    return log_lines(output)


def tiny(**options) -> BootMAEViT:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 40, "depth": 3, "num_heads": 5, "decode_dim": 36}
    return BootMAEViT(**(sizes | options))


@pytest.mark.parametrize(
    ("name", "reference", "inputs"),
    [
        ("bootmae_tiny", bootmae, ("config", "images", "mask/block", "mask/noise")),
        ("bootmae_amr", bootmae_amr, ("config", "images", "noise")),
    ],
)
def test_everything_against_the_goldens(name, reference, inputs):
    data = golden(name)
    given = {k: v for k, v in data.items() if k in inputs or k.startswith(("state/", "ema/"))}
    found = reference.compute(given)
    expected = data.keys() - given.keys()
    assert found.keys() >= expected
    for key in expected:
        value, known = found[key], data[key]
        if known.dtype.kind in "biu":
            np.testing.assert_array_equal(value, known, err_msg=key)
        else:
            tolerance = 1e-4 if "after/" in key else 1e-5
            bound = tolerance * max(np.abs(known).max(), 1e-3)
            np.testing.assert_allclose(value, known, rtol=0, atol=bound, err_msg=key)


def test_the_reference_takes_other_settings():
    """No weight of the features, another optimizer; ratios as fractions."""
    data = golden("bootmae_tiny")
    known = {
        k: v for k, v in data.items() if not k.startswith(("target/", "pred/", "mid/", "loss/", "grad/", "after/"))
    }
    adamw = {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e9, "weight_decay": 0.5}  # nothing moves but by the decay
    found = bootmae.compute(with_config(known, feature_weight=0.0, adamw=adamw))
    assert found["loss/total"] == found["loss/pixel"] == pytest.approx(data["loss/pixel"], rel=1e-5)
    assert found["loss/feature"] == pytest.approx(data["loss/feature"], rel=1e-5)
    name = "blocks.0.attn.qkv.weight"
    np.testing.assert_allclose(found[f"after/{name}"], 0.95 * data[f"state/{name}"], rtol=0, atol=1e-6)
    data = golden("bootmae_amr")
    known = {name: data[name] for name in ("config", "images", "noise")}
    found = bootmae_amr.compute(with_config(known, mask_ratio="3/4", delta_r="3/20", feature_weight=0.0))
    np.testing.assert_array_equal(found["amr/mask"], data["amr/mask"])
    np.testing.assert_allclose(found["ratio"], data["ratio"], rtol=1e-5)
    assert found["amr/loss/feature"] == pytest.approx(data["amr/loss/feature"], rel=1e-5)


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in bootmae_vit_base_patch16().state_dict().items()}
    assert shapes == golden_json("bootmae_cmae_layouts")["bootmae_base"]


def test_schedules_are_the_published_ones():
    known = golden_json("bootmae_cmae_schedules")["bootmae"]
    model = tiny()
    for name, last in (("ema_base", 0.99999), ("ema_large", 0.9999)):
        method = BootMAE(model, None, last_momentum=last)
        found = {epoch: method.momentum_at(int(epoch)) for epoch in known[name]}
        assert found == {epoch: pytest.approx(value, rel=1e-9) for epoch, value in known[name].items()}
    found = {epoch: method.feature_weight(At(0, float(epoch), known["epochs"])) for epoch in known["feature_weight"]}
    assert found == {epoch: pytest.approx(value, rel=1e-9) for epoch, value in known["feature_weight"].items()}
    method.peak_lr, method.min_lr, method.warmup_epochs = known["base"], known["min_lr"], known["warmup"]
    for step, value in known["values"].items():
        at = At(int(step), int(step) / known["steps_per_epoch"], known["epochs"])
        assert method.schedule(at, 1.0, 0.05) == (pytest.approx(value, rel=1e-6), 0.05), step


def test_initial_weights_are_within_the_published_bounds():
    torch.manual_seed(0)
    model = bootmae_vit_base_patch16()
    bounds = {
        model.blocks[3].attn.qkv.weight: 0.0625,
        model.decode_blocks[0].c_attn.q.weight: 0.0768,
        model.decode_blocks[0].c_attn.kv.weight: 0.0581,
        model.decode_blocks_1[1].c_attn.kv.weight: 0.0510,
        model.lm_head.proj.weight: 0.0361,
        model.lm_head.proj.bias: 0.0361,
    }
    for weight, bound in bounds.items():
        assert weight.abs().max().item() == pytest.approx(bound, rel=5e-3 if weight.ndim > 1 else 0.5)
    assert model.mask_token.std().item() == pytest.approx(0.0108, rel=0.1)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 7, 3, 7), (2,)], ids=str)
def test_cross_attention_to_packed_memories_is_each_image_alone(lengths):
    torch.manual_seed(0)
    query = torch.randn(len(lengths), 6, 2, 8, requires_grad=True)
    memory = torch.randn(sum(lengths), 2, 2, 8, requires_grad=True)
    layout = PackedLayout.from_lengths(lengths, torch.device("cpu"))
    found = packed_cross_attention(query, memory, layout)
    expected = []
    for q, kv in zip(query, memory.split(lengths), strict=True):
        weights = torch.einsum("qhd,khd->hqk", q, kv[:, 0]).div(8**0.5).softmax(dim=-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, kv[:, 1]))
    expected = torch.stack(expected)
    torch.testing.assert_close(found, expected)
    chosen = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((x * chosen).sum(), (query, memory)) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_amr_is_each_image_alone():
    torch.manual_seed(0)
    method = BootMAE(tiny(norm_pix_loss=True), masking.create("sbam_amr", temperature=20.0))
    images, noise, at = varied_images(7)[1:], torch.rand(6, 64), At(0, 1.0, 1)

    def losses(part: slice) -> dict:
        plan = method.choose(Inputs([images[part]], noise[part]), at)
        return method(Inputs([images[part]]), plan, at)

    plan = method.choose(Inputs([images], noise), at)
    with torch.autocast("cpu", torch.bfloat16):
        latent = torch.randn(len(plan.mask.kept.slots), 24, dtype=torch.bfloat16)
        model = method.model
        positions = model.de_pos_embed[..., :24]
        assert model.decoder_input(latent, model.mask_token[..., :24], positions, plan.mask).dtype == torch.float32
    together = losses(slice(None))
    alone = [losses(slice(i, i + 1)) for i in range(6)]
    assert len({int(part["pixels"].count) for part in alone}) > 2
    parameters = [p for p in method.parameters() if p.requires_grad]
    for name in ("pixels", "features"):
        total = sum(part[name].sum for part in alone)
        torch.testing.assert_close(together[name].sum, total, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(together[name].sum, parameters, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["random", "sbam_amr"])
def test_micro_batches_make_the_same_step(strategy):
    found = []
    for parts in (1, 3):
        torch.manual_seed(0)
        method = BootMAE(tiny(), masking.create(strategy))
        images, noise = varied_images(7)[1:], torch.rand(6, 64)
        batches = [Inputs([a], b) for a, b in zip(images.tensor_split(parts), noise.tensor_split(parts), strict=True)]
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
        update = GradientStep(method, optimizer, torch.amp.GradScaler(enabled=False))
        train_step(method, batches, At(0, 0.0, 4), update, Averages(torch.device("cpu")), "none")
        found.append([p.detach().clone() for p in method.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", [["--masking", "sbam_amr"], BLOCKS], ids=["sbam_amr", "blocks"])
def test_a_run_continues_bit_for_bit(pictures, tmp_path, strategy):
    lines = run(pictures, tmp_path / "whole", *strategy)
    assert {"train_loss_pixels", "train_loss_features", "train_loss"} <= lines[-1].keys()
    with injected([{"kind": "SIGTERM", "forward": 5}]), pytest.raises(SystemExit):
        run(pictures, tmp_path / "parts", *strategy)
    run(pictures, tmp_path / "parts", *strategy)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (content(tmp_path / name)["method"] for name in ("whole", "parts"))
    assert all(name.startswith("teacher.") for name in whole)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("bootmae")
    run(pictures, output, "--masking", "sbam")
    return output / "checkpoint-last.pth"


@pytest.mark.parametrize("input_size", [16, 24])
def test_a_classifier_computes_what_the_encoder_does(trained, input_size):
    state = checkpoint.model_state(checkpoint.load(trained))
    model = models_vit.create_model("bootmae_vit_mini_patch4", num_classes=3, img_size=input_size).eval()
    model.load_state_dict(fitting.fit_classifier(model, state, (4, 4)), strict=False)
    assert not model.pos_embed.requires_grad
    images = torch.randn(2, 3, input_size, input_size)
    found = model.forward_features(images)
    assert found.shape == (2, (input_size // 4) ** 2 + 1, 96)
    if input_size == 16:
        encoder = checkpoints.open_checkpoint(trained).model
        torch.testing.assert_close(encoder.norm(found), encoder.encode(encoder.embed(images), None))
    scales = {group["lr_scale"] for group in optim.layer_decay_groups(model, 0.05, 0.6)}
    assert sorted(scales) == pytest.approx([0.6**layer for layer in range(5, -1, -1)])


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
def test_fine_tuning_and_probing(trained, tmp_path, main):
    labelled = write_pictures(tmp_path / "labelled")
    arguments = ["--data_path", labelled, "--model", "bootmae_vit_mini_patch4", "--finetune", trained, "--epochs", 1]
    arguments += ["--warmup_epochs", 0, "--batch_size", 4, "--num_workers", 0, "--output_dir", tmp_path / "out"]
    main.main([str(argument) for argument in [*arguments, "--global_pool"]])
    (line,) = log_lines(tmp_path / "out")
    assert np.isfinite(line["train_loss"])


def test_a_checkpoint_is_measured_and_drawn(trained):
    opened = checkpoints.open_checkpoint(trained, dataset="digits")
    found = measure.measure(opened, ("rank_me", "salience"), val_images=20)
    assert 1 <= found["rank_me"] <= 20
    strategies = figures.standard_strategies(opened.settings, opened.strategy, 16)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    columns = figures.columns(opened.model, pixels, opened.normalize, strategies, temperature=1.0, rebuilt="sbam_amr")
    assert columns[-1].pictures.isfinite().all()


def test_other_libraries_compute_its_features(trained, tmp_path):
    file, folder = tmp_path / "encoder.safetensors", tmp_path / "hf"
    export.main([str(trained), "--to", "timm", "--output", str(file)])
    export.main([str(trained), "--to", "hf", "--output", str(folder)])
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    form = {"num_classes": 0, "global_pool": "", "init_values": 0}
    form |= {"use_rel_pos_bias": False, "use_abs_pos_emb": True}
    images, ours = torch.randn(2, 3, 16, 16), checkpoints.open_checkpoint(trained).model
    with torch.no_grad():
        expected = ours.encode(ours.embed(images), None)
        other = timm.create_model("beit_base_patch16_224", checkpoint_path=str(file), **form, **sizes).eval()
        torch.testing.assert_close(other.forward_features(images), expected, rtol=1e-5, atol=1e-5)
        other, report = transformers.BeitModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        found = other.eval()(images).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_go_together_is_named(pictures, tmp_path, capsys):
    for more, message in (
        (["--method", "mae"], "--model bootmae_vit_mini_patch4: is no MaskedAutoencoderViT"),
        (["--decode_ratio", 0.5], "--decode_ratio 0.5: --method bootmae predicts all patches"),
        (["--masking", "am"], "--masking am: needs boxes, maps, which --method bootmae does not give"),
        (["--method_args", "momentum=2"], "momentum is 2"),
        (["--method_args", "weigh_surrounded=1"], "weigh_surrounded is 1"),
    ):
        assert message in refusal(main_pretrain.main, flags(pictures, tmp_path, *MODEL, *more), capsys)
