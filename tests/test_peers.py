"""Losses against those of lightly, which others wrote: values to 1e-6, gradients, centres."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_mae, varied_images
from test_ibot import inputs, tiny

import masking
from methods import CMAE, At, Inputs

lightly = pytest.importorskip("lightly.loss")

AT = At(5, 3.0, 40)  # in the warm-up of the teacher's temperature


def ibot(strategy: str = "random", **options):
    """A method whose centres are not 0 and whose teacher is not the student, its inputs, and its plan."""
    method, given = tiny(strategy, **options), inputs(6)
    for center in (method.center_cls, method.center_patch):
        torch.nn.init.normal_(center, std=0.1)
    for parameter in method.student.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return method, given, method.choose(given, AT)


def student_logits(method, given, plan) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Class logits of each view by itself, and logits (2 N, L, K) of all patches of the masked global views."""
    head = method.head
    latent = method.student_latent(torch.cat(given.views[:2]), plan.extra["mask"])
    local = [method.student.encode(method.student.embed_view(view))[:, 0] for view in given.views[2:]]
    classes = [head.of_images(head.project(tokens)) for tokens in (*latent[:, 0].chunk(2), *local)]
    return classes, head.of_patches(head.project(latent[:, 1:]))


@torch.no_grad()
def teacher_logits(method, given) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The same of the teacher, for the whole global views."""
    latent, _ = method.teacher_latent(torch.cat(given.views[:2]))
    unit = method.teacher_head.project(latent)
    return method.teacher_head.of_images(unit[:, 0]).chunk(2), method.teacher_head.of_patches(unit[:, 1:])


def gradients(loss: torch.Tensor, method) -> dict[str, torch.Tensor]:
    """The gradients of what `loss` depends on; the graph is kept."""
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def assert_equal(found: torch.Tensor, expected: torch.Tensor, method) -> None:
    """Loss and gradients; some of CMAE's are 0 in exact arithmetic, and noise of 1e-6 here."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    ours, theirs = gradients(found, method), gradients(expected, method)
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_the_loss_between_views_and_its_centre_are_those_of_dino(norm_last_layer):
    method, given, plan = ibot(norm_last_layer=norm_last_layer)
    loss = lightly.DINOLoss(output_dim=32, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=30)
    loss.center.copy_(method.center_cls.view_as(loss.center))
    found = method(given, plan, AT)["cls"]
    expected = loss(list(teacher_logits(method, given)[0]), student_logits(method, given, plan)[0], epoch=3)
    assert_equal(found.sum / found.count, expected, method)
    method.after_step(AT, torch.tensor(True))
    torch.testing.assert_close(method.center_cls, loss.center.view_as(method.center_cls), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", ["random", "block", "sbam_amr"])
def test_the_loss_of_patches_is_that_of_ibot(strategy):
    """Also of views that are whole: a third of them has the ratio 0."""
    method, given, plan = ibot(strategy, patch_out_dim=24)
    mask = plan.extra["mask"]
    assert 0 < mask.any(dim=1).sum() < len(mask)
    loss = lightly.IBOTPatchLoss(output_dim=24)
    loss.center.center.copy_(method.center_patch.view_as(loss.center.center))
    found = method(given, plan, AT)["patch"]
    teacher, student = teacher_logits(method, given)[1], student_logits(method, given, plan)[1]
    temperature = method.temperature_at("teacher_patch_temp", 3)
    expected = loss(teacher[mask], student[mask], mask.unflatten(1, (8, 8)), temperature)
    assert_equal(found.sum / found.count, expected, method)


def test_the_contrast_is_infonce():
    """Each image's own target against those of the others, which lightly takes from a memory bank."""
    torch.manual_seed(0)
    method = CMAE(tiny_mae(masking=masking.create("random")), masking.create("random"), hidden_dim=24, proj_dim=12)
    images = varied_images(6)
    given = Inputs([images, images.flip(3)], torch.rand(6, 64))
    for parameter in method.teacher.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    plan = method.choose(given, AT)
    found, targets = method(given, plan, AT)["contrast"], plan.extra["targets"]
    latent = method.model.forward_encoder(images, plan.mask)
    pooled = method.feature_decoder(method.model, latent, plan.mask).mean(dim=1)
    online = method.predictor(method.projector(pooled))
    each = []
    for row in range(6):
        loss = lightly.NTXentLoss(temperature=method.temperature, memory_bank_size=(5, 12))
        loss.memory_bank.bank.copy_(F.normalize(targets[torch.arange(6) != row], dim=1))
        each.append(loss(online[row : row + 1], targets[row : row + 1]))
    assert_equal(found.sum / found.count, 2 * method.temperature * torch.stack(each).mean(), method)
