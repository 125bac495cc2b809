"""iBOT, AttMask and SBAM in iBOT against the reference numbers, and the reference modules on other files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import golden, golden_json
from reference import attmask, ibot, ibot_masks, ibot_sbam

import masking
from methods import IBOT
from models_ibot import ibot_vit_base_patch16, ibot_vit_small_patch16

GIVEN_IN_FILE = ("config", "state/", "crops/", "masks/", "center_cls/step0_before", "center_patch/step0_before")
GIVEN_IN_FILE += tuple(f"drop_path/{name}" for name in ("x", "uniform", "p"))


def test_three_steps_against_the_goldens():
    """AdamW makes +-lr of a gradient of rounding size (keys' biases): weights are compared where it is larger."""
    data = golden("ibot_tiny")
    known = {k: v for k, v in data.items() if k.startswith(GIVEN_IN_FILE)}
    found = ibot.compute(known)
    assert found.keys() == data.keys() - known.keys()
    assert list(IBOT.betas) == golden_json_in(data["config"])["betas"]
    for name, value in found.items():
        expected = data[name]
        if expected.dtype.kind == "U":
            assert str(value) == str(expected), name
            continue
        relative = 1e-4 if "grad" in name else 1e-12 if name.startswith("schedule") else 1e-5
        bound = np.full_like(expected, relative * max(np.abs(expected).max(), 1e-3), dtype=np.float64)
        if "after_step0" in name:
            tensor_name = name.split("/", 1)[1]
            large = np.abs(data.get(f"grad/{tensor_name}", np.zeros_like(expected))) > 1e-6
            bound = np.where(large, 1e-6 + bound, 2 * known_lr(data))
        assert (np.abs(value - expected) <= bound).all(), name


def known_lr(data) -> float:
    return float(data["schedule/lr"].max())


def test_the_reference_takes_as_many_steps_as_there_are_masks():
    data = golden("ibot_tiny")
    known = {k: v for k, v in data.items() if k.startswith(GIVEN_IN_FILE) and not k.startswith("masks/step2")}
    found = ibot.compute(known)
    assert "loss/step2/loss" not in found
    np.testing.assert_allclose(found["loss/step1/loss"], data["loss/step1/loss"], rtol=1e-5)


def test_the_reference_of_attmask_takes_what_is_revealed_and_no_clipping():
    data = golden("attmask_masks")
    given = {k: v for k, v in data.items() if not k.endswith("hint_noise")}
    found = attmask.compute(given)
    for key in (k for k in data if k.startswith("case") and k.endswith("/mask")):
        np.testing.assert_array_equal(found[key], data[key], err_msg=key)
    for limit in (0, 1e9):
        given["config"] = np.array(json.dumps(golden_json_in(data["config"]) | {"student_clip": limit}))
        given["cases"] = np.array("[]")
        key = "train/attmask_hint/grad_cls_token"
        clipped, found = found[key], attmask.compute(given)
        assert np.linalg.norm(found[key]) >= np.linalg.norm(clipped) > 0


def test_the_reference_of_the_masks_takes_grids_that_are_no_squares():
    case = {"index": 0, "grid": [6, 9], "pred_ratio": 0.5, "pred_ratio_var": 0, "python_seed": 1}
    mask = ibot_masks.compute({"cases": np.array(json.dumps([case]))})["block00/mask"]
    assert mask.shape == (6, 9)
    assert 0 < mask.sum() <= 27


def test_amr_at_drawn_ratios_may_vary_more_than_around_one_ratio():
    """With one ratio for all, 3/4 +- 0.3 is no ratio, and 1/2 +- 0.3 would keep all of four tokens."""
    data = golden("ibot_sbam") | {"delta_r": np.array(0.3)}
    found = ibot_sbam.compute(data)
    ratio = np.clip(data["ratio"] + 0.3 * (2 * data["amr/share_salient"] - 1), 0, 1)
    expected = np.floor(np.where(data["ratio"] > 0, ratio, 0) * data["tokens"].shape[1] + 1e-9)
    np.testing.assert_array_equal(found["amr/num_masked"], expected)
    strategy = masking.create("sbam_amr", mask_ratio=0.5, delta_r=0.3)
    flat = torch.zeros(3, 4, 8)  # no token is salient: each ratio is 0.3 less
    mask = masking.replace(strategy, flat, masking.Ratios((0.0, 0.1, 1.0)), torch.rand(3, 4)).mask
    assert mask.sum(dim=1).tolist() == [0, 0, 2]


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [("ibot_masks", ibot_masks, 0), ("attmask_masks", attmask, 1e-5), ("ibot_sbam", ibot_sbam, 1e-6)],
)
def test_masks_against_the_goldens(name, reference, tolerance):
    data = golden(name)
    found = reference.compute(data)
    results = {"mask", "num_masked", "score", "salience", "share_salient", "loss", "patch", "cls", "masks", "results"}
    assert found.keys() >= {k for k in data if k.split("/")[-1] in results}
    for key, value in found.items():
        if data[key].dtype.kind == "U":
            assert str(value) == str(data[key])
        elif data[key].dtype.kind in "bi":
            np.testing.assert_array_equal(value, data[key], err_msg=key)
        else:
            bound = (10 if "grad" in key else 1) * tolerance * max(np.abs(data[key]).max(), 1e-3)
            np.testing.assert_allclose(value, data[key], rtol=0, atol=bound, err_msg=key)


def test_block_masks_have_the_published_statistics():
    known = golden_json_in(golden("ibot_masks")["statistics"])
    for ratio in (0.1, 0.3, 0.5):
        found = ibot_masks.statistics(((ratio,), (0.0,)), (14, 14), 1500, seed=1)
        expected = known[f"fixed_{ratio}"]
        assert found["mean"] == pytest.approx(expected["mean"], abs=5 * expected["std"] / 1500**0.5)
        assert found["centre_4x4_frequency"] == pytest.approx(expected["centre_4x4_frequency"], abs=0.03)
        assert found["corner_frequency"] == pytest.approx(expected["corner_frequency"], abs=0.02)


def golden_json_in(array: np.ndarray) -> dict:
    return json.loads(str(array))


@pytest.mark.parametrize(
    ("name", "build", "frozen"),
    [("vit_small", ibot_vit_small_patch16, False), ("vit_base", ibot_vit_base_patch16, True)],
)
def test_names_shapes_decay_and_depth_are_the_published_ones(name, build, frozen):
    known = golden_json("ibot_state_dict_layouts")[name]
    with torch.device("meta"):
        method = IBOT(build(), None, norm_last_layer=frozen)
    theirs = {ibot.ours(n): n for n in known["state_dict"]}
    parameters = dict(method.named_parameters())
    for ours, their in theirs.items():
        if ours in parameters:
            assert list(parameters[ours].shape) == known["state_dict"][their], their
    assert {theirs[n] for n, p in parameters.items() if p.requires_grad} == set(known["trained"])
    identities = {id(p): n for n, p in parameters.items()}
    for decay, key in ((0.04, "decayed"), (0.0, "not_decayed")):
        groups = [group for group in method.parameter_groups(0.04) if group["weight_decay"] == decay]
        found = {theirs[identities[id(p)]] for group in groups for p in group["params"]}
        assert found == set(known[key])
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in method.student.blocks]
    assert rates == pytest.approx(known["drop_path"])
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in method.model.blocks)
