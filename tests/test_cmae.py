"""CMAE: against the goldens, also under AMR, over processes, its views, and runs that continue."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from faults import injected
from helpers import golden, golden_json, log_lines, refusal, tiny_mae, varied_images, with_config, write_pictures
from reference import cmae, cmae_amr
from runs import assert_same_run, content, flags

import main_finetune
import main_pretrain
import masking
from methods import CMAE, At, Inputs
from methods.cmae import ShiftedViews
from methods.heads import GlobalBatchNorm

GIVEN = ["--method", "cmae", "--method_args", "feature_depth=1", "hidden_dim=24", "proj_dim=12", "shift=4"]
ZERO = ("feature_decoder.ln1.bias", "decoder_pred.bias", "projector.fc0.bias", "predictor.fc0.bias", "attn.qkv.bias")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=1, per_class=14)


@pytest.mark.parametrize(
    ("name", "reference", "inputs"),
    [
        ("cmae_tiny", cmae, ("config", "images", "images_target", "mask/noise")),
        ("cmae_amr", cmae_amr, ("config", "images", "images_target", "noise")),
    ],
)
def test_everything_against_the_goldens(name, reference, inputs):
    """Gradients that are zero in exact arithmetic are rounding noise, and so is what AdamW makes of them."""
    data = golden(name)
    given = {k: v for k, v in data.items() if k in inputs or k.startswith("state/")}
    found = reference.compute(given)
    any_order = {key for key in data if key == "mask/ids_restore" or key.startswith("mid/online/block")}
    any_order |= {"mid/online/input", "mid/online/latent"} & data.keys()
    expected = data.keys() - given.keys() - any_order
    assert found.keys() >= expected
    for key in expected:
        value, known = found[key], data[key]
        if known.dtype.kind in "biu":
            np.testing.assert_array_equal(value, known, err_msg=key)
        elif not (key.endswith(ZERO) and key.startswith(("after/", "ema_after/"))):
            floor = 1e-5 / 2e-4 if key.endswith(ZERO) else 1e-3
            bound = (2e-4 if "grad" in key or "after" in key else 1e-5) * max(np.abs(known).max(), floor)
            np.testing.assert_allclose(value, known, rtol=0, atol=bound, err_msg=key)


def test_the_reference_takes_other_settings():
    """No weight of either loss, cells of one patch, images in float64."""
    data = golden("cmae_tiny")
    known = {k: v for k, v in data.items() if k.startswith("state/")}
    known |= {k: data[k].astype(np.float64) for k in ("images", "images_target")}
    known |= {"config": data["config"], "mask/noise": np.random.default_rng(0).random((4, 64))}
    found = cmae.compute(with_config(known, rc_weight=0.0, ct_weight=0.0, cells=64, keep_cells=20))
    assert found["mask/mask"].tolist() == (known["mask/noise"].argsort(1).argsort(1) >= 20).astype(int).tolist()
    assert found["loss/total"] == found["loss/contrastive"] == 0
    errors = np.square(found["pred/pixel"] - found["target/pixel"]).mean(axis=-1)
    assert found["loss/pixel"] == pytest.approx(errors[found["mask/mask"] == 1].mean(), rel=1e-5)
    of_its_own = np.diag(found["mid/logits"]) - np.log(np.exp(found["mid/logits"]).sum(axis=1))
    assert found["loss/cross_entropy"] == pytest.approx(-of_its_own.mean(), rel=1e-5)
    data = golden("cmae_amr")
    known = {k: data[k] for k in ("config", "images", "images_target")} | {"noise": known["mask/noise"]}
    found = cmae_amr.compute(with_config(known, unit="1 token", delta_r="3/20"))
    assert found["sbam/num_keep_cells"].tolist() == [20] * 4  # 5/16 of 64
    assert found["amr/num_keep_cells"].tolist() == (found["amr/mask"] == 0).sum(axis=1).tolist()
    np.testing.assert_array_equal(found["cell_salience"], found["salience"])


def test_the_feature_decoder_may_be_deeper_than_the_pixels():
    method = CMAE(tiny_mae(decoder_depth=1), masking.create("random"), feature_depth=3)
    assert len(method.feature_decoder.decoder_blocks) == 3
    weights = [block.mlp.fc1.weight for block in (*method.model.decoder_blocks, *method.feature_decoder.decoder_blocks)]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    inputs = Inputs([varied_images(3), varied_images(3)], torch.rand(3, 64))
    at = At(0, 0.0, 1)
    sum(loss.sum for loss in method(inputs, method.choose(inputs, at), at).values()).backward()
    assert all(block.mlp.fc1.weight.grad is not None for block in method.feature_decoder.decoder_blocks)


def test_the_learning_rate_is_the_published_one():
    known = golden_json("bootmae_cmae_schedules")["cmae"]
    method = CMAE(tiny_mae(), None)
    method.peak_lr, method.warmup_epochs = known["base"], known["warmup_epochs"]
    for epochs, rates in known["lr"].items():
        for step, value in rates.items():
            at = At(int(step), int(step) / known["iterations_per_epoch"], int(epochs))
            assert method.schedule(at, 1.0, 0.05)[0] == pytest.approx(value, rel=1e-6, abs=1e-12), step


def test_what_is_decayed_is_the_published_one():
    method = CMAE(tiny_mae(), None)
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, bare = ([names[id(p)] for p in group["params"]] for group in method.parameter_groups(0.05))
    assert {"projector.bn0.weight", "predictor.fc0.weight", "feature_decoder.decoder_pred.weight"} <= set(decayed)
    assert {"model.mask_token", "feature_decoder.mask_token", "projector.bn0.bias", "model.norm.weight"} <= set(bare)
    assert not any(name.startswith("teacher.") for name in (*decayed, *bare))


def test_batch_normalisation_is_torchs_in_one_process():
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(6, eps=1e-6), torch.nn.BatchNorm1d(6, eps=1e-6)
    for training in (True, True, False):
        x = torch.randn(5, 6, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        found, expected = ours.train(training)(x), theirs.train(training)(y)
        torch.testing.assert_close(found, expected)
        chosen = torch.randn_like(found)
        (found * chosen).sum().backward()
        (expected * chosen).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_views_are_of_one_crop_and_follow_from_the_seed():
    ramp = torch.arange(120)[:, None, None] + torch.arange(160)[None, :, None]
    pixels = ramp.expand(-1, -1, 3).clamp(max=255).to(torch.uint8)
    views = ShiftedViews((32, 48), (1.0, 1.0), 0.0, 8)
    views.colours = lambda image: image
    torch.manual_seed(0)
    first, second = views(pixels)
    assert first.shape == second.shape == (3, 32, 48)
    assert first.dtype == torch.uint8
    shift = (second.float() - first.float())[:, 4:-4, 4:-4].mean()
    assert shift >= 0  # the ramp grows to the right and down, where the second view lies
    torch.manual_seed(0)
    again = ShiftedViews((32, 48), (0.2, 1.0), 0.5, 8)(pixels)
    torch.manual_seed(0)
    assert all(map(torch.equal, again, ShiftedViews((32, 48), (0.2, 1.0), 0.5, 8)(pixels)))


def test_autocast_does_not_round_the_logits(monkeypatch):
    """Their differences, over a temperature of 0.07, are what the contrast is made of."""
    torch.manual_seed(0)
    method = CMAE(tiny_mae(norm_pix_loss=True), masking.create("random"), hidden_dim=16)
    images, noise, at = varied_images(4), torch.rand(4, 64), At(0, 0.0, 1)
    plan = method.choose(Inputs([images, images.flip(3)], noise), at)
    entropy, seen = torch.nn.functional.cross_entropy, []
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda x, *rest, **how: seen.append(x) or entropy(x, *rest, **how)
    )
    with torch.autocast("cpu", torch.bfloat16):
        method(Inputs([images]), plan, at)
    assert [logits.dtype for logits in seen] == [torch.float32]


def test_amr_changes_nothing_but_the_mask():
    """The contrast sees the whole batch, in one packed pass or image by image."""
    torch.manual_seed(0)
    method = CMAE(tiny_mae(norm_pix_loss=True), masking.create("sbam_amr", temperature=20.0, cell=2), hidden_dim=16)
    images, noise, at = varied_images(7)[1:], torch.rand(6, 64), At(0, 0.0, 1)
    plan = method.choose(Inputs([images, images.flip(3)], noise), at)
    assert len(set(plan.mask.num_keep.tolist())) > 1
    latent = method.model.forward_encoder(images, plan.mask)
    together = method.feature_decoder(method.model, latent, plan.mask)
    for i in range(6):
        alone = masking.mask_from_scores(plan.mask.ids_restore[i : i + 1].float(), int(plan.mask.num_keep[i]))
        latent = method.model.forward_encoder(images[i : i + 1], alone)
        features = method.feature_decoder(method.model, latent, alone)
        torch.testing.assert_close(features[0], together[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [["sbam_amr"], ["random", "--masking_args", "cell=2"]], ids=["amr", "cells"])
def test_a_run_continues_bit_for_bit(pictures, tmp_path, strategy):
    given = [*GIVEN, "--masking", *strategy]
    main_pretrain.main(flags(pictures, tmp_path / "whole", *given))
    assert {"train_loss_pixels", "train_loss_contrast"} <= log_lines(tmp_path / "whole")[-1].keys()
    with injected([{"kind": "SIGTERM", "forward": 5}]), pytest.raises(SystemExit):
        main_pretrain.main(flags(pictures, tmp_path / "parts", *given))
    main_pretrain.main(flags(pictures, tmp_path / "parts", *given))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (content(tmp_path / name)["method"] for name in ("whole", "parts"))
    assert {"teacher.projector.bn0.running_var", "predictor.fc1.weight"} <= whole.keys()
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_its_model_is_fine_tuned_as_maes(pictures, tmp_path):
    main_pretrain.main(flags(pictures, tmp_path / "cmae", *GIVEN, "--epochs", 1))
    labelled = write_pictures(tmp_path / "labelled")
    arguments = ["--data_path", labelled, "--model", "vit_mini_patch4", "--epochs", 1, "--warmup_epochs", 0]
    arguments += ["--batch_size", 4, "--num_workers", 0, "--output_dir", tmp_path / "out"]
    arguments += ["--finetune", tmp_path / "cmae" / "checkpoint-last.pth"]
    main_finetune.main([str(argument) for argument in arguments])
    assert np.isfinite(log_lines(tmp_path / "out")[0]["train_loss"])


def test_what_does_not_go_together_is_named(pictures, tmp_path, capsys):
    for more, message in (
        (
            ["--accum_iter", 2],
            "--method cmae: its negatives are the images of one step, so steps cannot be accumulated",
        ),
        (["--in_chans", 1], "--in_chans 1: --method cmae changes colours, and needs 3 channels"),
        (["--decode_ratio", 0.5], "--decode_ratio 0.5: --method cmae predicts all patches"),
        (["--exact_resize"], "--exact_resize: --method cmae cuts views of its own"),
        (["--masking", "am"], "--masking am: needs boxes, maps, which --method cmae does not give"),
        (["--method_args", "feature_depth=0"], "feature_depth is 0; it must be a whole number of at least 1"),
        (["--method_args", "temperature=0"], "temperature is 0"),
    ):
        assert message in refusal(main_pretrain.main, flags(pictures, tmp_path, *GIVEN, *more), capsys)
