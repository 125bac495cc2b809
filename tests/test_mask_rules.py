"""Masks that know the grid or the progress: counts, places and spectrum against what their rules say."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from helpers import golden, masked, with_config
from reference import block, simmim_sbam

import masking
from masking.block import draw_blocks
from masking.color import COLORS

GRIDS = [(4, 4), (1, 16), (5, 6), (2, 12), (14, 14), (12, 16), (20, 20)]


@pytest.mark.parametrize(("name", "reference"), [("block_masks", block), ("simmim_sbam", simmim_sbam)])
def test_masks_against_the_goldens(name, reference):
    data = golden(name)
    inputs = {key: data[key] for key in data if key.split("/")[-1] in ("config", "tokens", "noise")}
    found = reference.compute(inputs)
    raw = {"scores", "order", "mask_fixed", "mask_amr"}  # without renormalisation: an alternative that is not ours
    expected = {key for key in data if key not in inputs and (key.split("/")[-1] not in raw or "renorm" in key)}
    assert found.keys() == expected
    for key in expected:
        exact = data[key].dtype.kind in "bi"
        np.testing.assert_allclose(
            found[key], data[key], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6, err_msg=key
        )


def test_the_reference_takes_fractions_and_grids_that_are_not_square():
    data = golden("simmim_sbam")
    settings = json.loads(str(data["config"]))["grid8"] | {"mask_ratio": "3/5", "delta_r": "3/20", "grid": [4, 16]}
    known = {"config": np.array("{}")} | {key: data[key] for key in ("grid8/tokens", "grid8/noise")}
    found = simmim_sbam.compute(with_config(known, grid8=settings))
    np.testing.assert_allclose(found["grid8/amr_ratio"], data["grid8/amr_ratio"], rtol=1e-6)
    np.testing.assert_array_equal(found["grid8/masked_cells_amr"], data["grid8/masked_cells_amr"])
    assert found["grid8/renormalised/mask_amr"].shape == (4, 4, 16)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["random", "sbam", "block", "inverse_block", "color", "schedule"])
def test_counts_are_exact_on_every_grid(name, grid):
    length = grid[0] * grid[1]
    for hundredths in range(5, 100, 15):
        kept = masking.keep_count(length, hundredths / 100)
        if kept == length:
            continue
        for num_images in (1, 3):
            mask = masked(
                masking.create(name, mask_ratio=hundredths / 100), torch.randn(num_images, length, 8), grid=grid
            )
            assert mask.num_keep.tolist() == (~mask.mask).sum(dim=1).tolist() == [kept] * num_images


def test_beits_rule_may_fall_short():
    tokens = torch.zeros(200, 196, 1)
    exact = masked(masking.create("block", mask_ratio="75/196", rounding="removed"), tokens)
    short = masked(masking.create("block", mask_ratio="75/196", rounding="removed", attempts=10), tokens)
    assert (exact.num_keep == 121).all()
    share = (short.num_keep == 121).float().mean()
    assert 0.5 < share < 0.82  # 66% of 4000
    assert short.keep_lengths == tuple(short.num_keep.tolist())


@pytest.mark.parametrize(("draw", "kept_of_the_covered"), [(0.0, 0), (0.3, 1), (0.999, 3)])
def test_bootmaes_mask_leaves_a_few_covered_patches(draw, kept_of_the_covered):
    """147 of 196 are removed, 120 of them in rectangles but for k, which are kept."""
    options = {"covered": "120/196", "max_patches": 60}
    tokens, noise = torch.zeros(20, 196, 1), torch.rand(20, 196)
    rolled = masked(masking.create("block", **options, roll=3), tokens, noise, draw=draw)
    rectangles = masked(
        masking.create("block", mask_ratio="120/196", rounding="removed", max_patches=60), tokens, noise
    )
    assert (rectangles.mask.sum(dim=1) == 120).all()
    assert (rolled.mask.sum(dim=1) == 147).all()
    assert ((rectangles.mask & ~rolled.mask).sum(dim=1) == kept_of_the_covered).all()


def test_a_grid_on_which_no_block_fits_is_completed():
    for grid, target in (((1, 16), 12), ((2, 2), 3), ((3, 3), 8)):
        assert draw_blocks(grid, target, random.Random(0)).sum() == target


@pytest.mark.parametrize("name", ["inverse_block", *(f"color/{color}" for color in COLORS)])
@pytest.mark.parametrize("grid", [(14, 14), (6, 9)], ids=str)
def test_every_patch_is_removed_equally_often(name, grid):
    name, _, color = name.partition("/")
    torch.manual_seed(0)
    number, length = 20000, grid[0] * grid[1]
    strategy = masking.create(name, **({"color": color} if color else {}))
    mask = masked(strategy, torch.zeros(1, 1, 1).expand(number, length, 1), grid=grid)
    expected = 1 - mask.num_keep[0].item() / length
    deviation = math.sqrt(expected * (1 - expected) / number)
    assert (mask.mask.double().mean(dim=0) - expected).abs().max() < 4.5 * deviation


def test_block_masks_hide_the_centre():
    tokens = torch.zeros(1000, 196, 1)
    share = masked(masking.create("block"), tokens).mask.float().mean(dim=0).view(14, 14)
    assert share[6:8, 6:8].mean() > 0.97
    assert 0.1 < share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() < 0.2


def test_an_inverse_block_keeps_one_rectangle_on_the_torus():
    mask = masked(masking.create("inverse_block", mask_ratio="147/196"), torch.zeros(500, 196, 1)).mask.view(-1, 14, 14)
    sides = set()
    for kept in ~mask.numpy():
        # Rolled so that an empty row and an empty column come last, the rectangle is whole.
        rows, columns = kept.any(axis=1), kept.any(axis=0)
        found = np.roll(kept, (-shift(rows), -shift(columns)), axis=(0, 1))
        height, width = rows.sum(), columns.sum()
        assert found[: height - 1, :width].all()
        assert found[height - 1, :width].tolist() == sorted(found[height - 1, :width], reverse=True)
        sides.add((height, width))
    assert len(sides) > 3


def shift(used: np.ndarray) -> int:
    """First place of the one run of True on a ring that is not full."""
    return 0 if used.all() else next(i for i in range(len(used)) if used[i] and not used[i - 1])


def test_the_spectrum_of_color():
    """Power of the filtered noise by frequency: highest at low, middle and high ones, or lowest in the middle."""
    torch.manual_seed(0)
    noise = torch.rand(500, 32, 32)
    radius = torch.fft.fftfreq(32)[:, None].hypot(torch.fft.fftfreq(32))
    bands = [(0.01, 0.06), (0.15, 0.25), (0.4, 0.5)]
    power = {}
    for color in COLORS:
        spectrum = torch.fft.fft2(masking.create("color", color=color).filtered(noise)).abs().square().mean(dim=0)
        power[color] = [spectrum[(radius > low) & (radius <= high)].mean().item() for low, high in bands]
    assert power["red"] == sorted(power["red"], reverse=True)
    assert power["blue"] == sorted(power["blue"])
    assert power["green"][1] > 5 * max(power["green"][0], power["green"][2])
    assert power["purple"][1] < 0.7 * min(power["purple"][0], power["purple"][2])
    # And against the closed form of a Gaussian: white noise has a variance of 1/12 at each of 1024 points.
    red = math.exp(-4 * math.pi**2 * 0.8**2 * 0.125**2) * 1024 / 12
    masks = masking.create("color", color="red").filtered(noise)
    assert torch.fft.fft2(masks).abs().square().mean(dim=0)[4, 0].item() == pytest.approx(red, rel=0.2)


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", [50, 60, 70, 80]), ("cosine", [50, 57.5, 72.5, 80]), ("drawn", [50] * 4)]
)
def test_a_scheduled_ratio(shape, expected):
    strategy = masking.create("schedule", mask_ratio=0.5, end=0.8, shape=shape)
    ratios = [100 * float(strategy.ratio(progress)) for progress in (0, 1 / 3, 2 / 3, 1)]
    assert ratios == pytest.approx(expected, abs=0.02)
    if shape == "drawn":
        assert float(strategy.ratio(0.9, draw=0.5)) == pytest.approx(0.65)
    assert masked(strategy, torch.zeros(2, 100, 1), progress=1.0, draw=0.9999).num_keep.tolist() == [20, 20]


def test_a_schedule_masks_as_the_strategy_it_wraps():
    tokens, noise = torch.randn(4, 64, 16), torch.rand(4, 64)
    wrapped = masking.create("schedule", mask_ratio=0.4, end=0.8, of="sbam_amr", delta_r=0.1, cell=2)
    assert masking.base.needs(wrapped) == {"grid", "progress"}
    assert masking.create("schedule", of="am", refresh_epochs=7, end=0.8).refresh_epochs == 7
    alone = masking.create("sbam_amr", mask_ratio=0.6, delta_r=0.1, cell=2)
    assert torch.equal(masked(wrapped, tokens, noise, progress=0.5).mask, masked(alone, tokens, noise).mask)


def test_incoming_weight_is_what_a_token_takes_from_the_others():
    tokens = torch.randn(3, 20, 6)
    attention = (tokens @ tokens.transpose(1, 2)).softmax(dim=-1)
    taken = attention.sum(dim=2) - attention.diagonal(dim1=1, dim2=2)
    low, high = taken.amin(1, keepdim=True), taken.amax(1, keepdim=True)
    salience = masking.token_salience(tokens, weight="incoming")
    torch.testing.assert_close(salience, (taken - low) / (high - low), rtol=1e-4, atol=1e-4)
    mask = masking.create("sbam", randomness=0, weight="incoming")(tokens)
    assert torch.equal(mask.mask, masking.remove_highest(salience, 15))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("block", {"aspect": 2}, "aspect is 2; it must be at most 1"),
        ("block", {"attempts": 0}, "attempts is 0; it must be a whole number"),
        ("block", {"min_patches": 0}, "min_patches is 0"),
        ("block", {"roll": -1}, "roll is -1"),
        ("block", {"roll": 1, "attempts": 10}, "attempts goes with neither covered nor roll"),
        ("color", {"color": "grean"}, "color is 'grean'; choose red, green, blue or purple"),
        ("color", {"sigma": 0}, "sigma is 0"),
        ("inverse_block", {"aspect": 0}, "aspect is 0"),
        ("schedule", {"end": 1}, "end is 1; it must be a number between 0 and 1"),
        ("schedule", {"of": "randon"}, "did you mean 'random'"),
        ("schedule", {"of": "os:system"}, "masking strategy"),
        ("schedule", {"of": "sbam", "delta_r": 0.1}, "no option 'delta_r'"),
        ("schedule", {"of": "sbam_amr", "end": 0.95}, "ratios from 0.8 to 1.1"),
        ("schedule", {"shape": "step"}, "choose linear, cosine or drawn"),
        ("sbam", {"weight": "both"}, "choose outgoing or incoming"),
    ],
)
def test_impossible_options_are_one_clear_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        masking.create(name, **options)
