"""One run at a time writes to a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

_NAME = ".lock"
WAIT_S = 60.0  # a run that was asked to stop writes its checkpoint first


def hold(folder: Path, wait_s: float | None = None, flag: str = "--output_dir") -> IO | None:
    """Lock `folder` until the file that is given back is closed, or the process ends, however it does.

    Waits for a run that is leaving. None where the file system has no locks. The lock is a POSIX one: children do not
    inherit it, and NFS has it.

    Args:
        folder: to lock; it exists.
        wait_s: how long to wait for another process to leave; default: `WAIT_S`.
        flag: that named the folder, for the message.

    Raises:
        ValueError: another process still has it; names it.
    """
    file = open(folder / _NAME, "a+")  # noqa: SIM115 (the caller closes it)
    end = time.monotonic() + (WAIT_S if wait_s is None else wait_s)
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                file.close()
                return None
        if time.monotonic() >= end:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"{flag} {folder}: {holder} is at work there; wait until it ends, or name another folder")
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
