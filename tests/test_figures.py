"""Pictures and numbers about masks, salience and reconstruction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import tiny_mae, varied_images
from matplotlib.backends.backend_agg import FigureCanvasAgg

import masking
from evaluation import drawing, figures
from util.config import PretrainSettings
from util.data import transforms

NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixels(n: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def strategies(**options) -> dict:
    settings = PretrainSettings(masking="sbam_amr", **options)
    return figures.standard_strategies(settings, masking.create("sbam_amr", mask_ratio=settings.mask_ratio), 64)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_visible_patches_are_the_image_itself(norm_pix_loss):
    torch.manual_seed(0)
    model, images = tiny_mae(norm_pix_loss=norm_pix_loss).eval(), pixels()
    found = {
        c.title: c for c in figures.columns(model, images, NORMALIZE, strategies(), temperature=1.0, rebuilt="sbam_amr")
    }
    mask = strategies()["sbam_amr"](
        model.embed(NORMALIZE(images)), noise=torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    )
    removed = mask.mask.view(4, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(4, 3, 32, 32)
    pasted, image = found["rebuilt + visible"].pictures, found["image"].pictures
    assert torch.equal(image, images / 255)
    assert torch.equal(pasted[~removed], image[~removed])
    assert (pasted[removed] != image[removed]).float().mean() > 0.9
    assert (found["mask: sbam_amr"].pictures[removed] == 0.5).all()
    assert found["mask: sbam_amr"].captions[0] == f"{mask.mask[0].float().mean():.0%} removed"
    title = next(name for name in found if name.startswith("rebuilt: sbam_amr"))
    assert ("mean, std" in title) == norm_pix_loss


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_gives_back_the_image(norm_pix_loss):
    model, images = tiny_mae(norm_pix_loss=norm_pix_loss), pixels()
    images[0, :, :4, :4] = 77  # a patch without deviation
    normalized = NORMALIZE(images)
    target = model.patchify(normalized)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert model.forward_loss(normalized, target, torch.ones(4, 64)) < 1e-9
    rebuilt = figures.reconstruct(model, target, normalized, NORMALIZE)
    assert (rebuilt - images / 255).abs().max() < 1 / 255 / 10


def test_without_a_decoder_there_is_no_reconstruction():
    titles = [c.title for c in figures.columns(tiny_mae(), pixels(), NORMALIZE, strategies(), temperature=1.0)]
    assert titles == ["image", "salience", "mask: random", "mask: sbam", "mask: sbam_amr"]


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5, 0.9, 0.98])
def test_standard_strategies_exist_at_every_ratio(ratio):
    settings = PretrainSettings(masking="random", mask_ratio=ratio)
    found = figures.standard_strategies(settings, masking.create("random", mask_ratio=ratio), 64)
    assert list(found) == ["random", "sbam", "sbam_amr"]
    for strategy in found.values():
        masking.check(strategy, 64)


def test_a_strategy_of_ones_own_is_added():
    settings = PretrainSettings(masking="my_masking:Mine")
    assert list(figures.standard_strategies(settings, print, 64)) == ["random", "sbam", "sbam_amr", "own"]


def test_salience_statistics_of_a_flat_and_of_textured_images():
    model = tiny_mae().eval()
    images = varied_images(5)
    strategy = masking.create("sbam_amr", delta=0.3)
    found = figures.salience_statistics(model, images, strategy)
    tokens = model.embed(images)
    salience = masking.token_salience(tokens)
    torch.testing.assert_close(found["salient_share"], (salience > 0.3).float().mean(1))
    torch.testing.assert_close(found["mask_ratio"], strategy(tokens).mask.float().mean(1))
    share = (salience[3] / salience[3].sum()).tolist()
    entropy = -sum(p * math.log(p) for p in share if p > 0) / math.log(64)
    assert found["salience_entropy"][3].item() == pytest.approx(entropy, rel=1e-4)
    blank = model
    blank.patch_embed.proj.weight.data.zero_()
    blank.pos_embed.data.zero_()  # all tokens alike: no salience
    flat = figures.salience_statistics(blank, images, strategy)
    torch.testing.assert_close(flat["salience_entropy"], torch.ones(5))


def test_the_salience_shown_and_counted_is_of_the_strategy_s_temperature():
    model, images = tiny_mae().eval(), varied_images(5)
    settings = PretrainSettings(masking="sbam_amr")
    own = masking.create("sbam_amr", temperature=7.0, delta=0.3)
    salience = masking.token_salience(model.embed(images), 7.0)
    assert not torch.allclose(salience, masking.token_salience(model.embed(images)), atol=0.05)
    found = figures.salience_statistics(model, images, own)
    torch.testing.assert_close(found["salient_share"], (salience > 0.3).float().mean(1))
    standard = figures.standard_strategies(settings, own, 64)
    assert [figures.temperature_of(standard[name]) for name in ("random", "sbam", "sbam_amr")] == [1.0, 7.0, 7.0]
    columns = figures.columns(model, pixels(2), NORMALIZE, standard, temperature=figures.temperature_of(own))
    expected = masking.token_salience(model.embed(NORMALIZE(pixels(2))), 7.0)
    torch.testing.assert_close(columns[1].pictures.flatten(1), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_removed_patches_are_hatched_because_grey_is_also_in_pictures(channels):
    grey, mask = torch.full((1, channels, 8, 12), 0.5), torch.tensor([[1, 0, 0, 0, 0, 1]])
    hidden = drawing.hide(grey, mask, (2, 3))
    assert torch.equal(hidden, grey)
    figure = drawing.draw([drawing.Column("", hidden, hatched=mask.bool().view(1, 2, 3))])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = np.asarray(canvas.buffer_rgba())[..., :3].mean(2)
    corners = figure.axes[0].transData.transform([(x - 0.5, y - 0.5) for x in (0, 4, 8, 12) for y in (0, 4, 8)])
    columns, rows = corners[::3, 0], len(shown) - corners[:3, 1]
    for place, removed in enumerate(mask[0].tolist()):
        row, column = divmod(place, 3)
        up, down, left, right = (int(v) for v in (*rows[row : row + 2], *columns[column : column + 2]))
        patch = shown[up + 3 : down - 3, left + 3 : right - 3]
        assert patch.size > 100
        assert (patch.std() > 5) == bool(removed)


def test_a_fourth_channel_is_said_not_to_be_shown():
    images = torch.rand(1, 4, 32, 32)
    normalize = transforms.Normalize((0.5,) * 4, (0.5,) * 4)
    columns = figures.columns(tiny_mae(in_chans=4), images, normalize, strategies(), temperature=1.0)
    assert columns[0].title == "image\n(without channel 4)"


def test_every_map_has_the_same_scale_and_there_is_one_colour_bar(tmp_path):
    columns = figures.columns(tiny_mae(), pixels(3), NORMALIZE, strategies(), temperature=1.0, rebuilt="random")
    figure = drawing.draw(columns)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(images) == 3 * 7
    assert {image.get_clim() for image in images} == {(0, 1)}
    assert [axis.get_ylabel() for axis in figure.axes if not axis.images] == ["salience"]
    for suffix in ("png", "pdf"):
        drawing.save(figure, tmp_path / f"masks.{suffix}")
        assert (tmp_path / f"masks.{suffix}").stat().st_size > 5000


def test_no_label_overlaps_another():
    columns = figures.columns(
        tiny_mae(norm_pix_loss=True), pixels(2), NORMALIZE, strategies(), temperature=1.0, rebuilt="random"
    )
    figure = drawing.draw(columns)
    figure.draw_without_rendering()
    texts = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label)]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) == 7 + 2 * 3 + 1
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
