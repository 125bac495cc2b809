"""Curves of results over a setting: means over seeds with confidence intervals, one line for each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from util import pimr
from util.tables import Row, Summary, group

MARKERS = "osD^vP*X"
_ENOUGH = 3  # values for an interval: of two it is so wide (12.7 standard errors) that nothing else could be seen
METRIC_NAMES = {
    "knn": "k-NN accuracy (%)",
    "linear": "quick linear accuracy (%)",
    "attentive": "attentive accuracy (%)",
    "linprobe_acc1": "linear accuracy (%)",
    "finetune_acc1": "fine-tuned accuracy (%)",
    "rank_me": "effective rank (RankMe)",
    "mask_ratio": "mask ratio",
    "checkpoint": "epochs",
}


@dataclass(frozen=True)
class Curve:
    """A line: x values in order, and a summary at each."""

    name: str
    x: list
    summaries: list[Summary]


def curves(rows: list[Row], x: str, y: str, lines: str | None) -> list[Curve]:
    """`y` over `x`, one curve for each value of `lines` (one curve if None). ValueError: no such column."""
    found = group(rows, [lines, x] if lines else [x], y)
    names = list(dict.fromkeys(key[0] for key in found)) if lines else [y]
    result = []
    for name in names:
        points = {key[-1]: value for key, value in found.items() if not lines or key[0] == name}
        places = sorted(points, key=lambda place: (isinstance(place, str), place))
        result.append(Curve(str(name), places, [points[place] for place in places]))
    return result


def draw(rows: list[Row], x: str, metrics: list[str], lines: str | None, with_pimr: bool = False) -> Figure:
    """One panel for each metric; with PIMR, two more below each: PIMR and Global PIMR of the means."""
    height = 3 if with_pimr else 1
    figure = Figure(figsize=(4.6 * len(metrics), 3.1 * height), layout="constrained")
    axes = figure.subplots(height, len(metrics), squeeze=False)
    for column, metric in enumerate(metrics):
        found = curves(rows, x, metric, lines)
        _panel(axes[0, column], found, METRIC_NAMES.get(metric, metric))
        if with_pimr:
            accuracies = {c.name: {p: s.mean for p, s in zip(c.x, c.summaries, strict=True)} for c in found}
            own = {name: pimr.pimr(values) for name, values in accuracies.items()}
            _scores(axes[1, column], own, "PIMR")
            _scores(axes[2, column], pimr.global_pimr(accuracies), "Global PIMR")
        axes[-1, column].set_xlabel(METRIC_NAMES.get(x, x))
    if lines:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=9)
    return figure


def _panel(axis: Axes, found: list[Curve], label: str) -> None:
    numeric = all(isinstance(place, (int, float)) for curve in found for place in curve.x)
    names = list(dict.fromkeys(str(place) for curve in found for place in curve.x))
    for number, curve in enumerate(found):
        x = np.array(curve.x, dtype=float) if numeric else np.array([names.index(str(p)) for p in curve.x], dtype=float)
        mean = np.array([summary.mean for summary in curve.summaries])
        half = [summary.half_width if summary.count >= _ENOUGH else 0.0 for summary in curve.summaries]
        shift = 0.004 * (number - (len(found) - 1) / 2) * (np.ptp(x) or 1)  # so that the bars do not hide each other
        marker = MARKERS[number % len(MARKERS)]
        axis.errorbar(x + shift, mean, half, marker=marker, markersize=4, capsize=3, linewidth=1.3, label=curve.name)
    if not numeric:
        axis.set_xticks(range(len(names)), names)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _scores(axis: Axes, methods: Mapping[str, Mapping[float, float]], label: str) -> None:
    for number, values in enumerate(methods.values()):
        axis.plot(list(values), list(values.values()), marker=MARKERS[number % len(MARKERS)], markersize=4)
    axis.set_ylim(-0.05, 1.05)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
