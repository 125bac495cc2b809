"""Processes: who am I, how many are we, on how many cores, sums over all. One process = not distributed."""

from __future__ import annotations

import ctypes
import datetime
import os
import signal
import sys
import time
import warnings

import torch
import torch.distributed as td
from torch import nn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_THERE = datetime.timedelta(seconds=60)
_store: td.Store | None = None


def rank() -> int:
    """Return this process's number, 0 without a launcher."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    """Return True in the process that writes files and talks."""
    return rank() == 0


def launched_world_size() -> int:
    """Number of processes the launcher (torchrun, submitit) says there are; known before `init`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def usable_cores() -> int:
    """Return the CPU cores that this process may use; where the system does not say (macOS), all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def init(device: str | None, timeout_s: float = 1800) -> torch.device:
    """Join the process group that torchrun's environment describes, if any, and choose this process's device.

    A request for more GPUs than exist only warns: without CUDA the CPU is used, and processes share GPUs.
    """
    _follow_launcher()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend = "nccl"
    if target.type == "cuda" and not torch.cuda.is_available():
        warnings.warn("--device cuda: no CUDA GPU is visible here; training on the CPU instead", stacklevel=2)
        target = torch.device("cpu")
    if target.type == "cuda" and target.index is None:
        count, local_size = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_size > count:
            warnings.warn(f"{local_size} processes share {count} GPU(s) on this machine", stacklevel=2)
            backend = "gloo"  # NCCL refuses two processes on one GPU
        target = torch.device("cuda", local_rank % count)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if launched_world_size() > 1:
        backend = backend if target.type == "cuda" else "gloo"
        try:
            _join(backend, datetime.timedelta(seconds=timeout_s))
        except td.DistError as error:
            print(
                f"error: rank {os.environ['RANK']}: not all {launched_world_size()} processes have come within "
                f"--dist_timeout ({str(error).splitlines()[0]}); start all of them, and look at what the missing said",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(1) from error
    return target


def _follow_launcher() -> None:
    """Get SIGTERM if torchrun is killed, as if it had been asked to stop: it cannot pass that on."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _join(backend: str, timeout: datetime.timedelta) -> None:
    global _store
    # torchrun's own store is there already, or never will be.
    there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    met, rank_, size = next(td.rendezvous("env://", timeout=min(timeout, _THERE) if there else timeout))
    met.set_timeout(timeout)
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # torchrun keeps the store when it restarts workers: what the dead ones wrote there must not be read.
        met = td.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", met)
    # NCCL's own clock kills without a word: the host, which waits for the others in every step, shall be the first.
    longer = datetime.timedelta(seconds=15 if backend == "nccl" else 0)
    td.init_process_group(backend, store=met, rank=rank_, world_size=size, timeout=timeout + longer)
    _store = met


def store() -> td.Store:
    """Return the store where the processes have met; several processes only."""
    return _store


def finish() -> None:
    """Leave the process group."""
    if td.is_initialized():
        # A thread of gloo that still holds the last collective's tensor when Python ends aborts the process
        # (pytorch/pytorch#190489); it lets go at once, but needs the interpreter for it, which a sleep hands over.
        time.sleep(0.2)
        td.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if td.is_initialized():
        td.barrier()


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Sum `tensor` over all processes, or take the largest (`op` = "max"), in place."""
    if td.is_initialized():
        td.all_reduce(tensor, op={"sum": td.ReduceOp.SUM, "max": td.ReduceOp.MAX}[op])
    return tensor


def gather_rows(rows: torch.Tensor, total: int | None = None) -> tuple[torch.Tensor, int]:
    """Gather rows (N, D) of all processes, without gradient.

    Args:
        rows: this process's.
        total: rows of all processes, which take turns: so one may have one less than another. All have as many if None.

    Returns:
        All rows, process by process, and the place of this process's first one among them.
    """
    if not td.is_initialized():
        return rows.detach(), 0
    total = len(rows) * world_size() if total is None else total
    counts = [len(range(total)[place :: world_size()]) for place in range(world_size())]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows.detach()
    found = [torch.empty_like(padded) for _ in counts]
    td.all_gather(found, padded)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)]), sum(counts[: rank()])


def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics, so that they evaluate and save the same model."""
    for buffer in model.buffers():
        if td.is_initialized() and buffer.is_floating_point():
            all_reduce(buffer).div_(world_size())


def wrap(model: nn.Module, device: torch.device, accumulates: bool = True) -> nn.Module:
    """Wrap `model` in DistributedDataParallel where there are several processes, else return it as it is.

    Every step uses the same parameters, which DDP may know (static_graph); but then it refuses `no_sync`, which steps
    that accumulate several micro-batches need.
    """
    if not td.is_initialized():
        return model
    # Without `device_ids`: the inputs are on the device, and DDP would move those that belong on the host, and wait.
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=not accumulates)
