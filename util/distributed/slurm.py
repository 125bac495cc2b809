"""What a job asks of SLURM: where its processes meet, and its place in the queue. Works without accounting.

`python -m util.distributed.slurm`, in a batch script, prints the address and the port for rank 0.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

# util.distributed.signals' exit status of a run that can continue; the same number without importing torch.
PREEMPTED = os.EX_TEMPFAIL
# Below 32768, where Linux begins to hand out ports to outgoing connections.
_PORTS = range(10_000, 32_768)
_TRIES, _BETWEEN_S = 6, 10


def warning_seconds(timeout_min: int) -> int:
    """Return how long before the time limit a job is told: 5 minutes, or a fifth of a limit below 25 minutes."""
    return min(300, timeout_min * 60 // 5)


def free_port(seed: str) -> int:
    """Return a free TCP port of this machine. `seed`, different for each job, keeps two jobs from choosing the same."""
    for port in random.Random(seed).sample(_PORTS, 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free TCP port between {_PORTS.start} and {_PORTS.stop}")


def meeting_point() -> str:
    """Return `MASTER_ADDR=... MASTER_PORT=...` of the node that runs the batch script, which is that of rank 0.

    The address is the one by which the nodes' own daemons reach each other.
    """
    node = os.environ["SLURMD_NODENAME"]
    address = re.search(r"\bNodeAddr=(\S+)", _ask("show", "node", "-o", node))
    job = [os.environ.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "JOB_ID", "RESTART_COUNT")]
    port = free_port(" ".join(job))
    return f"MASTER_ADDR={address[1] if address else node} MASTER_PORT={port}"


def describe_rank() -> None:
    """Tell torch which process of the job this is, as torchrun would."""
    processes, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(processes // nodes),
    }


@contextlib.contextmanager
def requeued() -> Iterator[None]:
    """Queue the job again (rank 0 does) where the main in the block leaves because it was asked to.

    Then all processes end with status 0, lest a launcher take the end of one for a failure and kill the others.
    """
    first = os.environ["RANK"] == "0"
    # Until main has its own handlers there is nothing to save. The other processes end with the first.
    _handle(_leave if first else signal.SIG_IGN)
    try:
        yield
    except SystemExit as stop:
        if stop.code != PREEMPTED:
            raise
        _handle(signal.SIG_IGN)
        if first and not requeue(os.environ["SLURM_JOB_ID"]):
            raise
        raise SystemExit(0) from None


def own_number() -> str:
    """Return the number of this job, `array_task` for one of an array: the last task has the whole array's number."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def requeue(job: str) -> bool:
    """Queue the running job `job` again, unless it was cancelled or SLURM does so itself. False if SLURM is away."""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_BETWEEN_S)
        try:
            if _is_ours_to_requeue(_ask("show", "job", "-o", job)):
                _ask("requeue", job)
                print(f"job {job} is queued again", flush=True)
            return True
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
    print(
        f"error: job {job} could not be queued again; do it with: scontrol requeue {job}", file=sys.stderr, flush=True
    )
    return False


def _is_ours_to_requeue(description: str) -> bool:
    """Return whether `scontrol show job` describes a job that is lost unless it is queued again.

    SLURM calls a job COMPLETING that it is ending. After scancel, `scontrol requeue` would bring it back; preempted
    without notice, it is in the queue already. Only at the time limit is it neither.
    """
    fields = dict(pair.split("=", 1) for pair in description.split() if "=" in pair)
    return fields.get("JobState") == "RUNNING" or fields.get("Reason") == "TimeLimit"


def _ask(*command: str) -> str:
    """Return what `scontrol` answers. OSError if it fails."""
    result = subprocess.run(["scontrol", *command], capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"scontrol {' '.join(command)}: {result.stderr.strip() or f'status {result.returncode}'}")
    return result.stdout


def _handle(handler) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, handler)


def _leave(number: int, frame) -> None:
    if not isinstance(sys.exc_info()[1], SystemExit):  # else it is leaving
        raise SystemExit(PREEMPTED)


if __name__ == "__main__":
    print(meeting_point())
