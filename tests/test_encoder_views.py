"""Attention and principal components of every method's encoder: against computations by other means, and as drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refusal, tiny_mae, varied_images, write_pictures
from sklearn.decomposition import PCA

import masking
import models_mae
from evaluation import checkpoints, drawing, encoder_views, features, figures
from evaluation.encoder_views import component_colours
from methods import base
from scripts import visualize
from util.config import PretrainSettings
from util.training import checkpoint

MODELS = [name for name in models_mae.available_models() if name.endswith("_mini_patch4")]
ENCODER = "attention,heads,pca"


def shaken(name: str) -> torch.nn.Module:
    """A model of which no weight is 0."""
    torch.manual_seed(0)
    model = base.build_model(PretrainSettings(model=name)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def classified_by_simmim() -> torch.nn.Module:
    """SimMIM's encoder as in its classifier: a position bias for each block."""
    model = shaken("simmim_vit_mini_patch4")
    model.take_form_of({"norm.weight": None, "blocks.0.attn.relative_position_bias_table": None})
    for parameter in model.eval().parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", [*MODELS, "classifier"])
def test_class_attention_is_what_the_last_block_computes(name, monkeypatch):
    model, images = classified_by_simmim() if name == "classifier" else shaken(name), varied_images(3, side=16)
    computed, seen = F.scaled_dot_product_attention, []

    def watched(query, key, value, attn_mask=None, **options):
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        seen.append((scores if attn_mask is None else scores + attn_mask).softmax(-1))
        return computed(query, key, value, attn_mask=attn_mask, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", watched)
        model.encode(model.embed(images), None)
    assert len(seen) == 4
    found = model.class_attention(images)
    assert found.shape == (3, 3, 16)
    torch.testing.assert_close(found, seen[-1][:, :, 0, 1:])
    assert found.std(dim=2).mean() > 1e-3


def test_maps_are_stretched_and_of_the_mean_over_the_heads_or_of_each():
    model, images = tiny_mae().eval(), varied_images(3)
    attention = model.class_attention(images).numpy()  # (3, 4, 64)
    (mean,), heads = encoder_views.attention(model, images), encoder_views.heads(model, images)
    assert [column.title for column in (mean, *heads)] == ["attention", "head 1", "head 2", "head 3", "head 4"]
    for column, maps in zip((mean, *heads), (attention.mean(1), *attention.swapaxes(0, 1)), strict=True):
        low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
        np.testing.assert_allclose(column.pictures.flatten(1), (maps - low) / (high - low), atol=1e-4)


def test_colours_are_the_directions_of_the_largest_variance():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20)) + 7
    expected = PCA(3).fit_transform(tokens)
    found = component_colours(torch.from_numpy(tokens)).numpy()
    for channel in range(3):
        inner = (found[:, channel] > 0) & (found[:, channel] < 1)
        assert inner.mean() == pytest.approx(0.98, abs=0.005)
        correlation = np.corrcoef(found[inner, channel], expected[inner, channel])[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-5)
    assert (found.min(), found.max()) == (0, 1)


def test_colours_of_few_or_equal_tokens():
    assert component_colours(torch.randn(2, 8)).shape == (2, 3)
    assert (component_colours(torch.randn(2, 8))[:, 2] == 0).all()
    assert component_colours(torch.ones(9, 8)).isfinite().all()


def test_components_are_of_all_images_together():
    model, images = tiny_mae().eval(), varied_images(4)
    (column,) = encoder_views.principal_components(model, images)
    tokens = features.encode_images(model, images, "tokens")
    expected = component_colours(tokens.flatten(0, 1)).view(4, 8, 8, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(column.pictures, expected)
    twice = encoder_views.principal_components(model, images[[0, 1, 0]])[0].pictures
    torch.testing.assert_close(twice[0], twice[2], rtol=0, atol=1e-4)
    assert (twice[0] - column.pictures[0]).abs().max() > 0.05


@pytest.fixture
def saved(tmp_path):
    """A function that saves an untrained model of a name, and returns its file."""

    def save(name: str, **settings):
        settings = PretrainSettings(model=name, **settings)
        model = base.build_model(settings)
        content = {"model": model.state_dict(), "args": settings.as_dict(), "grid": [4, 4]}
        checkpoint.save(tmp_path / f"{name}.pth", content)
        return tmp_path / f"{name}.pth"

    return save


@pytest.mark.parametrize("name", MODELS)
def test_every_method_is_drawn_with_every_column_and_under_every_strategy(name, saved, tmp_path, capsys):
    path, folder = saved(name), write_pictures(tmp_path / "p") / "val"
    pictures = sorted(str(picture) for picture in folder.rglob("*.jpg"))[:2]
    output = tmp_path / "x.png"
    asked = ",".join(figures.COLUMNS)
    visualize.main([str(path), *pictures, "--columns", asked, "--masking", "all", "--output", str(output)])
    decodes = not name.startswith("ibot")
    assert ("no decoder" in capsys.readouterr().out) != decodes
    assert output.stat().st_size > 20_000


def test_the_columns_stand_in_the_order_that_is_asked_for(saved, tmp_path):
    path = saved("mae_vit_mini_patch4", dataset="digits", in_chans=1)
    opened = checkpoints.open_checkpoint(path)
    digits = visualize.datasets.open_labelled("digits", None, "val", 1)
    named = visualize.measure.Named(digits, visualize.transforms.evaluation_transform((16, 16), 1.0))
    pixels = torch.stack([named[0, index][0] for index in range(2)])
    arguments = [str(path), "--dataset", "digits", "--rows", "2", "--output", str(tmp_path / "drawn.png")]
    for asked, titles in (
        ("pca,attention", ["image", "PCA", "attention"]),
        ("heads,salience", ["image", "head 1", "head 2", "head 3", "salience"]),
        ("rebuilt", ["image", "rebuilt: random", "rebuilt + visible"]),
    ):
        strategies = figures.standard_strategies(opened.settings, opened.strategy, 16)
        options = {"temperature": 1.0, "rebuilt": "random", "names": asked.split(",")}
        columns = figures.columns(opened.model, pixels, opened.normalize, strategies, **options)
        assert [column.title for column in columns] == titles
        drawing.save(drawing.draw(columns), tmp_path / "expected.png")
        visualize.main([*arguments, "--columns", asked])
        assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_the_colour_bar_names_what_the_maps_show_and_no_label_overlaps():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalize = visualize.transforms.Normalize((0.5,) * 3, (0.5,) * 3)
    strategies = figures.standard_strategies(PretrainSettings(), masking.create("random"), 64)

    def drawn(*names: str):
        options = {"temperature": 1.0, "rebuilt": "sbam", "names": names}
        figure = drawing.draw(figures.columns(tiny_mae(), pixels, normalize, strategies, **options))
        figure.draw_without_rendering()
        return figure

    bars = {("pca",): [], ("heads", "attention"): ["attention"], ("salience",): ["salience"]}
    bars[figures.COLUMNS] = ["salience, attention"]
    for names, expected in bars.items():
        figure = drawn(*names)
        assert [axis.get_ylabel() for axis in figure.axes if not axis.images] == expected
    texts = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label)]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_columns_that_are_not_there_and_code_that_a_checkpoint_names(saved, tmp_path, capsys):
    picture = str(write_pictures(tmp_path / "p") / "val" / "class0" / "0.jpg")
    output = ["--output", str(tmp_path / "x.png")]
    path = str(saved("mae_vit_mini_patch4"))
    said = refusal(visualize.main, [path, picture, "--columns", "atention", *output], capsys)
    assert "--columns atention: unknown (did you mean 'attention'?); available: salience, attention, heads" in said
    content = checkpoint.load(path)
    content["args"]["masking"] = "my_masking:Mine"
    checkpoint.save(path, content)
    said = refusal(visualize.main, [path, picture, "--columns", "salience", *output], capsys)
    assert "names the masking 'my_masking:Mine'" in said
    assert not (tmp_path / "x.png").exists()
    visualize.main([path, picture, "--columns", ENCODER, *output])
    assert (tmp_path / "x.png").exists()
