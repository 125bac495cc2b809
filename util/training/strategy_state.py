"""The state of a masking strategy that has one: saved and restored with the run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from util.training import checkpoint


def read(strategy: Callable | None) -> dict | None:
    """Return the strategy's `state_dict()`; None if it has no state.

    Raises:
        ValueError: the state holds what a checkpoint cannot hold without running code when it is read.
    """
    if not (hasattr(strategy, "state_dict") and hasattr(strategy, "load_state_dict")):
        return None
    state = strategy.state_dict()
    wrong = next(_unsaveable(state), None)
    if wrong is not None or not isinstance(state, dict):
        raise ValueError(
            f"the state_dict of the masking strategy {type(strategy).__name__} holds {type(wrong or state).__name__}: "
            "it must be a dictionary of tensors, numbers, texts, and lists and dictionaries of them"
        )
    return state


def restore(strategy: Callable | None, content: dict, name: str | None) -> str:
    """Give `strategy`, of this `name`, the state in a checkpoint; return what must be said if it starts without one.

    Raises:
        ValueError: the state does not fit.
    """
    if read(strategy) is None:
        return ""
    if "masking" not in content or checkpoint.arguments(content).get("masking") != name:
        return f"{content['path']} holds no state of the masking strategy {name}, which starts anew"
    try:
        strategy.load_state_dict(content["masking"])
    except Exception as error:  # a user's own code may fail in any way
        raise ValueError(
            f"{content['path']}: the state in it does not fit this masking strategy ({type(error).__name__}: {error}); "
            "use the --masking it was trained with, or start a new --output_dir with --finetune"
        ) from error
    return ""


@contextlib.contextmanager
def unchanged(strategy: Callable | None) -> Iterator[None]:
    """Give `strategy` its present state back at the end of the block."""
    state = copy.deepcopy(read(strategy))
    try:
        yield
    finally:
        if state is not None:
            strategy.load_state_dict(state)


def _unsaveable(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _unsaveable(key)
            yield from _unsaveable(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _unsaveable(item)
    elif value is not None and not isinstance(value, torch.Tensor) and type(value) not in (bool, int, float, str):
        yield value
