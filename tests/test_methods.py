"""Methods: the registry, a stranger's method from a file, its side state, and what the optimizer can do for it."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from faults import injected
from helpers import ROOT, golden, refusal, tensor, tiny_mae, varied_images, write_pictures
from runs import assert_same_run, content, flags, pretrain, stopped

import main_pretrain
import masking
import methods
from methods import At, Inputs
from util import cli
from util.config import PretrainSettings
from util.training import checkpoint
from util.training.averages import Averages
from util.training.step import GradientStep, train_step

AT = At(0, 0.0, 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=1, per_class=22)


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """The method of docs/METHODS.md, in a file of the current folder."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "METHODS.md").read_text(), re.DOTALL)[0]
    assert len(code.splitlines()) <= 40
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)
    return ["--method", "my_method:Distilled", "--method_args", "momentum=0.5", "weight=0.7"]


def step(method, inputs, **options):
    """One SGD step of `method` with learning rate 0.1."""
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    update = GradientStep(method, optimizer, torch.amp.GradScaler(enabled=False), **options)
    return train_step(method, inputs, AT, update, Averages(torch.device("cpu")), "none")


def test_mae_against_the_goldens():
    data = golden("mae_tiny")
    from test_models_mae import golden_mae

    method = methods.create("mae", model=golden_mae(True), strategy=masking.create("random"))
    inputs = Inputs([tensor(data["images"])], tensor(data["noise"]))
    plan = method.choose(inputs, AT)
    (loss,) = method(inputs, plan, AT).values()
    torch.testing.assert_close((loss.sum / loss.count).item(), float(data["norm_pix/loss"]), rtol=1e-5, atol=0)
    assert torch.equal(plan.mask.mask, tensor(data["mask"]).bool())


def test_a_strangers_method_trains_logs_each_term_and_continues_bit_for_bit(strangers, pictures, tmp_path):
    lines = pretrain(pictures, tmp_path / "whole", *strangers, "--masking", "sbam_amr")
    for line in lines:
        assert line["train_loss"] == pytest.approx(line["train_loss_pixels"] + line["train_loss_token"], rel=0.05)
    saved = content(tmp_path / "whole")
    assert saved["method"].keys() == {f"teacher.{name}" for name in saved["model"]}
    assert not torch.equal(
        saved["method"]["teacher.blocks.0.mlp.fc1.weight"], saved["model"]["blocks.0.mlp.fc1.weight"]
    )
    with injected([{"kind": "SIGTERM", "forward": 7}]):
        stopped(pictures, tmp_path / "parts", *strangers, "--masking", "sbam_amr")
    pretrain(pictures, tmp_path / "parts", *strangers, "--masking", "sbam_amr")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    torch.testing.assert_close(content(tmp_path / "parts")["method"], saved["method"], rtol=0, atol=0)


def test_side_state_of_another_method_is_refused(strangers, pictures, tmp_path, capsys):
    pretrain(pictures, tmp_path / "one", *strangers, "--epochs", 1)
    said = refusal(main_pretrain.main, flags(pictures, tmp_path / "one"), capsys)
    assert (
        "trained with --method my_method:Distilled, whose state is not that of --method mae: teacher.cls_token" in said
    )
    whole = content(tmp_path / "one")
    del whole["method"]["teacher.norm.bias"]
    checkpoint.save(tmp_path / "part.pth", whole)
    again = flags(pictures, tmp_path / "two", *strangers, "--resume", tmp_path / "part.pth")
    assert "teacher.norm.bias is missing in it" in refusal(main_pretrain.main, again, capsys)


def test_a_skipped_step_leaves_the_teacher_alone(strangers):
    import my_method

    torch.manual_seed(0)
    method = my_method.Distilled(tiny_mae(), masking.create("sbam_amr"), momentum=0.5)
    images = varied_images(4)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert step(method, [Inputs([images.fill_(float("nan"))], torch.rand(4, 64))]).skipped
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
    assert not step(method, [Inputs([varied_images(4)], torch.rand(4, 64))]).skipped
    student, teacher = method.model.norm.bias, method.teacher.norm.bias
    assert student.abs().max() > 0
    torch.testing.assert_close(teacher, student / 2)  # from 0, half of the way


class Frozen(methods.MAE):
    clip_each = True
    may_freeze = ("mask_token",)

    def schedule(self, at, lr, weight_decay):
        return 2 * lr, weight_decay + at.progress

    def on_gradients(self, at):
        self.model.mask_token.grad = None


def test_gradients_can_be_frozen_and_clipped_one_by_one():
    torch.manual_seed(0)
    method = Frozen(tiny_mae(), masking.create("random"))
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    step(method, [Inputs([varied_images(4)], torch.rand(4, 64))], clip_grad=1e-3, clip_each=True)
    moved = {name: (p - before[name]).norm().item() for name, p in method.named_parameters() if p.requires_grad}
    assert moved.pop("model.mask_token") == 0
    assert max(moved.values()) <= 1.001e-4
    assert sum(value > 0.99e-4 for value in moved.values()) > 20


def test_more_sizes_of_batches_than_torch_has_graphs_for_do_not_end_a_run():
    torch._dynamo.reset()
    method = methods.create("mae", model=tiny_mae(depth=1), strategy=masking.create("random"))
    method.set_normalize(torch.nn.Identity())
    with torch._dynamo.config.patch(recompile_limit=8), torch.no_grad():
        method.compile_parts()
        method.model.compile_blocks(backend="eager")
        for number in range(2, 12):
            method.model.encode(method.model.embed(varied_images(number)), None)


@pytest.mark.parametrize(("name", "more"), [("sbam", []), ("schedule", ["of=sbam_amr"])])
def test_random_masking_comes_first_in_the_same_cells_and_as_many(name, more):
    given = ["--model", "mae_vit_tiny_patch4", "--data_path", "x", "--masking_warmup_epochs", "1", "--masking", name]
    given += ["--mask_ratio", "0.6", "--masking_args", "cell=2", "rounding=removed", *more]
    method = methods.from_settings(cli.parse(PretrainSettings, given))
    mask = method.choose_mask(Inputs([varied_images(3)], torch.rand(3, 64)), AT._replace(epochs=2)).mask
    assert mask.sum(dim=1).tolist() == [40] * 3  # 10 of 16 cells
    cells = mask.view(3, 4, 2, 4, 2).transpose(2, 3).flatten(3)
    assert torch.equal(cells.all(dim=3), cells.any(dim=3))


def test_schedules_of_a_method_reach_the_optimizer(pictures, tmp_path, monkeypatch):
    (tmp_path / "frozen.py").write_text("from test_methods import Frozen\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with injected([{"kind": "SIGTERM", "forward": 3}]):  # what was frozen has no state in the checkpoint
        stopped(pictures, tmp_path / "run", "--method", "frozen:Frozen", "--epochs", 1)
    line = pretrain(pictures, tmp_path / "run", "--method", "frozen:Frozen", "--epochs", 1)[0]
    plain = pretrain(pictures, tmp_path / "plain", "--epochs", 1)[0]
    assert line["train_lr"] == pytest.approx(2 * plain["train_lr"])
    groups = content(tmp_path / "run")["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == pytest.approx([0, 0.05 + 5 / 6])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "mea"], "there is no method 'mea' (did you mean 'mae'?)"),
        (["--method", "math:sqrt"], "--method math:sqrt: is no subclass of methods.Method"),
        (["--method", "no_such:Thing"], "the method 'no_such:Thing' cannot be imported"),
        (["--method_args", "weight=1"], "the method 'mae' has no option 'weight'"),
        (["--method_args", "weight"], "--method_args weight: write name=value"),
    ],
    ids=str,
)
def test_a_mistake_in_a_method_is_one_sentence(pictures, tmp_path, capsys, more, message):
    assert message in refusal(main_pretrain.main, flags(pictures, tmp_path / "run", *more), capsys)


def test_a_name_that_is_taken_is_an_error():
    with pytest.raises(ValueError, match="the method 'mae' is registered already, by MAE"):
        methods.register("mae")(Frozen)
    assert "mae" in methods.available()
