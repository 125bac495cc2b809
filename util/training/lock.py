"""One run at a time writes to a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
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
        ValueError: another process still has it, which is named; or `.lock` is not a file that can be written.
    """
    file = _open(folder, flag)
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
            holder = file.read(1000).decode(errors="replace").strip() or "another process"
            file.close()
            raise ValueError(f"{flag} {folder}: {holder} is at work there; wait until it ends, or name another folder")
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # a full disk takes no name, but has locks
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return file


def _open(folder: Path, flag: str) -> IO:
    """Open the lock's file, which is never the target of a link: that would be truncated."""
    try:
        file = os.fdopen(os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
    except OSError as error:
        reason = "it is a link" if (folder / _NAME).is_symlink() else error.strerror
        raise ValueError(
            f"{flag} {folder}: {_NAME} in it cannot be opened ({reason}); remove it, or name another folder"
        ) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{flag} {folder}: {_NAME} in it is not a file; remove it, or name another folder")
    return file
