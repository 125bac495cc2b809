"""Tokens that are thrown pass through no decoder: thrown by a strategy, or not drawn by `--decode_ratio`."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from helpers import tiny_mae, varied_images

import masking


def one_image(model, image, mask, row):
    """The plainest reference: encoder and decoder of one image, token by token; the loss of each predicted token."""
    kept = (~mask.mask[row]).nonzero().flatten()
    decoded = (~mask.thrown[row]).nonzero().flatten()
    tokens = model.embed(image)[:, kept]
    x = torch.cat([model.cls_token + model.pos_embed[:, :1], tokens], dim=1)
    for block in model.blocks:
        x = block(x)
    encoded = model.decoder_embed(model.norm(x))
    place = {int(position): 1 + i for i, position in enumerate(kept)}
    rows = [encoded[:, 0]] + [
        encoded[:, place[int(position)]] if int(position) in place else model.mask_token[:, 0] for position in decoded
    ]
    x = torch.stack(rows, dim=1)
    x = x + torch.cat([model.decoder_pos_embed[:, :1], model.decoder_pos_embed[:, 1:][:, decoded]], dim=1)
    for block in model.decoder_blocks:
        x = block(x)
    pred = model.decoder_pred(model.decoder_norm(x))[0, 1:]
    error = (pred - model.patchify(image)[0, decoded]).square().mean(dim=1)
    return pred, error[mask.predicted[row, decoded]]


@pytest.mark.parametrize(
    ("keep", "throw"),
    [
        (20, 11),
        (torch.tensor([20, 5, 40]), 11),
        (20, torch.tensor([0, 30, 7])),
        (torch.tensor([20, 5, 40]), torch.tensor([11, 26, 0])),
    ],
    ids=["both equal", "thrown equal", "kept equal", "neither"],
)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_thrown_tokens_take_part_in_nothing(keep, throw, share):
    torch.manual_seed(0)
    model, images = tiny_mae(), varied_images(4)[1:]
    mask = masking.mask_from_scores(torch.rand(3, 64), keep, num_thrown=throw)
    mask = masking.predict_part(mask, share)
    loss, pred = model.forward_masked(images, mask)
    rows = pred if pred.ndim == 2 else pred.flatten(0, 1)
    sizes = (~mask.thrown).sum(dim=1).tolist()
    total = 0.0
    for row, part in enumerate(rows.split(sizes)):
        alone, errors = one_image(model, images[row : row + 1], mask, row)
        torch.testing.assert_close(part, alone, rtol=1e-5, atol=1e-5)
        total = total + errors.sum() * (1 if mask.weight is None else mask.weight[row])
    expected = total / mask.loss_weight.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.01, "1/3", 0.5, 0.99])
@pytest.mark.parametrize("keep", [20, torch.tensor([1, 30, 62, 33])], ids=["equal", "each its own"])
def test_a_part_is_drawn_evenly_and_counts_for_all(share, keep):
    torch.manual_seed(0)
    whole = masking.mask_from_scores(torch.rand(4, 64), keep)
    weights = torch.zeros(4, 64)
    for _ in range(2000):
        part = masking.predict_part(whole, share)
        assert torch.equal(part.mask, whole.mask)
        assert (
            part.predicted.sum(dim=1) == (whole.mask.sum(dim=1) * float(Fraction(share)) + 1e-6).floor().clamp(min=1)
        ).all()
        assert part.host_thrown == tuple(part.thrown.sum(dim=1).tolist())
        weights += part.loss_weight / 2000
    removed = whole.mask.sum(dim=1)
    assert torch.allclose(part.loss_weight.sum(dim=1), removed.float())
    spread = (removed / part.predicted.sum(dim=1) - 1).clamp(min=0).sqrt() / 2000**0.5  # of a mean of 2000 draws
    assert ((weights - whole.mask.float()).abs() <= 5 * spread[:, None] + 1e-5).all()


def test_all_is_the_same_mask():
    mask = masking.mask_from_scores(torch.rand(2, 16), 4)
    assert masking.predict_part(mask, 1.0) is mask
    assert mask.decoded is None


def test_noise_decides_which_are_predicted():
    mask, noise = masking.mask_from_scores(torch.rand(2, 16), 4), torch.rand(2, 16)
    part = masking.predict_part(mask, 0.25, noise)
    lowest = noise.masked_fill(~mask.mask, 2).argsort(dim=1)[:, :3]
    assert torch.equal(part.predicted, torch.zeros(2, 16, dtype=torch.bool).scatter(1, lowest, True))


def test_a_count_that_varies_and_a_part_compile_without_a_graph_for_each():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    strategy = masking.create("schedule", end=0.25)
    model, images = tiny_mae(masking=strategy), varied_images(8)
    masks = [
        masking.predict_part(model.choose_mask(images, torch.rand(8, 64), progress=progress), 0.5, torch.rand(8, 64))
        for progress in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    plain = [model.forward_masked(images, mask)[0] for mask in masks]
    model.compile_blocks(backend="aot_eager")
    compiled = [model.forward_masked(images, mask)[0] for mask in masks]
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6  # one for each count would be 18
