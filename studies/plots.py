"""Curves of results over a setting: means over seeds with confidence intervals, one line for each method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype

from studies import pimr, tables

MARKERS = "osD^vP*X"
_WIDTH, _HEIGHT, _CHARACTER = 4.6, 3.1, 0.085  # of a panel and of a letter, in inches
_ENOUGH = 3  # values for an interval: of two it is so wide (12.7 standard errors) that nothing else could be seen
METRIC_NAMES = {
    "knn": "k-NN accuracy (%)",
    "monitor_knn": "k-NN accuracy (%)",
    "linear": "quick linear accuracy (%)",
    "attentive": "attentive accuracy (%)",
    "linprobe_acc1": "linear accuracy (%)",
    "finetune_acc1": "fine-tuned accuracy (%)",
    "rank_me": "effective rank (RankMe)",
    "mask_ratio": "mask ratio",
    "train_mask_ratio": "mean mask ratio",
    "train_salient_share": "share of salient tokens",
    "checkpoint": "epochs",
}


def curves(table: pd.DataFrame, x: str, y: str, lines: str | None) -> dict[str, pd.DataFrame]:
    """Return what `tables.summarize` finds for `y` over `x`, for each value of `lines` (for `y`, if it is None)."""
    found = tables.summarize(table, [lines, x] if lines else [x], y)
    parts = {y: found}
    if lines:
        parts = {str(name): part.droplevel(0) for name, part in found.groupby(level=0, sort=False, dropna=False)}
    numeric = is_numeric_dtype(table[x])
    return {name: part.sort_index() if numeric else part.rename(index=str) for name, part in parts.items()}


def accuracies(found: dict[str, pd.DataFrame]) -> tuple[pd.DataFrame, str]:
    """Return the means for PIMR, where all curves have one; and a sentence on what is left out, if anything is.

    A curve of one point, which is its own best and worst, is left out as a whole, if others have more.
    """
    means = pd.DataFrame({name: part["mean"] for name, part in found.items()})
    single = list(means.columns[means.count() < 2])
    single = single if len(single) < means.shape[1] else []
    kept, ratios = pimr.shared(means.drop(columns=single).dropna(how="all"))
    said = [f"PIMR is without {', '.join(map(str, ratios))}: not all have a result there"] if ratios else []
    said += [f"PIMR is without {', '.join(single)}: one result each"] if single else []
    return kept, "; ".join(said)


def draw(table: pd.DataFrame, x: str, metrics: list[str], lines: str | None, with_pimr: bool = False) -> Figure:
    """Draw one panel for each metric; with PIMR, two more below each: PIMR and Global PIMR of the means."""
    found = {metric: curves(table, x, metric, lines) for metric in metrics}
    numeric = is_numeric_dtype(table[x])
    # Room for the names of the lines at the right, and for those below the panels where x is text.
    right = _CHARACTER * max(len(name) for curve in found.values() for name in curve) + 0.6 if lines else 0
    below = 0 if numeric else 0.7 * _CHARACTER * max(map(len, table[x].astype(str)))
    height = 3 if with_pimr else 1
    figure = Figure(figsize=(_WIDTH * len(metrics) + right, _HEIGHT * height + below), layout="constrained")
    axes = figure.subplots(height, len(metrics), squeeze=False, sharex="col")
    for column, metric in enumerate(metrics):
        _panel(axes[0, column], found[metric], METRIC_NAMES.get(metric, metric))
        if with_pimr:
            means, left_out = accuracies(found[metric])
            _scores(axes[1, column], pimr.pimr(means), "PIMR", list(found[metric]))
            _scores(axes[2, column], pimr.global_pimr(means), "Global PIMR", list(found[metric]))
            axes[1, column].set_title(left_out, fontsize=8, wrap=True)
        axes[-1, column].set_xlabel(METRIC_NAMES.get(x, x))
        if not numeric:
            for text in axes[-1, column].get_xticklabels():
                text.set(rotation=45, ha="right", rotation_mode="anchor")
    if lines:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), title=lines, loc="outside right upper")
    return figure


def save(figure: Figure, flag: str, path: Path) -> None:
    """Write a figure. ValueError, which names the flag: no name of a PNG or PDF, or it cannot be written."""
    if path.suffix not in (".png", ".pdf"):
        raise ValueError(f"{flag} {path}: the name must end in .png or .pdf")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror})") from error


def _panel(axis: Axes, found: dict[str, pd.DataFrame], label: str) -> None:
    for number, (name, curve) in enumerate(found.items()):
        x, bars = curve.index, curve["half_width"].where(curve["count"] >= _ENOUGH)
        if is_numeric_dtype(x):  # so that the bars do not hide each other
            x = x + 0.004 * (number - (len(found) - 1) / 2) * (np.ptp(x) or 1)
        style = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4, "capsize": 3, "linewidth": 1.3}
        axis.errorbar(x, curve["mean"], None if bars.isna().all() else bars, label=name, **style)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _scores(axis: Axes, scores: pd.DataFrame, label: str, lines: list[str]) -> None:
    """Draw scores in the colours and markers that the curves of these `lines` have."""
    for name in scores:
        number = lines.index(name)
        style = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        axis.plot(scores.index, scores[name], **style)
    axis.set_ylim(-0.05, 1.05)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
