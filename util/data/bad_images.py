"""Bad images, which cannot be decoded or transformed: named once over all processes, counted, and not too many."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as td

from util.distributed import world


class TooManyBadImages(SystemExit):
    """More images cannot be decoded than the run accepts; every process raises it at the same step, one says why."""


class BadImages:
    """Marks of a data set's bad images, in memory that the loader's workers share with their process.

    Args:
        num_images: size of the data set.
        max_share: of the data set that may be bad.
        describe: number of an image -> its name and what is wrong with it.
    """

    def __init__(self, num_images: int, max_share: float, describe: Callable[[int], str]):
        self.num_images, self.max_share, self.describe = num_images, max_share, describe
        self._marked = torch.zeros(num_images, dtype=torch.bool).share_memory_()
        self._said = torch.zeros(num_images, dtype=torch.bool)

    def __contains__(self, index: int) -> bool:
        return bool(self._marked[index])

    def mark(self, index: int) -> None:
        """Mark image `index` as bad. A worker calls it; marking twice is marking once."""
        self._marked[index] = True

    def too_many(self) -> bool:
        """Return whether this process knows of more than the run accepts; then its next `collect` ends it."""
        return self._exceeds(int(self._marked.sum()))

    def _exceeds(self, count: int) -> bool:
        return count > self.max_share * self.num_images or count == self.num_images

    def collect(self, device: torch.device) -> int:
        """Share what is new among all processes, name it on stderr, and count. All processes call it together.

        Returns:
            The number of different bad images so far, in all processes.

        Raises:
            TooManyBadImages: they are more than `max_share` of the data set, or all of it.
        """
        new = (self._marked & ~self._said).nonzero().flatten().tolist()
        if world.all_reduce(torch.tensor(float(len(new)), device=device)).item():
            shares: list[list[int]] = [new]
            if td.is_initialized():
                shares = [[]] * world.world_size()
                td.all_gather_object(shares, new)
            new = sorted({index for share in shares for index in share} - set(self._said.nonzero().flatten().tolist()))
            self._marked[new] = True
            self._said[new] = True
            self._say(new)
        count = int(self._said.sum())
        if self._exceeds(count):
            self._stop(count)
        return count

    def _stop(self, count: int) -> None:
        if world.is_main():
            limit, remedy = f"more than --max_bad_images {self.max_share:g} allows", ", or raise --max_bad_images"
            if count <= self.max_share * self.num_images:
                limit, remedy = "which is all of them", ""
            print(
                f"error: {count} of {self.num_images} pictures cannot be decoded, {limit}; "
                f"mend or replace the files named above{remedy}",
                file=sys.stderr,
                flush=True,
            )
        world.barrier()  # the first exit makes the launcher end the others
        raise TooManyBadImages(2)

    def _say(self, new: list[int]) -> None:
        """Name every one that the run accepts; of those that end it, as many as there may be."""
        if not world.is_main():
            return
        most = max(20, int(self.max_share * self.num_images))
        for index in new[:most]:
            print(f"bad picture: {self.describe(index)}; the next good one takes its place", file=sys.stderr)
        if len(new) > most:
            print(f"bad pictures: {len(new) - most} more", file=sys.stderr)
        sys.stderr.flush()
