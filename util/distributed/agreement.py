"""What all processes decide together, on the host, and what happens when one does not answer."""

from __future__ import annotations

import datetime
import os
import sys

import torch
import torch.distributed as td

from util.distributed import world
from util.distributed.roll_call import RollCall

_NAMING_S = 5
_PATIENCE_S = 2


class Agreement:
    """What the processes decide together, on the host: the device is not waited for.

    Args:
        timeout_s: after which a process that waits for the others gives up.
    """

    def __init__(self, timeout_s: float):
        self._group = None
        if td.is_initialized():
            self._calls = RollCall(world.store())
            self._group = td.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
            self._calls.learn()

    def maximum(self, *values: int) -> list[int]:
        """Return the largest of each value over all processes."""
        if self._group is None:
            return list(values)
        shared = torch.tensor(values)
        self._calls.begin()
        work = td.all_reduce(shared, op=td.ReduceOp.MAX, group=self._group, async_op=True)
        try:
            work.wait(datetime.timedelta(seconds=_PATIENCE_S))
        except RuntimeError:
            if work.is_completed():
                raise
            self._calls.announce()  # others may have waited longer, and ask sooner who is there
            work.wait()
        return shared.tolist()

    def explain(self, error: RuntimeError) -> None:
        """End this process with one sentence that names who is missing, if `error` is a collective that failed.

        Missing processes of this launcher are killed: one that stands still obeys nothing else, and keeps its GPU.
        """
        if self._group is None or not _is_exchange(error):
            return
        missing, text = self._calls.missing(_NAMING_S), str(error)
        print(
            f"error: rank {world.rank()} could not reach all other processes within --dist_timeout: "
            f"{_who_is_missing(missing)} ({text.splitlines()[0]}); the same command continues from the checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if "timed out" in text.lower() or "timeout" in text.lower():  # else it may be in the middle of a step
            for number in missing or []:
                self._calls.kill(number)
        os._exit(1)  # threads of the exchange may never end


def _who_is_missing(missing: list[int] | None) -> str:
    if missing is None:
        return f"nor does the place where they met, {os.environ.get('MASTER_ADDR')}, answer"
    if not missing:
        return "all processes answer now"
    return f"rank {', '.join(map(str, missing))} did not answer"


def _is_exchange(error: Exception) -> bool:
    words = ("timed out", "timeout", "connection closed", "connection reset", "gloo", "nccl", "unreachable")
    return isinstance(error, td.DistError) or any(word in str(error).lower() for word in words)
