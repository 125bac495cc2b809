"""Prepare images as the checkpoint's training did, where the command does not say otherwise."""

from __future__ import annotations

from pathlib import Path

from util.config import Settings
from util.data import transforms
from util.kinds import check_kinds
from util.training import checkpoint

_KINDS = {"mean": list[float], "std": list[float], "crop_pct": float, "in_chans": int}


def follow(settings: Settings, content: dict | None, path: str | Path | None) -> list[str]:
    """Set `mean` and `std`, and `crop_pct` with `--eval`, to the checkpoint's where the command does not give them.

    Args:
        settings: changed in place, so that they go along into the run's own checkpoints.
        content: of the checkpoint that the run starts from, continues or evaluates, or None.
        path: of that checkpoint.

    Returns:
        Sentences for the log: what images are normalised with and why, and where the command and the checkpoint differ.

    Raises:
        ValueError: what the checkpoint tells is of the wrong kind, or impossible.
    """
    told = checkpoint.arguments(content) if content is not None else {}
    check_kinds(path, told, _KINDS)
    if not isinstance(told.get("mean"), (list, tuple)) or told.get("in_chans", settings.in_chans) != settings.in_chans:
        told = told | {"mean": None, "std": None}  # it does not say, as MAE's do not; another architecture, if anything
    notes = _follow_statistics(settings, told, path)
    if getattr(settings, "eval", False) and "crop_pct" in told:
        notes += _follow_crop(settings, told["crop_pct"], path)
    return notes


def _follow_statistics(settings: Settings, told: dict, path: str | Path | None) -> list[str]:
    given = bool(settings.mean or settings.std)
    theirs = None
    if told.get("mean") is not None:
        try:
            theirs = transforms.channel_statistics(settings.in_chans, told["mean"], told.get("std"))
        except ValueError as error:
            raise ValueError(f"{path}: its settings cannot be used: {error}") from error
        settings.mean = settings.mean or list(told["mean"])
        settings.std = settings.std or list(told.get("std") or ())
    ours = transforms.channel_statistics(settings.in_chans, settings.mean, settings.std)
    if theirs is None:
        source = "given" if given else "the default" if path is None else f"the default; {path} does not tell its own"
        return [f"images are normalised with {describe(ours)} ({source})"]
    if theirs == ours:
        return [f"images are normalised with {describe(ours)} (as {path} was trained)"]
    return [f"images are normalised with {describe(ours)} as given, but {path} was trained with {describe(theirs)}"]


def _follow_crop(settings: Settings, told: float | None, path: str | Path | None) -> list[str]:
    if told is not None and not 0 < told <= 1:
        raise ValueError(f"{path}: its crop_pct is {told}, and must be above 0 and at most 1")
    if settings.crop_pct is None:
        settings.crop_pct = told
    if settings.crop_pct == told:
        return []
    before = "the default" if told is None else told
    return [f"images are cropped with --crop_pct {settings.crop_pct} as given, but {path} was evaluated with {before}"]


def describe(statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> str:
    """Return the mean and deviation of each channel as text."""
    mean, std = (" ".join(f"{value:g}" for value in values) for values in statistics)
    return f"mean {mean} and deviation {std}"
