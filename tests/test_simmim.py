"""SimMIM: against the goldens, and everything around it that a user of the method meets."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import transformers
from faults import injected
from helpers import golden, golden_json, log_lines, refusal, varied_images, with_config, write_pictures
from reference import simmim
from runs import assert_same_run, content, flags, pretrain, stopped

import main_finetune
import main_linprobe
import main_pretrain
import masking
import models_vit
from evaluation import checkpoints, measure
from methods import At, Inputs, SimMIM
from models_simmim import SimMIMViT, simmim_vit_base_patch16, simmim_vit_mini_patch4
from scripts import export
from util import optim
from util.training import checkpoint, fitting
from util.training.averages import Averages
from util.training.step import GradientStep, train_step

GIVEN = ["--method", "simmim", "--model", "simmim_vit_mini_patch4", "--mask_ratio", 0.6, "--clip_grad", 5]
LAYOUTS = golden_json("simmim_vit_base_layouts")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=1, per_class=14)


def given(pictures, output, *more) -> list[str]:
    """The flags of `runs.flags` without `--norm_pix_loss`."""
    return [flag for flag in flags(pictures, output, *GIVEN, *more) if flag != "--norm_pix_loss"]


def run(pictures, output, *more) -> list[dict]:
    main_pretrain.main(given(pictures, output, *more))
    return log_lines(output)


def tiny(strategy=None, **options) -> SimMIMViT:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4, "drop_path_rate": 0.0}
    return SimMIMViT(**(sizes | options), masking=strategy)


def test_everything_against_the_goldens():
    data = golden("simmim_tiny")
    inputs = ("config", "images", "cell_permutation", "drop_path/keep")
    known = {k: v for k, v in data.items() if k in inputs or k.startswith("state/")}
    found = simmim.compute(known)
    assert found.keys() == data.keys() - known.keys()
    for name, value in found.items():
        expected, tolerance = data[name], 1e-4 if "grad" in name else 1e-5
        bound = 0 if expected.dtype.kind in "bi" else tolerance * max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(value, expected, rtol=0, atol=bound, err_msg=name)


def test_the_reference_takes_other_settings():
    """Without stochastic depth, the patch as a pair, other dtypes of what was drawn, and no results to read."""
    data = golden("simmim_tiny")
    known = {k: v for k, v in data.items() if k.startswith("state/") or k in ("config", "images")}
    known["cell_permutation"] = data["cell_permutation"].astype(np.int16)
    found = simmim.compute(with_config(known, drop_path_rate=0.0, patch_size=[4, 4]))
    assert found["loss"] == pytest.approx(data["loss"], rel=1e-6)
    assert [name for name in found if name.startswith("drop_path/")] == ["drop_path/rates"]
    known["drop_path/keep"] = np.ones(data["drop_path/keep"].shape)
    found = simmim.compute(with_config(known, drop_path_rate=0.0))
    assert found["drop_path/loss"] == found["loss"]
    assert found["drop_path/rates"].tolist() == [0, 0]
    assert simmim.removed_share(0.55, 100) == "56/100"  # of floats: 0.55 * 100 is a hair above 55


def their_name(name: str) -> str:
    return name if name.startswith("decoder.") else f"encoder.{name}"


def test_names_shapes_and_decay_are_the_published_ones():
    with torch.device("meta"):
        model = simmim_vit_base_patch16()
    shapes = {their_name(name): list(value.shape) for name, value in model.state_dict().items()}
    buffers = {name for name in LAYOUTS["pretrain_state_dict"] if name.endswith("relative_position_index")}
    assert shapes == {n: shape for n, shape in LAYOUTS["pretrain_state_dict"].items() if n not in buffers}
    names = {id(p): their_name(n) for n, p in model.named_parameters()}
    groups = SimMIM(model, None).parameter_groups(0.05)
    for decay, key in ((0.05, "pretrain_decay"), (0.0, "pretrain_no_decay")):
        found = {names[id(p)] for group in groups if group["weight_decay"] == decay for p in group["params"]}
        assert found == set(LAYOUTS[key])


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    state = {their_name(name): value for name, value in simmim_vit_base_patch16().state_dict().items()}
    for name, expected in LAYOUTS["pretrain_init_statistics"].items():
        if not name.endswith("relative_position_index"):
            rough = 4 / state[name].numel() ** 0.5  # of so many draws
            assert state[name].std(correction=0).item() == pytest.approx(expected["std"], rel=rough, abs=1e-7), name
            assert state[name].abs().max().item() == pytest.approx(
                max(abs(expected["min"]), abs(expected["max"])), rel=max(rough, 0.02), abs=1e-7
            ), name


def test_the_learning_rate_is_the_published_one():
    method, steps = SimMIM(tiny(), None), LAYOUTS["pretrain_lr"]["steps_per_epoch"]
    method.peak_lr, method.warmup_epochs = LAYOUTS["pretrain_adamw"]["lr"], 10
    for done, expected in LAYOUTS["pretrain_lr"]["after_step_update(t)"].items():
        step = int(done) + 1  # the rate of step n is set after step n - 1
        lr, weight_decay = method.schedule(At(step, step / steps, 800), 1.0, 0.05)
        assert lr == pytest.approx(expected, rel=1e-6), done
        assert weight_decay == 0.05
    first = method.schedule(At(0, 0.0, 800), 1.0, 0.05)[0]
    assert first == pytest.approx(LAYOUTS["pretrain_lr"]["before_first_step"])


def test_fine_tuning_groups_are_the_published_ones():
    with torch.device("meta"):
        model = models_vit.create_model("simmim_vit_base_patch16", num_classes=1000)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    expected = LAYOUTS["finetune_state_dict"]
    assert shapes == {n: s for n, s in expected.items() if not n.endswith("relative_position_index")}
    names = {id(p): n for n, p in model.named_parameters()}
    found = {
        names[id(p)]: [group["lr_scale"], group["weight_decay"]]
        for group in optim.layer_decay_groups(model, 0.05, 0.65)
        for p in group["params"]
    }
    assert found == {n: pytest.approx(values[:2]) for n, values in LAYOUTS["finetune_groups"].items()}


@pytest.mark.parametrize("cell", [1, 2])
def test_amr_is_each_image_alone(cell):
    torch.manual_seed(0)
    options = {"delta_r": 0.3, "delta": 0.3} if cell == 2 else {}
    strategy = masking.create("sbam_amr", mask_ratio=0.6, cell=cell, rounding="removed", **options)
    model, images, noise = tiny(strategy), varied_images(7)[1:] * 3, torch.rand(6, 64)
    loss, pred, mask = model(images, noise)
    assert len(set(mask.sum(dim=1).tolist())) > 1
    total = 0.0
    for i in range(6):
        alone, alone_pred, alone_mask = model(images[i : i + 1], noise[i : i + 1])
        assert torch.equal(alone_mask[0], mask[i])
        torch.testing.assert_close(alone_pred[0], pred[i], rtol=1e-5, atol=1e-5)
        total = total + alone * alone_mask.sum()
    expected = total / mask.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_removed_patches_cannot_be_seen():
    model, images = tiny(masking.create("random", mask_ratio=0.5)), varied_images(3)
    mask = model.choose_mask(images, torch.rand(3, 64))
    other = model.unpatchify(torch.where(mask.mask[..., None], torch.randn(3, 64, 48), model.patchify(images)))
    torch.testing.assert_close(model.encode(model.embed(images), mask), model.encode(model.embed(other), mask))


def test_micro_batches_make_the_same_step():
    gradients = []
    for parts in (1, 3):
        torch.manual_seed(0)
        method = SimMIM(tiny(), masking.create("sbam_amr", mask_ratio=0.6))
        images, noise = varied_images(7)[1:], torch.rand(6, 64)
        batches = [Inputs([a], b) for a, b in zip(images.tensor_split(parts), noise.tensor_split(parts), strict=True)]
        optimizer = torch.optim.SGD(method.parameters(), 0.1)
        update = GradientStep(method, optimizer, torch.amp.GradScaler(enabled=False))
        train_step(method, batches, At(0, 0.0, 4), update, Averages(torch.device("cpu")), "none")
        gradients.append([p.detach().clone() for p in method.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["random", "sbam_amr", "block"])
def test_a_run_continues_bit_for_bit(pictures, tmp_path, strategy):
    """Stochastic depth included."""
    run(pictures, tmp_path / "whole", "--masking", strategy)
    with injected([{"kind": "SIGTERM", "forward": 5}]), pytest.raises(SystemExit):
        run(pictures, tmp_path / "parts", "--masking", strategy)
    run(pictures, tmp_path / "parts", "--masking", strategy)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_stochastic_depth_compiles_without_a_graph_for_each_rate():
    """Twelve blocks have twelve rates; after eight graphs of a function torch gives up."""
    images, noise, losses = varied_images(3), torch.rand(3, 64), []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = tiny(depth=12, drop_path_rate=0.5).train()
        if compiled:
            model.compile_blocks(backend="aot_eager")
        torch.manual_seed(1)
        losses.append(model(images, noise)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert losses[0] != model.eval()(images, noise)[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("simmim")
    run(pictures, output, "--masking", "sbam", "--masking_args", "cell=2", "rounding=removed")
    return output / "checkpoint-last.pth"


@pytest.mark.parametrize("input_size", [16, 24])
def test_a_classifier_computes_what_the_encoder_does(trained, input_size):
    state = checkpoint.model_state(checkpoint.load(trained))
    model = models_vit.create_model("simmim_vit_mini_patch4", num_classes=3, img_size=input_size).eval()
    fitted = fitting.fit_classifier(model, state, (4, 4))
    model.load_state_dict(fitted, strict=False)
    images = torch.randn(2, 3, input_size, input_size)
    found = model.forward_features(images)
    assert found.shape == (2, (input_size // 4) ** 2 + 1, 96)
    if input_size == 16:
        encoder = checkpoints.open_checkpoint(trained).model
        torch.testing.assert_close(encoder.norm(found), encoder.encode(encoder.embed(images), None))


@pytest.mark.parametrize(("old", "new"), [((2, 4), (4, 4)), ((4, 2), (2, 4)), ((4, 4), (2, 4)), ((4, 4), (8, 8))])
def test_position_biases_are_resized_from_any_grid(old, new):
    """The table as an image (heads, rows, columns), and three numbers for the class token, which stay."""
    source = simmim_vit_mini_patch4(img_size=(4 * old[0], 4 * old[1]))
    table = torch.randn_like(source.rel_pos_bias.relative_position_bias_table)
    state = source.state_dict() | {"rel_pos_bias.relative_position_bias_table": table}
    model = models_vit.create_model("simmim_vit_mini_patch4", num_classes=2, img_size=(4 * new[0], 4 * new[1]))
    found = fitting.fit_classifier(model, state, old)["blocks.3.attn.relative_position_bias_table"]
    heads, sides, target = table.shape[1], [2 * side - 1 for side in old], [2 * side - 1 for side in new]
    image = timm.layers.resize_rel_pos_bias_table(table[:-3].T.reshape(heads, *sides), new, (heads, *target))
    torch.testing.assert_close(found, torch.cat([image.flatten(1).T, table[-3:]]))


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
def test_fine_tuning_and_probing(trained, tmp_path, main):
    labelled = write_pictures(tmp_path / "labelled", classes=2, per_class=6)
    arguments = ["--data_path", labelled, "--model", "simmim_vit_mini_patch4", "--finetune", trained, "--epochs", 1]
    arguments += ["--warmup_epochs", 0, "--batch_size", 4, "--num_workers", 0, "--output_dir", tmp_path / "out"]
    main.main([str(argument) for argument in [*arguments, "--global_pool"]])
    (line,) = log_lines(tmp_path / "out")
    assert np.isfinite(line["train_loss"])


def test_features_of_a_checkpoint_are_measured(trained):
    opened = checkpoints.open_checkpoint(trained, dataset="digits")
    found = measure.measure(opened, ("rank_me", "salience"), val_images=20)
    assert 1 <= found["rank_me"] <= 20
    assert found["mask_ratio"] == 0.75  # three of four cells, rounded up


def test_other_libraries_compute_its_features(trained, tmp_path):
    file, folder = tmp_path / "encoder.safetensors", tmp_path / "hf"
    export.main([str(trained), "--to", "timm", "--output", str(file)])
    export.main([str(trained), "--to", "hf", "--output", str(folder)])
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    form = {"num_classes": 0, "global_pool": "", "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    images, ours = torch.randn(2, 3, 16, 16), checkpoints.open_checkpoint(trained).model
    with torch.no_grad():
        expected = ours.encode(ours.embed(images), None)
        other = timm.create_model("beit_base_patch16_224", checkpoint_path=str(file), **form, **sizes).eval()
        torch.testing.assert_close(other.forward_features(images), expected, rtol=1e-5, atol=1e-5)
        other, report = transformers.BeitModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        found = other.eval()(images).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [["--blrs", 0.1, 0.2], ["--append_mean", "--probe_blocks", 2]], ids=["heads", "mean"])
def test_a_probe_whose_head_no_other_library_has_is_exported_as_an_encoder(trained, tmp_path, more):
    labelled = write_pictures(tmp_path / "labelled", classes=2, per_class=6)
    arguments = ["--data_path", labelled, "--model", "simmim_vit_mini_patch4", "--finetune", trained, "--epochs", 1]
    arguments += ["--warmup_epochs", 0, "--batch_size", 4, "--num_workers", 0, "--output_dir", tmp_path, *more]
    main_linprobe.main([str(argument) for argument in arguments])
    probe, blocks = tmp_path / checkpoint.LAST, 2 if "--probe_blocks" in more else 4
    for target, place in (("timm", "timm.safetensors"), ("hf", "hf"), ("safetensors", "all.safetensors")):
        export.main([str(probe), "--to", target, "--output", str(tmp_path / place)])
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": blocks, "num_heads": 3}
    file, form = str(tmp_path / "timm.safetensors"), {"num_classes": 0, "global_pool": ""}
    other = timm.create_model("beit_base_patch16_224", checkpoint_path=file, **form, **sizes).eval()
    theirs, report = transformers.BeitModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    images, ours = torch.randn(2, 3, 16, 16), checkpoints.open_checkpoint(probe).model
    with torch.no_grad():
        expected = ours.encode(ours.embed(images), None)
        torch.testing.assert_close(other.forward_features(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.eval()(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_go_together_is_named(pictures, tmp_path, capsys):
    for more, message in (
        (["--method", "mae"], "--model simmim_vit_mini_patch4: is no MaskedAutoencoderViT, which --method mae trains"),
        (["--model", "mae_vit_mini_patch4"], "--model mae_vit_mini_patch4: is no SimMIMViT, which --method simmim"),
        (["--decode_ratio", 0.5], "--decode_ratio 0.5: --method simmim predicts all patches"),
        (
            ["--masking", "amt", "--mask_ratio", 0.85],
            "--masking amt: needs boxes, maps, which --method simmim does not",
        ),
        (["--min_lr", 1e-5], "--min_lr 1e-05: the schedule of --method simmim ends at decay_rate times the peak"),
        (["--norm_pix_loss"], "norm_pix_loss: SimMIM predicts the pixels themselves"),
    ):
        arguments = [*given(pictures, tmp_path, *more), *(["--norm_pix_loss"] if "--norm_pix_loss" in more else [])]
        assert message in refusal(main_pretrain.main, arguments, capsys)


def test_a_checkpoint_of_another_method_is_refused(pictures, trained, tmp_path, capsys):
    pretrain(pictures, tmp_path / "mae", "--epochs", 1)
    said = refusal(main_pretrain.main, given(pictures, tmp_path / "mae"), capsys)
    assert "another architecture than --model" in said or "method" in said
    assert content(tmp_path / "mae")["args"]["method"] == "mae"
    assert stopped


def test_predictions_and_loss_are_those_of_hugging_face():
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, encoder_stride=4, hidden_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    theirs = transformers.ViTForMaskedImageModeling(config).eval()
    ours = SimMIMViT(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2)
    ours.decoder[0].load_state_dict(theirs.decoder[0].state_dict())
    images, mask = torch.randn(3, 3, 16, 16), masking.create("random", mask_ratio=0.6)(torch.zeros(3, 16, 24))
    with torch.no_grad():
        found = theirs(images, bool_masked_pos=mask.mask)
        hidden = theirs.vit(images, bool_masked_pos=mask.mask).last_hidden_state
        pred = ours.forward_decoder(hidden)
        torch.testing.assert_close(ours.unpatchify(pred), found.reconstruction, rtol=1e-5, atol=1e-6)
        loss = ours.absolute_errors(images, pred, mask).sum() / mask.loss_weight.sum()
    torch.testing.assert_close(loss, found.loss, rtol=1e-5, atol=1e-6)
