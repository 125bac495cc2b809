"""Opening checkpoints of every kind, and the commands that look at them."""

from __future__ import annotations

import argparse
import json
import runpy

import pytest
import torch
from helpers import ROOT, write_pictures

import inspection
import main_pretrain
import models_mae
import models_vit
from util import checkpoint, datasets
from util.config import PretrainSettings


def script(name: str):
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name=name)["main"]


def pretrained(path, **settings):
    found = PretrainSettings(model="mae_vit_mini_patch4", **settings)
    torch.manual_seed(1)
    model = main_pretrain.build_model(found)
    grid = list(model.patch_embed.grid_size)
    checkpoint.save(path, {"model": model.state_dict(), "args": found.as_dict(), "grid": grid})
    return model


def test_a_checkpoint_of_pretraining_tells_everything(tmp_path):
    model = pretrained(tmp_path / "a.pth", input_size=[16, 24], in_chans=1, masking="sbam", mask_ratio=0.6)
    opened = inspection.open_checkpoint(tmp_path / "a.pth")
    assert opened.size == (16, 24)
    assert opened.strategy.mask_ratio == 0.6
    assert opened.has_decoder
    images = torch.randn(2, 1, 16, 24)
    torch.testing.assert_close(opened.model.embed(images), model.embed(images))
    assert inspection.open_checkpoint(tmp_path / "a.pth", mask_ratio=0.5).strategy.mask_ratio == 0.5


def test_a_published_layout_with_a_namespace_and_bare_weights(tmp_path):
    state = main_pretrain.build_model(PretrainSettings(model="mae_vit_mini_patch4")).state_dict()
    args = argparse.Namespace(
        model="mae_vit_mini_patch4", input_size=16, norm_pix_loss=True, lr=None, dist_url="env://"
    )
    torch.save({"model": state, "args": args}, tmp_path / "published.pth")
    assert inspection.open_checkpoint(tmp_path / "published.pth").model.norm_pix_loss
    torch.save(state, tmp_path / "bare.pth")
    opened = inspection.open_checkpoint(tmp_path / "bare.pth")
    assert (opened.settings.model, opened.size) == ("mae_vit_mini_patch4", (16, 16))
    torch.save({name: state[name] for name in state if "blocks.3" not in name}, tmp_path / "shallow.pth")
    with pytest.raises(ValueError, match=r"no architecture here has width 96 and 3 blocks; name one with --model"):
        inspection.open_checkpoint(tmp_path / "shallow.pth")
    with pytest.raises(ValueError, match=r"not the architecture mae_vit_tiny_patch4"):
        inspection.open_checkpoint(tmp_path / "bare.pth", model="mae_vit_tiny_patch4")


@pytest.mark.parametrize("global_pool", [True, False])
def test_a_classifier_has_an_encoder_without_decoder(tmp_path, global_pool):
    model = models_vit.create_model("vit_mini_patch4", num_classes=3, global_pool=global_pool).eval()
    checkpoint.save(tmp_path / "c.pth", {"model": model.state_dict(), "args": {"model": "vit_mini_patch4"}})
    opened = inspection.open_checkpoint(tmp_path / "c.pth")
    assert not opened.has_decoder
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = opened.model.encode(opened.model.embed(images), None)
        torch.testing.assert_close(tokens, model.forward_features(images), rtol=1e-5, atol=1e-5)


def test_measuring_an_untrained_model_on_the_digits():
    opened = inspection.untrained("mae_vit_mini_patch4", dataset="digits", in_chans=1, input_size=[16])
    metrics = ("knn", "rank_me", "salience", "linear", "attentive")
    found = inspection.measure(opened, metrics, train_images=200, val_images=50)
    assert (found["train_images"], found["val_images"]) == (200, 50)
    assert all(15 < found[name] <= 100 for name in ("knn", "linear", "attentive"))
    assert sum(found["mask_ratio_histogram"]) == 50
    again = inspection.measure(opened, ("knn", "linear"), train_images=200, val_images=50)
    assert (again["knn"], again["linear"]) == (found["knn"], found["linear"])


def test_features_of_picture_files(tmp_path):
    folder = write_pictures(tmp_path) / "train" / "class0"
    opened = inspection.untrained("mae_vit_mini_patch4")
    files = sorted(folder.iterdir())[:3]
    together = inspection.image_features(opened, files)
    assert together.shape == (3, 96)
    torch.testing.assert_close(inspection.image_features(opened, files[1:2])[0], together[1], rtol=1e-5, atol=1e-5)


def test_evaluate_writes_what_it_says(tmp_path, capsys):
    pretrained(tmp_path / "a.pth", dataset="digits", in_chans=1)
    flags = ["--metrics", "knn", "--train_images", "100", "--val_images", "40"]
    script("evaluate")([str(tmp_path / "a.pth"), *flags, "--output", str(tmp_path / "r" / "result.json")])
    found = json.loads((tmp_path / "r" / "result.json").read_text())
    assert f"{found['knn']:.4f}" in capsys.readouterr().out
    assert found["val_images"] == 40


def test_visualize_draws_checkpoints_and_untrained_models(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures")
    pretrained(tmp_path / "a.pth", norm_pix_loss=True)
    main, picture = script("visualize"), str(tmp_path / "masks.png")
    main([str(tmp_path / "a.pth"), str(folder / "val"), "--rows", "2", "--output", picture])
    assert (tmp_path / "masks.png").stat().st_size > 20_000
    model = models_vit.create_model("vit_mini_patch4", num_classes=3)
    checkpoint.save(tmp_path / "c.pth", {"model": model.state_dict(), "args": {"model": "vit_mini_patch4"}})
    main([str(tmp_path / "c.pth"), str(folder / "val" / "class0" / "0.jpg"), "--output", picture])
    assert "no decoder" in capsys.readouterr().out
    main(["--model", "mae_vit_mini_patch4", str(folder / "val"), "--rows", "1", "--output", str(tmp_path / "m.pdf")])
    assert "untrained" in capsys.readouterr().out
    assert (tmp_path / "m.pdf").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("visualize", ["none.pth", "x.jpg"], "none.pth: there is no such checkpoint"),
        ("visualize", ["x.jpg"], "name one first, or an untrained --model"),
        ("visualize", ["x.jpg", "--model", "mae_vit_mini_patch4"], "x.jpg: there is no such picture or folder"),
        ("visualize", ["x.jpg", "--output", "x.gif"], "must end in .png or .pdf"),
        ("visualize", ["x.jpg", "--model", "mae_vit_min"], "did you mean 'mae_vit_mini_patch4'?"),
        ("evaluate", [], "name a CHECKPOINT, or an untrained --model"),
        ("evaluate", ["--model", "mae_vit_mini_patch4", "--data_path", "/nowhere"], "there is no such folder"),
        ("sweep", ["none.yaml"], "none.yaml: cannot be read as YAML"),
        ("plot", ["none.csv"], "none.csv: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(name, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script(name)(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, capsys):
    (tmp_path / "broken.jpg").write_text("no picture")
    with pytest.raises(SystemExit):
        script("visualize")([str(tmp_path / "broken.jpg"), "--model", "mae_vit_mini_patch4"])
    assert "broken.jpg: cannot be decoded" in capsys.readouterr().err


def test_labels_are_needed_for_probes(tmp_path):
    folder = write_pictures(tmp_path, classes=1) / "train" / "class0"
    opened = inspection.untrained("mae_vit_mini_patch4", data_path=str(folder))
    assert set(inspection.measure(opened, ("rank_me",))) == {"train_images", "val_images", "rank_me"}
    with pytest.raises(ValueError, match="--metrics knn linear: need labels"):
        inspection.measure(opened, ("knn", "rank_me", "linear"))


def test_the_cache_of_tokens_has_a_limit(monkeypatch):
    monkeypatch.setattr(inspection, "CACHE_GB", 1e-6)
    opened = inspection.untrained("mae_vit_mini_patch4", dataset="digits", in_chans=1)
    with pytest.raises(ValueError, match="lower --train_images"):
        inspection.measure(opened, ("attentive",))
    assert len(datasets.open_labelled("digits", None, "val", 1)) == 359


def test_the_training_s_number_of_processes_does_not_matter_to_who_looks():
    state = models_mae.create_model("mae_vit_mini_patch4", in_chans=1).state_dict()
    args = {"model": "mae_vit_mini_patch4", "batch_size": 12, "accum_iter": 2, "effective_batch_size": 48}
    assert inspection.settings_of({"args": args}, state, "x.pth", {}).model == "mae_vit_mini_patch4"
