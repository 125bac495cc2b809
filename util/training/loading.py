"""Why no batch came: a loader's worker was killed, or memory or file descriptors ran out."""

from __future__ import annotations

ERRORS = (RuntimeError, OSError, MemoryError)

_CAUSES = {
    ("Too many open files", "ancdata"): "there are too few file descriptors; raise them with ulimit -n",
    ("No space left", "Bus error", "shared memory"): "there is no room in /dev/shm; enlarge it (docker: --shm-size)",
    (
        "Killed",
        "exited unexpectedly",
        "Connection reset by peer",
    ): "a loader worker was killed; perhaps the machine ran out of memory",
    ("Cannot allocate memory", "can't allocate memory"): "the machine ran out of memory",
}


def describe(error: BaseException) -> str:
    """Return one sentence that says why no batch came, and what helps."""
    text = str(error).strip() or type(error).__name__
    reason = text.splitlines()[-1]  # of a worker's traceback
    for words, cause in _CAUSES.items():
        if any(word in text for word in words):
            return f"the images could not be loaded: {cause}, or lower --num_workers or --batch_size ({reason})"
    return f"the images could not be loaded ({reason})"


def is_lost_batch(error: BaseException | None) -> bool:
    """Return whether `error` is that of a loader that lost a worker, or ran out of something."""
    known = ("DataLoader worker", *(word for words in _CAUSES for word in words))
    return isinstance(error, ERRORS) and any(word in str(error) for word in known)
