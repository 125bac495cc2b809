"""Opening checkpoints of every kind, and the commands that look at them."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, write_pictures

import main_finetune
import main_linprobe
import models_mae
import models_vit
from evaluation import checkpoints, drawing, features, figures, measure, monitor
from methods import base
from util.config import PretrainSettings
from util.data import datasets, transforms
from util.training import checkpoint

DIGITS = ["--model", "mae_vit_mini_patch4", "--dataset", "digits", "--in_chans", "1"]


def script(name: str):
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name=name)["main"]


def pretrained(path, **settings):
    found = PretrainSettings(model="mae_vit_mini_patch4", **settings)
    torch.manual_seed(1)
    model = base.build_model(found)
    grid = list(model.patch_embed.grid_size)
    checkpoint.save(path, {"model": model.state_dict(), "args": found.as_dict(), "grid": grid})
    return model


CLASSIFIERS = {"mae": "vit_mini_patch4", "ibot": "vit_mini_patch4"}  # of the other methods: the model's own name


@pytest.mark.parametrize("pool", ["--cls_token", "--global_pool"])
@pytest.mark.parametrize("main", [main_finetune, main_linprobe], ids=lambda main: main.__name__)
@pytest.mark.parametrize("method", ["mae", "simmim", "bootmae", "ibot"])
def test_a_classifier_of_every_method_is_measured(pictures, tmp_path, method, main, pool):
    """Its features are those that its own head gets."""
    settings = PretrainSettings(model=f"{method}_vit_mini_patch4", dataset="digits")
    torch.manual_seed(1)
    state = {
        name: value + 0.1 * torch.randn_like(value) for name, value in base.build_model(settings).state_dict().items()
    }
    checkpoint.save(tmp_path / "encoder.pth", {"model": state, "args": settings.as_dict(), "grid": [4, 4]})
    name = CLASSIFIERS.get(method, settings.model)
    given = ["--data_path", pictures, "--model", name, "--finetune", tmp_path / "encoder.pth", pool, "--epochs", 1]
    given += ["--warmup_epochs", 0, "--batch_size", 16, "--num_workers", 0, "--output_dir", tmp_path / "run"]
    main.main([str(value) for value in given])
    path, images = tmp_path / "run" / checkpoint.LAST, torch.randn(3, 3, 16, 16)

    classifier = models_vit.create_model(name, num_classes=2, global_pool=pool == "--global_pool").eval()
    classifier.load_state_dict(checkpoints.encoder_names(checkpoint.load(path)["model"]), strict=False)
    with torch.no_grad():
        tokens = classifier.forward_features(images)
    opened = checkpoints.open_checkpoint(path)
    for kind, expected in (("tokens", tokens[:, 1:]), ("cls", tokens[:, 0])):
        found = features.encode_images(opened.model, images, kind)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    measured = [str(path), "--dataset", "digits", "--metrics", "knn"]
    script("evaluate")([*measured, "--output", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["knn"] > 20


def test_a_checkpoint_of_pretraining_tells_everything(tmp_path):
    model = pretrained(tmp_path / "a.pth", input_size=[16, 24], in_chans=1, masking="sbam", mask_ratio=0.6)
    opened = checkpoints.open_checkpoint(tmp_path / "a.pth")
    assert opened.size == (16, 24)
    assert float(opened.strategy.mask_ratio) == 0.6
    assert opened.has_decoder
    images = torch.randn(2, 1, 16, 24)
    torch.testing.assert_close(opened.model.embed(images), model.embed(images))
    assert checkpoints.open_checkpoint(tmp_path / "a.pth", mask_ratio=0.5).strategy.mask_ratio == 0.5


def test_a_published_layout_with_a_namespace_and_bare_weights(tmp_path):
    state = base.build_model(PretrainSettings(model="mae_vit_mini_patch4")).state_dict()
    args = argparse.Namespace(
        model="mae_vit_mini_patch4", input_size=16, norm_pix_loss=True, lr=None, dist_url="env://"
    )
    torch.save({"model": state, "args": args}, tmp_path / "published.pth")
    assert checkpoints.open_checkpoint(tmp_path / "published.pth").model.norm_pix_loss
    torch.save(state, tmp_path / "bare.pth")
    opened = checkpoints.open_checkpoint(tmp_path / "bare.pth")
    assert (opened.settings.model, opened.size) == ("mae_vit_mini_patch4", (16, 16))
    torch.save({name: state[name] for name in state if "blocks.3" not in name}, tmp_path / "shallow.pth")
    with pytest.raises(ValueError, match=r"no architecture here has width 96 and 3 blocks; name one with --model"):
        checkpoints.open_checkpoint(tmp_path / "shallow.pth")
    with pytest.raises(ValueError, match=r"not the architecture mae_vit_tiny_patch4"):
        checkpoints.open_checkpoint(tmp_path / "bare.pth", model="mae_vit_tiny_patch4")


@pytest.mark.parametrize("global_pool", [True, False])
def test_a_classifier_has_an_encoder_without_decoder(tmp_path, global_pool):
    model = models_vit.create_model("vit_mini_patch4", num_classes=3, global_pool=global_pool).eval()
    checkpoint.save(tmp_path / "c.pth", {"model": model.state_dict(), "args": {"model": "vit_mini_patch4"}})
    opened = checkpoints.open_checkpoint(tmp_path / "c.pth")
    assert not opened.has_decoder
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = opened.model.encode(opened.model.embed(images), None)
        torch.testing.assert_close(tokens, model.forward_features(images), rtol=1e-5, atol=1e-5)


def test_measuring_an_untrained_model_on_the_digits():
    opened = checkpoints.untrained("mae_vit_mini_patch4", dataset="digits", in_chans=1, input_size=[16])
    metrics = ("knn", "rank_me", "salience", "linear", "attentive")
    found = measure.measure(opened, metrics, train_images=200, val_images=50)
    assert (found["train_images"], found["val_images"]) == (200, 50)
    assert all(15 < found[name] <= 100 for name in ("knn", "linear", "attentive"))
    assert sum(found["mask_ratio_histogram"]) == 50
    again = measure.measure(opened, ("knn", "linear"), train_images=200, val_images=50)
    assert (again["knn"], again["linear"]) == (found["knn"], found["linear"])


STARTS = """
import os, runpy, sys
import timm  # once, with torch: they take seconds
for script in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.argv = [script, "--help"]
        runpy.run_path(script, run_name="__main__")
        sys.exit("did not end")
    assert os.waitpid(child, 0)[1] == 0, script
"""


def test_a_script_starts_from_any_folder(tmp_path):
    scripts = [str(ROOT / "scripts" / f"{name}.py") for name in ("evaluate", "export", "visualize")]
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", STARTS, *scripts]
    found = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_features_of_picture_files(tmp_path):
    folder = write_pictures(tmp_path) / "train" / "class0"
    opened = checkpoints.untrained("mae_vit_mini_patch4")
    files = sorted(folder.iterdir())[:3]
    together = measure.image_features(opened, files)
    assert together.shape == (3, 96)
    torch.testing.assert_close(measure.image_features(opened, files[1:2])[0], together[1], rtol=1e-5, atol=1e-5)


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
        ("visualize", [], "no checkpoint (.pth) is named; name one first, or an untrained --model"),
        ("visualize", ["x.jpg", "--rows", "0"], "--rows 0: must be at least 1"),
        ("visualize", ["x.jpg", "--rows", "-1"], "--rows -1: must be at least 1"),
        ("visualize", ["x.jpg", "--crop_pct", "0"], "--crop_pct 0.0: must be above 0 and at most 1"),
        ("visualize", ["x.jpg", "--crop_pct", "-1"], "--crop_pct -1.0: must be above 0 and at most 1"),
        ("visualize", ["--input_size", "x.jpg"], "--input_size x.jpg: give one side or height and width"),
        ("evaluate", ["--model", "mae_vit_mini_patch4", "--output", "tests"], "--output tests: is a folder"),
        ("evaluate", ["none.pth", "--output", "/proc/none/r.json"], "--output /proc/none/r.json: cannot be written"),
        ("evaluate", [*DIGITS, "--train_images", "0"], "--train_images 0: must be at least 1"),
        ("evaluate", [*DIGITS, "--val_images", "0"], "--val_images 0: must be at least 1"),
        ("evaluate", [*DIGITS, "--neighbours", "0"], "--neighbours 0: must be at least 1"),
        ("evaluate", [*DIGITS, "--crop_pct", "1.5"], "--crop_pct 1.5: must be above 0 and at most 1"),
        ("evaluate", [*DIGITS, "--metrics", "segmentation", "--crop_pct", "0.9"], "segmentation takes whole images"),
        ("evaluate", [*DIGITS, "--metrics", "segmentation", "--pool", "cls"], "--pool cls: segmentation classifies"),
        ("evaluate", [*DIGITS, "--num_classes", "5"], "--num_classes 5: is of --metrics segmentation alone"),
        ("evaluate", [*DIGITS, "--ignore_index", "0", "255"], "--ignore_index 0 255: is of --metrics segmentation"),
        ("evaluate", [], "name a CHECKPOINT, or an untrained --model"),
        ("evaluate", ["--model", "mae_vit_mini_patch4", "--data_path", "/nowhere"], "there is no such folder"),
        ("sweep", ["none.yaml"], "none.yaml: cannot be read (No such file"),
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


def test_no_other_picture_takes_the_place_of_a_named_one(tmp_path, capsys):
    good = write_pictures(tmp_path) / "train" / "class0" / "0.jpg"
    (tmp_path / "broken.jpg").write_text("no picture")
    opened = checkpoints.untrained("mae_vit_mini_patch4")
    with pytest.raises(OSError, match=r"broken\.jpg: cannot be decoded"):
        measure.image_features(opened, [tmp_path / "broken.jpg", good])
    arguments = ["--model", "mae_vit_mini_patch4", str(tmp_path / "broken.jpg"), str(good)]
    with pytest.raises(SystemExit) as stop:
        script("visualize")([*arguments, "--output", str(tmp_path / "x.png")])
    assert stop.value.code == 2
    assert "broken.jpg: cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_bad_pictures_of_a_data_set_are_named_and_counted(tmp_path, capsys):
    folder = write_pictures(tmp_path / "p")
    (folder / "val" / "class1" / "2.jpg").write_text("no picture")
    flags = ["--model", "mae_vit_mini_patch4", "--data_path", str(folder), "--output", str(tmp_path / "r.json")]
    script("evaluate")([*flags, "--metrics", "knn", "salience"])
    assert json.loads((tmp_path / "r.json").read_text())["bad_images"] == 1
    error = capsys.readouterr().err
    assert "val/class1/2.jpg: cannot be decoded" in error
    assert error.count("\n") == 1
    for path in (folder / "val").rglob("*.jpg"):
        path.write_text("no picture")
    with pytest.raises(SystemExit) as stop:
        script("evaluate")(flags)
    assert stop.value.code == 2
    assert "12 of 12 pictures cannot be decoded" in capsys.readouterr().err


def test_pictures_are_prepared_as_the_checkpoint_s_training_did(tmp_path):
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    pretrained(tmp_path / "a.pth", mean=mean, std=std)
    opened = checkpoints.open_checkpoint(tmp_path / "a.pth")
    black = opened.normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
    white = opened.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(black, -torch.tensor(mean) / torch.tensor(std))
    torch.testing.assert_close(white, (1 - torch.tensor(mean)) / torch.tensor(std))


def test_evaluate_takes_its_pool_and_neighbours(tmp_path):
    pretrained(tmp_path / "a.pth", dataset="digits", in_chans=1)

    def evaluate(*flags):
        arguments = [str(tmp_path / "a.pth"), "--metrics", "knn", "rank_me", "--train_images", "200", *flags]
        script("evaluate")([*arguments, "--output", str(tmp_path / "r.json")])
        found = json.loads((tmp_path / "r.json").read_text())
        return found["knn"], found["rank_me"]

    opened = checkpoints.open_checkpoint(tmp_path / "a.pth")
    sets = monitor.open_sets(opened.settings, opened.size, 200, 10**6)
    expected = {}
    for pool in ("mean", "cls"):
        train, val = (
            features.extract_features(opened.model, images, opened.normalize, pool=pool)
            for images in (sets.train, sets.val)
        )
        expected |= {(pool, k): (features.knn_accuracy(train, val, k), features.rank_me(val[0])) for k in (1, 10)}
    assert len(set(expected.values())) == 4
    assert evaluate() == pytest.approx(expected["mean", 10])
    assert evaluate("--pool", "cls") == pytest.approx(expected["cls", 10])
    assert evaluate("--neighbours", "1") == pytest.approx(expected["mean", 1])


def test_evaluate_votes_as_ibot_does_on_cropped_images(tmp_path):
    """Once more in NumPy: the class token, cosines, exp(cosine / 0.07), the ten and twenty nearest."""
    pretrained(tmp_path / "a.pth", dataset="digits", in_chans=1)
    arguments = [str(tmp_path / "a.pth"), "--metrics", "voting", "--train_images", "300", "--output"]
    script("evaluate")([*arguments, str(tmp_path / "r.json"), "--crop_pct", "0.5"])
    found = json.loads((tmp_path / "r.json").read_text())
    opened = checkpoints.open_checkpoint(tmp_path / "a.pth")
    crop = transforms.evaluation_transform((16, 16), 0.5)
    sides = {}
    for split, most in (("train", 300), ("val", 359)):
        images = datasets.open_labelled("digits", None, split, 1)
        chosen = np.linspace(0, len(images) - 1, most).round().astype(int)
        pixels = torch.stack([crop(images.picture(index)) for index in chosen])
        tokens = features.encode_images(opened.model, opened.normalize(pixels), "cls").numpy().astype(np.float64)
        sides[split] = tokens / np.linalg.norm(tokens, axis=1, keepdims=True), images.labels[chosen]
    cosine = sides["val"][0] @ sides["train"][0].T
    for number in (10, 20):
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :number]
        votes = np.zeros((len(cosine), 10))
        for row, index in enumerate(nearest):
            np.add.at(votes[row], sides["train"][1][index], np.exp(cosine[row, index] / 0.07))
        expected = 100 * (votes.argmax(axis=1) == sides["val"][1]).mean()
        assert found[f"knn_cls_{number}"] == pytest.approx(expected, abs=0.6)  # two images: ties in the cosines


def test_visualize_draws_the_mask_and_the_noise_that_are_asked_for(tmp_path):
    pretrained(tmp_path / "a.pth", in_chans=1, masking="sbam_amr", mask_ratio=0.5, masking_args=["temperature=5"])
    opened = checkpoints.open_checkpoint(tmp_path / "a.pth")
    digits = monitor.open_sets(opened.settings.__class__(dataset="digits", in_chans=1), opened.size, 1, 359).val
    pixels = torch.stack([digits[0, index][0] for index in range(2)])
    strategies = figures.standard_strategies(opened.settings, opened.strategy, 16)

    def expected(**options):
        columns = figures.columns(opened.model, pixels, opened.normalize, strategies, temperature=5.0, **options)
        drawing.save(drawing.draw(columns), tmp_path / "expected.png")
        return (tmp_path / "expected.png").read_bytes()

    def drawn(*flags):
        arguments = [str(tmp_path / "a.pth"), "--dataset", "digits", "--rows", "2", *flags]
        script("visualize")([*arguments, "--output", str(tmp_path / "drawn.png")])
        return (tmp_path / "drawn.png").read_bytes()

    asked = [{"rebuilt": "sbam_amr"}, {"rebuilt": "random"}, {"rebuilt": "sbam_amr", "seed": 3}]
    pictures = [expected(**options) for options in asked]
    assert [drawn(), drawn("--rebuild", "random"), drawn("--seed", "3")] == pictures
    assert len(set(pictures)) == 3


def test_visualize_finds_its_pictures_wherever_they_stand(tmp_path, capsys):
    main, output = script("visualize"), ["--output", str(tmp_path / "x.png")]
    picture = str(write_pictures(tmp_path / "p") / "val" / "class0" / "0.jpg")
    main(["--model", "mae_vit_mini_patch4", "--dataset", "digits", "--in_chans", "1", *output])
    main(["--model", "mae_vit_mini_patch4", "--input_size", "32", picture, *output])
    main([picture, "--model", "mae_vit_mini_patch4", "--input_size", "32", "16", picture, *output, picture])
    assert capsys.readouterr().out.count("picture: ") == 3


def test_what_cannot_be_written_or_used_is_one_line(tmp_path, capsys):
    picture = str(write_pictures(tmp_path / "p") / "val" / "class0" / "0.jpg")
    (tmp_path / "d.png").mkdir()
    visualize_it = ["visualize", "--model", "mae_vit_mini_patch4", picture, "--output"]
    mistakes = [
        ([*visualize_it, str(tmp_path / "d.png")], "d.png: is a folder; name a file"),
        ([*visualize_it, "/proc/x.png"], "--output /proc/x.png: cannot be written"),
    ]
    if not torch.cuda.is_available():
        mistakes.append(([*visualize_it, str(tmp_path / "x.png"), "--device", "cuda"], "--device cuda: no CUDA GPU"))
        mistakes.append((["evaluate", *DIGITS, "--device", "cuda"], "--device cuda: no CUDA GPU"))
    for (name, *arguments), message in mistakes:
        with pytest.raises(SystemExit) as stop:
            script(name)(arguments)
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1)
        assert message in error


def test_a_checkpoint_of_a_loader_s_arrays_cannot_be_looked_at(tmp_path, capsys):
    picture = str(write_pictures(tmp_path / "p") / "val" / "class0" / "0.jpg")
    pretrained(tmp_path / "a.pth", in_chans=5, loader="util.loaders:npy", data_path=str(tmp_path), eval_every=1)
    for name, more in (("evaluate", []), ("visualize", [picture])):
        with pytest.raises(SystemExit) as stop:
            script(name)([str(tmp_path / "a.pth"), *more])
        assert stop.value.code == 2
        assert "--loader util.loaders:npy: the model was trained on the arrays of a loader" in capsys.readouterr().err
    pretrained(tmp_path / "b.pth", in_chans=5, dataset="wds", data_path=str(tmp_path))
    with pytest.raises(ValueError, match="--in_chans 5: only pictures of 1"):
        measure.image_features(checkpoints.open_checkpoint(tmp_path / "b.pth"), [picture])


def test_a_shape_that_a_file_does_not_tell_is_said_to_be_assumed(tmp_path, capsys):
    model = pretrained(tmp_path / "wide.pth", input_size=[8, 32], in_chans=1)
    assert checkpoints.open_checkpoint(tmp_path / "wide.pth").assumed == ""
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    opened = checkpoints.open_checkpoint(tmp_path / "bare.pth")
    assert opened.size == (16, 16)
    assert "16 patches are taken as 4 x 4, images of 16 x 16; --input_size" in opened.assumed
    script("visualize")([str(tmp_path / "bare.pth"), "--dataset", "digits", "--output", str(tmp_path / "x.png")])
    assert f"note: {opened.assumed}" in capsys.readouterr().out
    opened = checkpoints.open_checkpoint(tmp_path / "bare.pth", input_size=[8, 32])
    assert (opened.size, opened.assumed) == ((8, 32), "")
    with pytest.raises(ValueError, match=r"--input_size \[32\]: .* is of images of 16 patches of 4 x 4"):
        checkpoints.open_checkpoint(tmp_path / "bare.pth", input_size=[32])
    with pytest.raises(ValueError, match=r"--input_size \[16\]: .* is of images of 2 x 8 patches of 4 x 4"):
        checkpoints.open_checkpoint(tmp_path / "wide.pth", input_size=[16])
    model = pretrained(tmp_path / "tall.pth", input_size=[16, 24])
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"24 places, not a square, .* the images' height and width with --input"):
        checkpoints.open_checkpoint(tmp_path / "bare.pth")


def test_labels_are_needed_for_probes(tmp_path):
    folder = write_pictures(tmp_path, classes=1) / "train" / "class0"
    opened = checkpoints.untrained("mae_vit_mini_patch4", data_path=str(folder))
    assert set(measure.measure(opened, ("rank_me",))) == {"train_images", "val_images", "rank_me", "bad_images"}
    with pytest.raises(ValueError, match="--metrics knn linear: need labels"):
        measure.measure(opened, ("knn", "rank_me", "linear"))
    (write_pictures(tmp_path / "more") / "train" / "class1").rename(tmp_path / "elsewhere")
    opened = checkpoints.untrained("mae_vit_mini_patch4", data_path=str(tmp_path / "more"))
    with pytest.raises(ValueError, match=r"classes of val/ that train/ has not: \['class1'\]"):
        measure.measure(opened, ("knn",))


def test_the_cache_of_tokens_has_a_limit(monkeypatch):
    monkeypatch.setattr(measure, "CACHE_GB", 1e-6)
    opened = checkpoints.untrained("mae_vit_mini_patch4", dataset="digits", in_chans=1)
    with pytest.raises(ValueError, match="lower --train_images"):
        measure.measure(opened, ("attentive",))
    assert len(datasets.open_labelled("digits", None, "val", 1)) == 359


def test_the_training_s_number_of_processes_does_not_matter_to_who_looks():
    state = models_mae.create_model("mae_vit_mini_patch4", in_chans=1).state_dict()
    args = {"model": "mae_vit_mini_patch4", "batch_size": 12, "accum_iter": 2, "effective_batch_size": 48}
    assert checkpoints.settings_of({"args": args}, state, "x.pth", {}).model == "mae_vit_mini_patch4"
