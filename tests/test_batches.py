"""Which samples make up a step: all of them, once, the same global batches for any number of processes."""

from __future__ import annotations

import pytest
import torch

from util import seeding
from util.data.step_loader import StepLoader, StepPlan, evaluation_loader


def steps(num_samples, batch_size, accum_iter, world_size, multiple=1, epoch=0):
    """For each step, for each rank, its micro-batches."""
    order = seeding.permutation(0, epoch, num_samples)
    plans = [StepPlan(num_samples, batch_size, accum_iter, rank, world_size, multiple) for rank in range(world_size)]
    return [[plan.micro_batches(order, step) for plan in plans] for step in range(plans[0].steps_per_epoch)]


LAYOUTS = [(8, 1, 1), (4, 2, 1), (2, 1, 4), (1, 2, 4), (2, 2, 2)]  # effective batch 8


@pytest.mark.parametrize("num_samples", [8, 9, 11, 12, 13, 16, 20, 41, 100, 5])
def test_every_sample_once_and_the_same_global_batches_for_any_layout(num_samples):
    reference = None
    for layout in LAYOUTS:
        epoch = steps(num_samples, *layout)
        sets = [sorted(i for rank in step for micro in rank for i in micro) for step in epoch]
        assert sorted(i for step in sets for i in step) == list(range(num_samples))
        reference = reference or sets
        assert sets == reference
        for step in epoch:
            assert all(len(rank) >= 1 for rank in step)
            assert all(1 <= len(micro) <= layout[0] for rank in step for micro in rank)
            assert 4 <= sum(len(micro) for rank in step for micro in rank) <= 12 or len(epoch) == 1


@pytest.mark.parametrize("num_samples", [16, 17, 19, 21, 39])
@pytest.mark.parametrize("layout", [(8, 1, 1), (4, 2, 1), (2, 1, 4), (2, 2, 2)])
def test_even_micro_batches_leave_out_less_than_a_pair_per_process(num_samples, layout):
    used = [micro for step in steps(num_samples, *layout, multiple=2) for rank in step for micro in rank]
    assert all(len(micro) % 2 == 0 and micro for micro in used)
    counted = sorted(i for micro in used for i in micro)
    assert len(set(counted)) == len(counted) > num_samples - 2 * layout[2]


def test_full_steps_have_the_asked_shape():
    assert [len(micro) for rank in steps(64, 4, 2, 2)[0] for micro in rank] == [4, 4, 4, 4]


def test_epochs_and_seeds_have_their_own_order():
    orders = [seeding.permutation(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == seeding.permutation(0, 0, 50)


def test_too_few_images_are_a_clear_error():
    with pytest.raises(ValueError, match="3 training images are too few for 4 process"):
        StepPlan(3, 1, 1, 0, 4)


class Keys(torch.utils.data.Dataset):
    """Gives back the key it was asked for."""

    def __len__(self):
        return 21

    def __getitem__(self, key):
        return torch.tensor(key)


def collect(workers, epoch, start_step=0):
    loader = StepLoader(Keys(), StepPlan(21, 2, 2), seed=0, num_workers=workers)
    result = []
    for _ in range(2):  # the second pass uses the same workers
        result = [
            (step, [micro.batch.tolist() for micro in micro_batches])
            for step, micro_batches in loader.steps(epoch, start_step)
        ]
    return result


def test_the_number_of_workers_changes_nothing_and_a_start_in_mid_epoch_continues_it():
    whole = collect(0, epoch=3)
    assert whole == collect(2, epoch=3)
    assert whole[2:] == collect(0, epoch=3, start_step=2)
    assert [step for step, _ in whole] == [0, 1, 2, 3, 4]
    assert len(whole[0][1]) == 2
    assert {key[0] for _, micro in whole for batch in micro for key in batch} == {3}


def test_evaluation_counts_every_image_once():
    seen = []
    for rank in range(3):
        for batch in evaluation_loader(Keys(), range(rank, 21, 3), batch_size=4):
            seen += batch[:, 1].tolist()
    assert sorted(seen) == list(range(21))


@pytest.mark.parametrize("num_samples", range(8, 40))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_plan_whose_rest_may_not_join_gives_every_process_one_micro_batch_in_each_step(num_samples, world_size):
    """Else processes that meet in every micro-batch, as under CMAE, would wait for each other for ever."""
    order = list(range(num_samples))
    plans = [StepPlan(num_samples, 4, 1, rank, world_size, joins=False) for rank in range(world_size)]
    parts = [plan.micro_batches(order, step) for plan in plans for step in range(plan.steps_per_epoch)]
    assert {len(part) for part in parts} == {1}
    assert not any(plan.accumulates for plan in plans)
    seen = [sample for part in parts for micro_batch in part for sample in micro_batch]
    assert len(seen) == len(set(seen)) > num_samples - world_size
    assert all(0 < len(part[0]) <= 4 for part in parts)


@pytest.mark.parametrize("num_samples", range(8, 40))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_plan_knows_whether_it_accumulates(num_samples, world_size):
    plans = [StepPlan(num_samples, 4, 1, rank, world_size) for rank in range(world_size)]
    steps = range(plans[0].steps_per_epoch)
    largest = max(len(plan.micro_batches(list(range(num_samples)), step)) for plan in plans for step in steps)
    assert {plan.accumulates for plan in plans} == {largest > 1}
