"""Cells of patches, exact fractions, needs, thrown tokens, and rows that remove nothing."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from helpers import masked

import masking
from masking.cells import Cells


@pytest.mark.parametrize("name", ["random", "sbam", "sbam_amr"])
def test_cells_are_removed_as_a_whole(name):
    torch.manual_seed(0)
    tokens, cells = torch.randn(5, 8 * 12, 16), Cells(8, 12, 4)
    mask = masking.create(name, cell=4, mask_ratio=0.5)(tokens, grid=(8, 12)).mask
    share = cells.mean(mask.float())
    assert set(share.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(cells.spread(share).bool(), mask)
    if name != "sbam_amr":
        assert (share.sum(dim=1) == 3).all()


def test_noise_ranks_cells_in_place_of_tokens():
    tokens, noise = torch.zeros(2, 16, 4), torch.rand(2, 16)
    strategy = masking.create("random", cell=2)
    mask = strategy(tokens, noise=noise, grid=(4, 4))
    lowest = noise[:, :4].argmin(dim=1)  # one cell of four is kept
    assert torch.equal(mask.mask, Cells(4, 4, 2).spread(torch.nn.functional.one_hot(lowest, 4) == 0))
    assert torch.equal(strategy(tokens, noise=noise[:, :4], grid=(4, 4)).mask, mask.mask)


def test_a_grid_that_cells_do_not_divide_is_named():
    with pytest.raises(ValueError, match="cell is 4, but the images have 14 x 14 patches; choose a cell"):
        masking.check(masking.create("random", cell=4), 196, grid=(14, 14))


@pytest.mark.parametrize("name", masking.available())
def test_a_fraction_is_exact(name):
    options = {"sbam_amr": {"delta_r": "1/49"}, "attmask_hint": {"show_max": 0}}.get(name, {})
    strategy = masking.create(name, mask_ratio="32/49", **options)
    assert strategy.mask_ratio == Fraction(32, 49)
    kept = masked(strategy, torch.randn(3, 49, 8)).num_keep
    assert ((kept - 17).abs() <= (name == "sbam_amr")).all()


def test_remove_highest_may_remove_none_or_all():
    scores = torch.tensor([[0.3, 0.1, 0.2], [0.3, 0.1, 0.2], [0.5, 0.5, 0.5], [0.3, 0.1, 0.2]])
    removed = masking.remove_highest(scores, torch.tensor([0, 2, 1, 3]))
    expected = [[False, False, False], [True, False, True], [False, False, True], [True, True, True]]
    assert removed.tolist() == expected
    assert masking.remove_highest(scores, 1).sum(dim=1).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="one count for each of 4 images"):
        masking.remove_highest(scores, torch.tensor([1, 2]))


@pytest.mark.parametrize("num_keep", [3, torch.tensor([3, 5])], ids=["equal", "each its own"])
def test_thrown_tokens_are_removed_and_not_predicted(num_keep):
    scores = torch.rand(2, 12)
    mask = masking.mask_from_scores(scores, num_keep, num_thrown=4)
    keep = torch.as_tensor(num_keep).expand(2)
    assert torch.equal(mask.thrown, (mask.ids_restore >= keep[:, None]) & (mask.ids_restore < keep[:, None] + 4))
    assert (mask.mask | ~mask.thrown).all()
    assert mask.predicted.sum(dim=1).tolist() == (12 - 4 - keep).tolist()
    with pytest.raises(ValueError, match="none be left to predict"):
        masking.mask_from_scores(scores, num_keep, num_thrown=9)


class OnGrid:
    needs = frozenset({"grid", "progress"})

    def __call__(self, tokens, noise=None, *, grid, progress):
        assert grid == (2, 8)
        return masking.mask_from_scores(masking.draw_noise(tokens, noise), 1 + int(8 * progress))


def test_a_strategy_is_called_with_what_it_needs_by_name():
    tokens = torch.zeros(2, 16, 4)
    mask = masking.call(OnGrid(), tokens, grid=(2, 8), progress=0.5, patch_loss=None)
    assert mask.num_keep.tolist() == [5, 5]
    assert masking.reads_tokens(OnGrid())
    assert not masking.reads_tokens(masking.create("random"))
    assert masking.reads_tokens(lambda tokens, noise=None: None)


def test_needs_that_are_not_given_or_unknown_are_named():
    strategy = OnGrid()
    with pytest.raises(ValueError, match="--masking OnGrid: needs progress, which this method does not give"):
        masking.check(strategy, 16, grid=(2, 8), offers=("grid",))
    strategy.needs = {"gird"}
    with pytest.raises(ValueError, match=r"needs 'gird' .did you mean 'grid'"):
        masking.check(strategy, 16)
