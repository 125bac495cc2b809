"""A checkpoint to continue is checked before it is used: kinds, numbers, and every tensor of the optimizer."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch
from helpers import refusal, tiny_mae

import main_finetune
import main_linprobe
import main_pretrain
from methods import Method
from util import optim
from util.training import checkpoint, training_state

FLAGS = "--in_chans 1 --input_size 16 --batch_size 16 --epochs 1 --warmup_epochs 0 --num_workers 0 --data_path"
MODELS = {main_pretrain: "mae_vit_mini_patch4", main_finetune: "vit_mini_patch4", main_linprobe: "vit_mini_patch4"}


def flags(main, pictures, output, *more) -> list:
    own = ["--aa", "null", "--reprob", 0] if main is main_finetune else []
    return [*FLAGS.split(), pictures, "--model", MODELS[main], "--output_dir", output, *own, *more]


@pytest.fixture(scope="module", params=MODELS, ids=lambda main: main.__name__)
def finished(request, pictures, tmp_path_factory):
    """A task, and the checkpoint of one epoch of it."""
    folder = tmp_path_factory.mktemp("run")
    request.param.main([str(flag) for flag in flags(request.param, pictures, folder)])
    return request.param, checkpoint.load(folder / checkpoint.LAST)


def first_state(content: dict) -> dict:
    return next(iter(content["optimizer"]["state"].values()))


def replace_tensor(change):
    """Change one tensor of the optimizer's state that has its parameter's shape."""

    def apply(content: dict) -> None:
        state = first_state(content)
        name = next(name for name, tensor in state.items() if tensor.ndim)
        state[name] = change(state[name])

    return apply


def setting(**values):
    return lambda content: content.update(values)


def averages(**values):
    return setting(averages=values)


BROKEN = {
    "shape": (replace_tensor(lambda t: t.flatten()[:1]), "and must be"),
    "empty": (replace_tensor(lambda t: t[:0]), "and must be"),
    "larger": (replace_tensor(lambda t: torch.zeros(2, *t.shape)), "and must be"),
    "dtype": (replace_tensor(lambda t: t.half()), "and must be"),
    "sparse": (replace_tensor(lambda t: t.to_sparse()), "and must be"),
    "meta": (replace_tensor(lambda t: t.to("meta")), "and must be"),
    "number": (replace_tensor(lambda t: 3.0), "is a float, and must be"),
    "text": (replace_tensor(lambda t: "x"), "is a str, and must be"),
    "nan": (replace_tensor(lambda t: t * torch.nan), "is not finite"),
    "no_state": (lambda c: c["optimizer"].pop("state"), "its optimizer's state is empty"),
    "emptied": (lambda c: c["optimizer"].update(state={}), "its optimizer's state is empty"),
    "state_list": (lambda c: c["optimizer"].update(state=[1]), "its state is [1], and must be a dictionary"),
    "one_gone": (lambda c: c["optimizer"]["state"].popitem(), "state holds nothing and not"),
    "one_emptied": (lambda c: first_state(c).clear(), "state holds nothing and not"),
    "name_gone": (lambda c: first_state(c).popitem(), "and not"),
    "name_more": (lambda c: first_state(c).update(other=torch.ones(1)), "other and not"),
    "fewer": (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), "parameters in"),
    "twice": (lambda c: c["optimizer"]["param_groups"][0]["params"].__setitem__(-1, 0), "its optimizer"),
    "groups": (lambda c: c["optimizer"].update(param_groups=[1]), "its param_groups is [1]"),
    "params": (lambda c: c["optimizer"]["param_groups"][0].update(params="all"), "its params is 'all'"),
    "no_groups": (lambda c: c["optimizer"].update(param_groups=[]), "holds weights but no training state"),
    "optimizer": (setting(optimizer="adam"), "its optimizer is 'adam', and must be a dictionary"),
    "epoch_low": (setting(epoch=-7), "its epoch is -7, and must be at least -1"),
    "epoch_high": (setting(epoch=10**30), "its epoch is 1000000000000000000000000000000, and must be a whole number"),
    "epoch_text": (setting(epoch="3"), "its epoch is '3', and must be a whole number"),
    "epoch_bool": (setting(epoch=True), "its epoch is True, and must be a whole number"),
    "epoch_tensor": (setting(epoch=torch.tensor(3)), "its epoch is tensor(3), and must be a whole number"),
    "epoch_float": (setting(epoch=0.0), "its epoch is 0.0, and must be a whole number"),
    "no_epoch": (setting(epoch=None), "holds weights but no training state"),
    "step_low": (setting(step=-1), "its step is -1, and must be at least 0"),
    "step_high": (setting(step=10**9), "its step is 1000000000, which does not lie in"),
    "step_text": (setting(step="3"), "its step is '3'"),
    "steps": (setting(steps_per_epoch=0), "its steps_per_epoch is 0"),
    "steps_text": (setting(steps_per_epoch=[3]), "its steps_per_epoch is [3]"),
    "images": (setting(num_images="all"), "its num_images is 'all'"),
    "batch": (setting(effective_batch_size="large"), "its effective_batch_size is 'large'"),
    "best": (setting(best_acc1="high"), "its best_acc1 is 'high'"),
    "best_nan": (setting(best_acc1=float("nan")), "its best_acc1 is nan"),
    "classes": (setting(classes=[1, 2]), "its classes is [1, 2]"),
    "classes_text": (setting(classes="abc"), "its classes is 'abc'"),
    "grid": (setting(grid="4x4"), "its grid is '4x4'"),
    "averages": (setting(averages=[1]), "its averages is [1]"),
    "averages_text": (averages(sums={"loss": "x"}), "its averages is"),
    "averages_short": (averages(sums={"loss": [1.0]}), "its averages must be pairs of numbers"),
    "scaler": (setting(scaler="x"), "its scaler is 'x'"),
    "scaler_part": (setting(scaler={"scale": 1.0}), "its scaler is not the state of a GradScaler"),
    "scaler_text": (setting(scaler={"scale": "x"}), "its scaler is {'scale': 'x'}"),
    "args": (setting(args=[1]), "its args are a list"),
    "mean": (lambda c: c["args"].update(mean="grey"), "its mean is 'grey'"),
    "model": (lambda c: c["model"].update(pos_embed=c["model"]["pos_embed"] * torch.inf), "pos_embed is not finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_one_sentence_with_the_file_s_name(finished, pictures, tmp_path, capsys, case):
    main, content = finished
    change, message = BROKEN[case]
    content = copy.deepcopy(content)
    change(content)
    torch.save(content, tmp_path / "broken.pth")
    arguments = flags(main, pictures, tmp_path / "run", "--resume", tmp_path / "broken.pth", "--epochs", 2)
    said = refusal(main.main, arguments, capsys)
    assert "broken.pth: " in said
    assert message in said


def test_a_whole_one_continues(finished, pictures, tmp_path):
    main, content = finished
    checkpoint.save(tmp_path / "whole.pth", content)
    more = ["--resume", tmp_path / "whole.pth", "--epochs", 2]
    main.main([str(flag) for flag in flags(main, pictures, tmp_path / "run", *more)])
    assert checkpoint.load(tmp_path / "run" / checkpoint.LAST)["epoch"] == 1


def test_side_state_that_is_none_of_this_method_s_is_refused(finished, pictures, tmp_path, capsys):
    main, content = finished
    sides = [({"w": torch.ones(1)}, "w is not in the model"), ({"w": {"x": 1}}, "must be a dictionary of tensors")]
    sides.append(({"w": torch.ones(1)}, "trained with --method mae, whose state is not"))
    for number, (side, message) in enumerate(sides):
        path = tmp_path / f"{number}.pth"
        args = argparse.Namespace(**content["args"]) if number == 2 else content["args"]  # as in a file of MAE's
        checkpoint.save(path, content | {"method": side, "args": args})
        said = refusal(main.main, flags(main, pictures, tmp_path / "run", "--resume", path, "--epochs", 2), capsys)
        assert message in said


def test_an_untrained_model_continues(pictures, tmp_path):
    for epochs in (0, 1):
        main_pretrain.main([str(flag) for flag in flags(main_pretrain, pictures, tmp_path, "--epochs", epochs)])
    assert checkpoint.load(tmp_path / checkpoint.LAST)["epoch"] == 0


def optimizers():
    cpu = torch.device("cpu")
    yield lambda model: optim.pretrain_adamw(Method(model).parameter_groups(0.05), cpu)
    yield lambda model: optim.LARS(list(model.parameters()))


@pytest.mark.parametrize("make", optimizers(), ids=["adamw", "lars"])
def test_a_loaded_state_steps_as_the_one_that_was_saved(make):
    one, two = tiny_mae(), tiny_mae()
    two.load_state_dict(one.state_dict())
    first, second = make(one), make(two)
    step(one, first, 0)
    state = copy.deepcopy(first.state_dict())
    state["param_groups"][0] |= {"weight_decay": 0.9, "lr": 5.0}  # the options are the command's own
    training_state.load_optimizer(second, state)
    two.load_state_dict(one.state_dict())
    step(one, first, 1)
    step(two, second, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_tensors_that_share_memory_in_the_file_do_not_in_the_optimizer():
    model = tiny_mae()
    optimizer = optim.pretrain_adamw(Method(model).parameter_groups(0.05), torch.device("cpu"))
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["exp_avg_sq"] = entry["exp_avg"] = torch.ones(()).expand(entry["exp_avg"].shape)
    fresh = optim.pretrain_adamw(Method(model).parameter_groups(0.05), torch.device("cpu"))
    training_state.load_optimizer(fresh, state)
    found = fresh.state[model.patch_embed.proj.weight]
    assert found["exp_avg"].is_contiguous()
    assert found["exp_avg"].data_ptr() != found["exp_avg_sq"].data_ptr()


def step(model, optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
