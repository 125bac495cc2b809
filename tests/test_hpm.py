"""HPM: against the goldens, its teacher, and runs that continue."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from faults import injected
from helpers import golden, refusal, tiny_mae, varied_images, write_pictures
from reference import hpm
from runs import assert_same_run, content, flags, pretrain, stopped

import main_pretrain
import masking
from methods import HPM, At, Inputs
from methods.hpm import relative_loss
from util.training.averages import Averages
from util.training.step import GradientStep, train_step

AT = At(0, 0.0, 4)
GIVEN = ["--method", "hpm", "--masking", "hpm", "--clip_grad", 5, "--epochs", 3]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), classes=1, per_class=14)


def test_everything_against_the_goldens():
    data = golden("hpm_tiny")
    inputs = ("config", "images", "epochs", "ties/patch_loss", "ema_updated/decay")
    given = {k: v for k, v in data.items() if k in inputs or k.startswith(("state/", "ema/", "random/"))}
    found = hpm.compute(given)
    expected = data.keys() - given.keys()
    assert found.keys() >= expected
    for name in expected:
        value, known, tolerance = found[name], data[name], 1e-4 if "/grad" in name else 1e-5
        if known.dtype.kind in "bi":
            np.testing.assert_array_equal(value, known, err_msg=name)
        else:
            bound = tolerance * max(np.abs(known).max(), 1e-3)
            np.testing.assert_allclose(value, known, rtol=0, atol=bound, err_msg=name)


def test_the_reference_keeps_as_many_as_the_release():
    """It rounds the kept ones down: int(64 * 0.3)."""
    data = golden("hpm_tiny")
    config = json.loads(str(data["config"])) | {"mask_ratio": 0.7, "train_mask": "mask/epoch_0"}
    given = {k: v for k, v in data.items() if k.startswith(("state/", "ema/", "images", "random/epoch_0/"))}
    found = hpm.compute(given | {"config": np.array(json.dumps(config))})
    assert (found["mask/epoch_0"].sum(axis=1) == 64 - 19).all()
    assert found["raw_pix/patch_loss"].shape == (3, 64 - 19)


def test_the_share_of_hard_patches_is_exact():
    strategy = masking.create("hpm")
    counts = [strategy.hard_count(147, epoch, 200) for epoch in range(200)]
    assert counts == [int(147 * Fraction(epoch + 1, 400)) for epoch in range(200)]
    assert counts[:3] == [0, 0, 1]  # the first hard one in epoch 2 of 200
    assert counts[-1] == 73


def test_the_hardest_are_removed_and_the_rest_by_noise():
    loss, noise = torch.rand(5, 64), torch.rand(5, 64)
    mask = masking.call(masking.create("hpm"), torch.zeros(5, 64, 1), noise, patch_loss=loss, epoch=(99, 100))
    hardest = masking.remove_highest(loss, 24)
    assert (mask.mask | ~hardest).all()
    rest = noise.masked_fill(hardest, -1)
    for removed, values, hard in zip(mask.mask, rest, hardest, strict=True):
        assert values[removed & ~hard].min() > values[~removed].max()


def test_the_relative_loss_pair_by_pair():
    true, predicted, among = torch.rand(2, 6).round(decimals=1), torch.randn(2, 6), torch.rand(2, 6) > 0.3
    total, pairs = 0.0, 0
    for t, p, used in zip(true, predicted, among, strict=True):
        for i in range(6):
            for j in range(6):
                if used[i] and used[j] and t[i] != t[j]:
                    difference = p[j] - p[i] if t[j] > t[i] else p[i] - p[j]
                    total, pairs = total - torch.log(torch.sigmoid(difference)), pairs + 1
    found = relative_loss(true, predicted, among)
    torch.testing.assert_close(found[0], torch.as_tensor(total))
    assert found[1] == pairs


@pytest.mark.parametrize("strategy", ["hpm", "sbam_amr"])
@pytest.mark.parametrize("share", [Fraction(1), Fraction(1, 2)], ids=str)
def test_micro_batches_make_the_same_step(strategy, share):
    """Also where the images' counts differ, and where only a part is predicted."""
    gradients = []
    for parts in (1, 3):
        torch.manual_seed(0)
        method = HPM(tiny_mae(), masking.create(strategy))
        method.decode_ratio = share
        images, noise, second = varied_images(7)[1:], torch.rand(6, 64), torch.rand(6, 64)
        batches = [
            Inputs([a], b, decode_noise=c)
            for a, b, c in zip(*(x.tensor_split(parts) for x in (images, noise, second)), strict=True)
        ]
        update = GradientStep(method, Recording(method), torch.amp.GradScaler(enabled=False))
        train_step(method, batches, AT, update, Averages(torch.device("cpu")), "none")
        gradients.append(update.optimizer.seen)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


class Recording(torch.optim.SGD):
    """Remembers the gradients of its last step."""

    def __init__(self, method):
        super().__init__([p for p in method.parameters() if p.requires_grad], 0.1)

    def step(self, closure=None):
        self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]
        return super().step(closure)


def test_the_teacher_follows_and_a_skipped_step_leaves_it_alone():
    method = HPM(tiny_mae(), masking.create("hpm"), momentum=0.9)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(1)
    method.after_step(AT, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    method.after_step(AT, torch.tensor(True))
    after = method.teacher.state_dict()
    torch.testing.assert_close(after["model.cls_token"], before["model.cls_token"] + 0.1)
    assert torch.equal(after["predictor.pred.weight"], before["predictor.pred.weight"])
    assert not any(name.startswith("model.decoder_blocks") for name in after)


def test_the_teacher_is_compiled_too():
    method = HPM(tiny_mae(), masking.create("hpm"))
    method.set_normalize(torch.nn.Identity())
    before = method.teacher["model"]._dense_block
    method.compile_parts()
    assert method.teacher["model"]._dense_block is not before


def test_the_momentum_is_that_of_the_paper():
    method = HPM(tiny_mae(), masking.create("hpm"))
    found = [method.momentum_at(At(0, epoch, 800)) for epoch in (0, 0.9, 1, 50, 100, 700)]
    assert found == pytest.approx([0.999, 0.999, 0.999009, 0.99945, 0.9999, 0.9999])


def test_a_run_continues_bit_for_bit(pictures, tmp_path):
    lines = pretrain(pictures, tmp_path / "whole", *GIVEN)
    assert lines[-1]["train_loss"] == pytest.approx(
        lines[-1]["train_loss_pixels"] + lines[-1]["train_loss_hardness"], rel=0.05
    )
    with injected([{"kind": "SIGTERM", "forward": 6}]):
        stopped(pictures, tmp_path / "parts", *GIVEN)
    pretrain(pictures, tmp_path / "parts", *GIVEN)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (content(tmp_path / name)["method"] for name in ("whole", "parts"))
    assert any(name.startswith("predictor.") for name in whole)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_a_teacher_starts_with_the_weights_to_start_from(pictures, tmp_path):
    pretrain(pictures, tmp_path / "mae", "--epochs", 1)
    path = tmp_path / "mae" / "checkpoint-last.pth"
    main_pretrain.main(flags(pictures, tmp_path / "hpm", *GIVEN, "--epochs", 0, "--finetune", path))
    teacher, weights = content(tmp_path / "hpm")["method"], content(tmp_path / "mae")["model"]
    assert torch.equal(teacher["teacher.model.blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc1.weight"])


def test_what_does_not_go_together_is_named(pictures, tmp_path, capsys):
    said = refusal(main_pretrain.main, flags(pictures, tmp_path, "--masking", "hpm"), capsys)
    assert "--masking hpm: needs patch_loss, which --method mae does not give" in said
    for options, message in (("momentum=2", "momentum is 2"), ("objective=best", "choose relative or absolute")):
        given = flags(pictures, tmp_path, *GIVEN, "--method_args", options)
        assert message in refusal(main_pretrain.main, given, capsys)
    with pytest.raises(ValueError, match="final_share is 2"):
        masking.create("hpm", final_share=2)
