"""Learning rates, parameter groups and LARS against the goldens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import golden, golden_json, tensor, tiny_mae

import models_vit
from methods import Method
from util.lr_sched import learning_rate, set_learning_rate
from util.optim import LARS, layer_decay_groups, pretrain_adamw


@pytest.mark.parametrize("case", golden_json("lr_schedule"), ids=lambda case: f"lr={case['lr']}")
def test_learning_rate_against_the_goldens(case):
    settings = {name: case[name] for name in ("lr", "min_lr", "warmup_epochs", "epochs")}
    rates = [learning_rate(epoch, **settings) for epoch in case["at_epoch"]]
    np.testing.assert_allclose(rates, case["expected"], rtol=1e-12, atol=1e-18)


def test_a_schedule_without_warm_up_and_one_that_is_all_warm_up():
    assert learning_rate(0, lr=1.0, min_lr=0.0, warmup_epochs=0, epochs=10) == 1.0
    assert learning_rate(5, lr=1.0, min_lr=0.0, warmup_epochs=10, epochs=10) == 0.5


@pytest.mark.parametrize("key", golden_json("layer_decay_groups"))
def test_layer_decay_groups_against_the_goldens(key):
    name, decay, pooling = key.split("/")
    with torch.device("meta"):
        model = models_vit.create_model(name, num_classes=1000, global_pool=pooling == "global_pool")
    groups = layer_decay_groups(model, 0.05, float(decay.removeprefix("layer_decay=")))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    expected = golden_json("layer_decay_groups")[key]
    assert set(found) == set(expected)
    for parameter, values in expected.items():
        np.testing.assert_allclose(found[parameter], values, rtol=1e-12, err_msg=parameter)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_lars_against_the_goldens():
    data = golden("lars")
    parameters = {name: torch.nn.Parameter(tensor(data[f"{name}0"])) for name in ("W", "b", "Z")}
    options = {name: float(data[name]) for name in ("lr", "weight_decay", "momentum", "trust_coefficient")}
    optimizer = LARS(parameters.values(), **options)
    for step in range(5):
        for name, parameter in parameters.items():
            parameter.grad = tensor(data[f"grad{step}/{name}"])
        optimizer.step()
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach(), data[f"after{step}/{name}"], rtol=1e-5, err_msg=name)


def test_lars_decays_matrices_only():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    LARS([matrix, vector], lr=1.0, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 1 - 0.001))  # |p| / |0.5 p| * 0.5 p * 0.001
    assert torch.equal(vector.detach(), torch.ones(2))


def test_pretraining_decays_the_tokens_but_no_biases():
    model = tiny_mae()
    decayed = {
        id(p) for group in pretrain_adamw(Method(model).parameter_groups(0.05), torch.device("cpu")).param_groups
        if group["weight_decay"] > 0 for p in group["params"]
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        expected = parameter.requires_grad and parameter.ndim > 1
        assert (id(parameter) in decayed) == expected, name
    assert id(model.cls_token) in decayed


def test_every_group_gets_its_scale():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr_scale": 0.5}], lr=0)
    set_learning_rate(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] == 0.1
