"""Leaving in good order: a signal sets a flag, all processes agree on it at the next step, nobody waits in vain."""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch

from util import terminal
from util.distributed import world

# Exit status of a run that was asked to stop and has written a checkpoint: the same command continues (EX_TEMPFAIL).
PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_STALL_S = 60.0


class Preempted(SystemExit):
    """All processes leave because one was asked to; the checkpoint is on disk."""

    def __init__(self):
        super().__init__(PREEMPTED)


class Interrupted(BaseException):  # not for those who catch Exception while an image is read
    """A signal came while this process was waiting for data."""


class Signals:
    """SIGTERM, SIGINT and SIGUSR2 set `received`; a second SIGINT leaves at once."""

    def __init__(self):
        self.received: str | None = None
        self._waiting = False
        self._awaited: Callable[[], str] | None = None
        self._waited_s = 0.0
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            handlers = dict.fromkeys(SIGNALS, self._handle) | {signal.SIGALRM: self._report_stall}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def restore(self) -> None:
        """Give the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave_at_once(self) -> None:
        """Let a signal end this process from now on, with status 128 + its number: there is nothing to save."""
        for number in SIGNALS if self._before else ():
            signal.signal(number, lambda number, frame: sys.exit(128 + number))

    @contextlib.contextmanager
    def waiting_for(self, awaited: Callable[[], str], timeout_s: float) -> Iterator[None]:
        """Let a signal end the waiting in the block: raise `Interrupted`.

        Log what this process waits for, once a minute; exit after `timeout_s` seconds.
        """
        self._awaited, self._waited_s, self._timeout_s = awaited, 0.0, timeout_s
        step = min(_STALL_S, timeout_s)
        with self.ending():
            if self._before:
                signal.setitimer(signal.ITIMER_REAL, step, step)
            try:
                yield
            finally:
                if self._before:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    # PyTorch would raise for a lost worker in the middle of a step; the next waiting finds it as well.
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Let a signal raise `Interrupted` anywhere in the block; at once if there was one before."""
        if self.received:
            raise Interrupted
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _report_stall(self, number: int, frame) -> None:
        self._waited_s += min(_STALL_S, self._timeout_s)
        text = f"rank {world.rank()} has waited {self._waited_s:.0f} s for data, for {self._awaited()}"
        if self._waited_s >= self._timeout_s:
            print(f"error: {text}; --dist_timeout ends it here: look at the files and their disk", file=sys.stderr)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would raise for a killed worker
            for worker in multiprocessing.active_children():
                worker.kill()  # one that obeys nothing else would be waited for at the exit
            raise SystemExit(1)
        print(text, file=sys.stderr, flush=True)

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise SystemExit(130)
        self.received = signal.Signals(number).name
        if self._waiting:
            self._waiting = False
            raise Interrupted


class WorkerSignals:
    """For a loader's workers: a signal to the whole job is for the training processes, which end their workers.

    SIGTERM is also how Python ends what is left of them at its own end: from then on they obey it.
    """

    def __init__(self):
        self._ending = torch.zeros((), dtype=torch.bool).share_memory_()
        atexit.register(self._ending.fill_, True)

    def __call__(self, worker: int) -> None:
        """Act as `worker_init_fn` of a `DataLoader`."""
        terminal.protect()  # a worker that was not forked has streams of its own
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
        sys.excepthook = _print_unless_disconnected  # called by multiprocessing's thread that shares descriptors
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if self._ending else None)


def _print_unless_disconnected(kind: type, error: BaseException, trace) -> None:
    """Print an error of a worker, unless the training process no longer answers: that one says why."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_worker(error: Exception, batch) -> NoReturn:
    """End a worker that cannot hand a batch over: its process would wait for ever, but notices that it is gone."""
    print(f"a loader worker cannot hand over its images ({error})", file=sys.stderr, flush=True)
    os._exit(1)


@functools.cache
def worker_signals() -> WorkerSignals:
    """Return the one of this process."""
    return WorkerSignals()
