"""All training images between two epochs, shared out over the processes, for methods that look at each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from util.data.datasets import SeededImages
from util.data.step_loader import evaluation_loader
from util.distributed import world
from util.training.averages import Averages
from util.training.context import Context
from util.training.leaving import Exits


class WholeSet:
    """The training images after the steps of one epoch. All processes call each method together.

    The steps are saved before the first image is read, so that a kill loses only the looking. A signal ends it: all
    processes leave together, and the run continues with it.

    Args:
        context, exits: of the run.
        images: its training images.
        steps: optimizer steps of the epoch.
        epoch: whose steps are done.
        averages: of these steps.
    """

    def __init__(
        self, context: Context, exits: Exits, images: SeededImages, steps: int, epoch: int, averages: Averages
    ):
        self._context, self._exits, self._images = context, exits, images
        self._steps, self._epoch, self._averages = steps, epoch, averages

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    @property
    def mine(self) -> range:
        """Return the numbers of the images that this process looks at; those of rank 0, 1, ... follow each other."""
        share = -(-len(self) // world.world_size())
        return range(len(self))[world.rank() * share : (world.rank() + 1) * share]

    def in_order(self, transform: Callable, title: str) -> Iterator[torch.Tensor]:
        """Yield batches of this process's images, in order.

        An image that cannot be read is replaced by the next good one, named and counted, as in training.

        Args:
            transform: as for `SeededImages`, without random numbers.
            title: of the progress in the log.
        """
        settings, log = self._context.settings, self._context.log
        self._exits.save(self._epoch, self._steps, self._averages)
        bad = self._images.bad
        dataset = SeededImages(self._images.images, transform, max_bad_images=bad.max_share)
        dataset.bad = bad  # of the training: the same images are named once, and too many end the run
        batches = evaluation_loader(
            dataset, self.mine, batch_size=settings.batch_size, num_workers=settings.num_workers
        )
        share = -(-len(self) // world.world_size())  # of the process with the most
        rounds = -(-share // settings.batch_size)
        checked = self._exits.checked(batches, rounds, self._epoch, self._averages)
        for number, (pixels, _) in enumerate(checked, 1):
            yield pixels
            if number % settings.print_freq == 0 or number == rounds:
                log.progress(title, number, rounds, {})
        bad.collect(self._context.device)

    def together(self, problem: str = "") -> None:
        """Wait for all processes; leave with them if one was asked to stop, end with them if one has a `problem`."""
        agreement, received = self._context.agreement, self._context.signals.received
        stop, failed = agreement.maximum(received is not None, bool(problem))
        if stop:
            self._exits.leave(self._epoch, self._steps, self._averages)
        if failed:
            self._exits.fail(problem, self._epoch, self._steps, self._averages)
