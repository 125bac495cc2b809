"""Which samples make up which optimizer step: the same global batches whatever the number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from util import seeding
from util.distributed import signals, world


@dataclass(frozen=True)
class StepPlan:
    """How an epoch's shuffled samples are shared out.

    An optimizer step takes `batch_size * accum_iter * world_size` samples, the effective batch. The samples left over
    at the epoch's end make a step of their own if they fill half of one, else they join the last; nothing that was
    loaded is thrown away, and no step is tiny.

    Args:
        num_samples: size of the data set.
        batch_size: samples in a micro-batch of one process.
        accum_iter: micro-batches in a step of one process.
        rank, world_size: this process, and their number.
        multiple: the last step's micro-batches are multiples of this (2 for mixup); up to
            `multiple * world_size - 1` samples of an epoch are left out for it.
        joins: whether a rest may join the last step, in more micro-batches. Else it is a step, however small, unless it
            is too small for every process to have a part, and is left out.

    Raises:
        ValueError: fewer samples than every process needs.
    """

    num_samples: int
    batch_size: int
    accum_iter: int = 1
    rank: int = 0
    world_size: int = 1
    multiple: int = 1
    joins: bool = True

    def __post_init__(self):
        needed = self.multiple * self.world_size
        if self.num_samples < needed:
            raise ValueError(
                f"--data_path: {self.num_samples} training images are too few for {self.world_size} process(es), "
                f"which need at least {needed}"
            )

    @property
    def effective_batch_size(self) -> int:
        """Return the samples in a full step, over all processes."""
        return self.batch_size * self.accum_iter * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps in an epoch: samples / effective batch, rounded to the nearest, at least 1."""
        full, rest = divmod(self.num_samples, self.effective_batch_size)
        alone = rest >= self.multiple * self.world_size
        alone = alone and (2 * rest >= self.effective_batch_size or not self.joins)
        return max(1, full + alone)

    @property
    def accumulates(self) -> bool:
        """Return whether some process has several micro-batches in some step."""
        last = self.step_size(self.steps_per_epoch - 1)
        return self.accum_iter > 1 or -(-last // self.world_size) > self.batch_size

    def step_size(self, step: int) -> int:
        """Return the samples of step `step` of an epoch, over all processes."""
        left = self.num_samples - step * self.effective_batch_size
        return left if step == self.steps_per_epoch - 1 and self.joins else min(left, self.effective_batch_size)

    def places(self, step: int) -> list[range]:
        """Return this process's micro-batches of step `step`, as places among the step's samples."""
        size = self.step_size(step)
        share = range(size)[self.rank :: self.world_size]
        if size == self.effective_batch_size:
            return [share[i : i + self.batch_size] for i in range(0, len(share), self.batch_size)]
        if self.multiple > 1:
            share = share[: size // (self.world_size * self.multiple) * self.multiple]
        return _split_evenly(share, -(-len(share) // self.batch_size), self.multiple)

    def micro_batches(self, order: list[int], step: int) -> list[list[int]]:
        """Return this process's share of step `step` of an epoch whose samples come in `order`."""
        first = step * self.effective_batch_size
        return [[order[first + place] for place in places] for places in self.places(step)]


def _split_evenly(items: range, parts: int, multiple: int) -> list[range]:
    units = len(items) // multiple
    bounds = [multiple * (units * part // parts) for part in range(parts + 1)]
    return [items[first:end] for first, end in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class MicroBatch:
    """What a process computes on at once.

    Attributes:
        batch: what the data set's samples were collated to.
        step: number of the optimizer step, counted over all epochs.
        places: of these samples among the step's, over all processes.
        step_size: samples of the step, over all processes.
        indices: numbers of the samples in the data set.
    """

    batch: list
    step: int
    places: range
    step_size: int
    indices: list[int]


class StepLoader:
    """Loads the micro-batches of a `StepPlan`, step by step.

    Args:
        dataset: answers `dataset[epoch, index]`.
        plan: who gets what.
        seed: of the shuffling.
        num_workers, pin_memory: as for `DataLoader`; workers live as long as this object.
    """

    def __init__(self, dataset: Dataset, plan: StepPlan, *, seed: int, num_workers: int = 0, pin_memory: bool = False):
        self.dataset, self.plan, self.num_workers = dataset, plan, num_workers
        self._keys = _Keys(plan, seed)
        self._awaited: tuple[int, list[int]] = (0, [])
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=signals.worker_signals(),
            persistent_workers=num_workers > 0,
        )

    def __len__(self) -> int:
        """Return the optimizer steps in an epoch."""
        return self.plan.steps_per_epoch

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
        """Iterate over (step, its micro-batches), from `start_step` of `epoch`."""
        self._keys.epoch, self._keys.start_step, number = epoch, start_step, itertools.count()
        batches = iter(self._loader)
        for step, grouped in enumerate(self._keys.grouped(), start_step):
            yield step, self._micro_batches(epoch, step, grouped, batches, number)

    def _micro_batches(
        self, epoch: int, step: int, grouped: list[list[int]], batches: Iterator[list], number: Iterator[int]
    ) -> Iterator[MicroBatch]:
        size = self.plan.step_size(step)
        for places, indices in zip(self.plan.places(step), grouped, strict=True):
            self._awaited = next(number), indices
            yield MicroBatch(next(batches), epoch * len(self) + step, places, size, indices)

    def close(self) -> None:
        """End the workers, and give back their memory and file descriptors; there are no more batches."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()

    def awaited(self, most: int = 4) -> str:
        """Describe which worker the process waits for, and for which images; workers take turns."""
        number, indices = self._awaited
        names = ", ".join(map(self.dataset.name, indices[:most])) + (", ..." if len(indices) > most else "")
        who = f"worker {number % self.num_workers}" if self.num_workers else "this process"
        return f"{who}, which loads {names}"

    def advice(self, share: float) -> str:
        """Say what to change where the device waits for this loader during `share` of the time."""
        cores = world.usable_cores()
        more = f"raise --num_workers {self.num_workers} (this machine has {cores} cores for all its processes), "
        return (
            f"the loader is the bottleneck: {share:.0%} of the time no batch was ready; "
            f"{more if self.num_workers < cores else ''}"
            "make the pictures smaller once with scripts/prepare_data.py, or put them on a faster disk"
        )


class _Keys(torch.utils.data.Sampler):
    """Batches of (epoch, index): a worker learns the epoch with the sample, so workers can outlive it.

    It does not know its loader: in a cycle of references PyTorch cannot end the workers.
    """

    def __init__(self, plan: StepPlan, seed: int):
        self.plan, self.seed = plan, seed
        self.epoch, self.start_step = 0, 0

    def grouped(self) -> Iterator[list[list[int]]]:
        """Sample indices of each step of the epoch from `start_step` on, by micro-batch."""
        order = seeding.permutation(self.seed, self.epoch, self.plan.num_samples)
        for step in range(self.start_step, self.plan.steps_per_epoch):
            yield self.plan.micro_batches(order, step)

    def __iter__(self):
        epoch = self.epoch
        for micro_batches in self.grouped():
            for batch in micro_batches:
                yield [(epoch, index) for index in batch]


def evaluation_loader(
    dataset: Dataset, indices: range, *, batch_size: int, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Load the samples `indices` in order, without padding; the last batch may be smaller. Draw no random number."""
    keys = [(0, index) for index in indices]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=signals.worker_signals(),
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # the seed of the workers would be drawn from the global one
    )
