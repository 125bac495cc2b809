"""Classifiers: parameter groups, loading of encoders, resizing, heads."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import tiny_mae

import models_mae
import models_vit
from util.training import fitting


def mini(**options):
    return models_vit.create_model("vit_mini_patch4", **{"num_classes": 10, **options})


@pytest.mark.parametrize("global_pool", [True, False])
def test_an_encoder_loads_and_only_the_head_is_new(global_pool):
    encoder = models_mae.mae_vit_mini_patch4().state_dict()
    model = mini(global_pool=global_pool)
    state = fitting.fit_classifier(model, encoder)
    missing = model.load_state_dict(state, strict=False).missing_keys
    expected = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if global_pool else set())
    assert set(missing) == expected
    assert torch.equal(model.blocks[2].mlp.fc1.weight, encoder["blocks.2.mlp.fc1.weight"])


@pytest.mark.parametrize(
    "encoder", [n.removeprefix("mae_") for n in models_mae.available_models() if n.startswith("mae_")]
)
def test_every_encoder_has_its_classifier(encoder):
    with torch.device("meta"):
        state = models_mae.create_model(f"mae_{encoder}").state_dict()
        model = models_vit.create_model(encoder, num_classes=7)
        assert fitting.fit_classifier(model, state)


def test_another_input_size_resizes_the_position_table():
    model = mini(img_size=(24, 20))
    encoder = models_mae.mae_vit_mini_patch4().state_dict()
    assert fitting.fit_classifier(model, encoder)["pos_embed"].shape == (1, 1 + 6 * 5, 96)
    tall = models_mae.mae_vit_mini_patch4(img_size=(20, 24)).state_dict()  # 5 x 6 patches: as many, placed differently
    resized = fitting.fit_classifier(model, tall, old_grid=(5, 6))["pos_embed"]
    assert resized.shape == tall["pos_embed"].shape
    assert not torch.equal(resized, tall["pos_embed"])
    with pytest.raises(ValueError, match="not a square grid"):
        fitting.fit_classifier(model, tall)


def test_a_head_for_other_classes_is_left_out_and_one_for_the_same_is_loaded():
    trained = mini(num_classes=10).state_dict()
    assert "head.weight" in fitting.fit_classifier(mini(num_classes=10), trained)
    assert "head.weight" not in fitting.fit_classifier(mini(num_classes=3), trained)


def test_another_architecture_is_named():
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight is \(48, 3, 4, 4\) in it"):
        fitting.fit_classifier(mini(), tiny_mae().state_dict())
    deeper = models_mae.mae_vit_mini_patch4(depth=3).state_dict()
    with pytest.raises(ValueError, match=r"blocks.3.norm1.weight is missing in it"):
        fitting.fit_classifier(mini(), deeper)


@pytest.mark.parametrize(
    "extra",
    [
        {"init_values": 1e-5},  # LayerScale, as DINOv2
        {"reg_tokens": 4},
        {"pre_norm": True},
        {"qk_norm": True},
        {"depth": 5},
        {"proj_bias": False},
    ],
    ids=lambda extra: next(iter(extra)),
)
@pytest.mark.parametrize("global_pool", [True, False])
def test_no_tensor_is_dropped_in_silence(extra, global_pool):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 0}
    theirs = timm.create_model("vit_base_patch16_224", **(sizes | extra)).state_dict()
    with pytest.raises(ValueError, match=r"another architecture.*(is not in the model|is missing in it)"):
        fitting.fit_classifier(mini(global_pool=global_pool), theirs)


@pytest.mark.parametrize("name", ["relative_position_bias_table", "attn.relative_position_index"])
def test_a_relative_position_table_is_not_dropped(name):
    encoder = models_mae.mae_vit_mini_patch4().state_dict() | {f"blocks.0.{name}": torch.ones(3, 3)}
    with pytest.raises(ValueError, match=f"blocks.0.{name} is not in the model"):
        fitting.fit_classifier(mini(), encoder)


def test_what_stands_beside_the_encoder_is_left_out():
    encoder = models_mae.mae_vit_mini_patch4().state_dict()  # with decoder and mask token
    beside = ("head_dist.weight", "head.0.running_mean", "head.1.weight", "pooler.dense.weight", "decoder.0.weight")
    state = fitting.fit_classifier(mini(global_pool=True), encoder | {name: torch.ones(2) for name in beside})
    assert state.keys() == {name for name in mini().state_dict() if not name.startswith(("head.", "fc_norm."))}
    with pytest.raises(ValueError, match=r"norm.weight is missing in it"):  # the class token needs it
        fitting.fit_classifier(mini(global_pool=False), {n: v for n, v in encoder.items() if not n.startswith("norm.")})


def test_a_grid_that_is_not_of_the_table_is_refused():
    encoder = models_mae.mae_vit_mini_patch4().state_dict()
    with pytest.raises(ValueError, match=r"has 16 places, and its grid is \[5, 6\]"):
        fitting.fit_classifier(mini(), encoder, old_grid=(5, 6))


def test_global_pooling_is_the_mean_of_the_patches():
    model = mini().eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = model.forward_features(images)
        assert isinstance(model.norm, torch.nn.Identity)
        torch.testing.assert_close(model(images), model.head(model.fc_norm(tokens[:, 1:].mean(1))))


def test_the_probe_trains_its_head_only():
    model = mini(global_pool=False)
    models_vit.add_probe_head(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.1.weight", "head.1.bias"}
    assert not model.head[0].affine
    assert model(torch.randn(4, 3, 16, 16)).shape == (4, 10)


def test_drop_path_rises_with_depth():
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in mini(drop_path=0.3).blocks]
    torch.testing.assert_close(rates, [0.0, 0.1, 0.2, 0.3])


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'vit_base_patch16'"):
        models_vit.create_model("vit_bas_patch16", num_classes=2)
    with pytest.raises(ValueError, match="did you mean 'mae_vit_large_patch16'"):
        models_mae.create_model("mae_vit_larg_patch16")
