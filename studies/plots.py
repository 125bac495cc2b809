"""Curves of results over a setting: means over seeds with confidence intervals, one line for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies import pimr
from studies.tables import Row, Summary, group

MARKERS = "osD^vP*X"
_WIDTH = 4.6  # of a panel, in inches
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


def accuracies(found: list[Curve]) -> tuple[dict[str, dict], str]:
    """Means of each curve where all curves have one, for PIMR; and a sentence on what is left out, if anything is."""
    means = {c.name: {place: s.mean for place, s in zip(c.x, c.summaries, strict=True)} for c in found}
    kept, left_out = pimr.common(means)
    return kept, f"PIMR is without {', '.join(map(str, left_out))}: not all have a result there" if left_out else ""


def draw(rows: list[Row], x: str, metrics: list[str], lines: str | None, with_pimr: bool = False) -> Figure:
    """One panel for each metric; with PIMR, two more below each: PIMR and Global PIMR of the means."""
    height = 3 if with_pimr else 1
    figure = Figure(figsize=(_WIDTH * len(metrics), 3.1 * height), layout="constrained")
    axes = figure.subplots(height, len(metrics), squeeze=False)
    for column, metric in enumerate(metrics):
        found = curves(rows, x, metric, lines)
        _panel(axes[0, column], found, METRIC_NAMES.get(metric, metric))
        if with_pimr:
            means, left_out = accuracies(found)
            own = {name: pimr.pimr(values) for name, values in means.items()}
            _scores(axes[1, column], own, "PIMR")
            _scores(axes[2, column], pimr.global_pimr(means), "Global PIMR")
            axes[1, column].set_title(left_out, fontsize=8)
        axes[-1, column].set_xlabel(METRIC_NAMES.get(x, x))
    if lines:
        _legend(figure, axes[0, 0], METRIC_NAMES.get(lines, lines))
    return figure


def save(figure: Figure, flag: str, path: Path) -> None:
    """Write a figure. ValueError, which names the flag: no name of a PNG or PDF, or it cannot be written."""
    if path.suffix not in (".png", ".pdf"):
        raise ValueError(f"{flag} {path}: the name must end in .png or .pdf")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror})") from error


def _legend(figure: Figure, axis: Axes, title: str) -> None:
    """Above the panels, in as many rows as its names need."""
    handles, names = axis.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    columns = max(1, min(len(names), int(width / (0.55 + 0.075 * max(map(len, names))))))  # inches of 9 points
    figure.set_size_inches(width, height + 0.18 * math.ceil(len(names) / columns))
    figure.legend(handles, names, title=title, loc="outside upper center", ncols=columns, fontsize=9, title_fontsize=9)


def _panel(axis: Axes, found: list[Curve], label: str) -> None:
    numeric = all(isinstance(place, (int, float)) for curve in found for place in curve.x)
    names = list(dict.fromkeys(str(place) for curve in found for place in curve.x))
    for number, curve in enumerate(found):
        x = np.array(curve.x, dtype=float) if numeric else np.array([names.index(str(p)) for p in curve.x], dtype=float)
        mean = np.array([summary.mean for summary in curve.summaries])
        half = [summary.half_width if summary.count >= _ENOUGH else math.nan for summary in curve.summaries]
        bars = None if all(map(math.isnan, half)) else half
        shift = 0.004 * (number - (len(found) - 1) / 2) * (np.ptp(x) or 1)  # so that the bars do not hide each other
        marker = MARKERS[number % len(MARKERS)]
        axis.errorbar(x + shift, mean, bars, marker=marker, markersize=4, capsize=3, linewidth=1.3, label=curve.name)
    if not numeric:
        axis.set_xticks(range(len(names)), names)
        _fit_names(axis, names)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _fit_names(axis: Axes, names: list[str]) -> None:
    """Turn the names below a panel where they would run into each other, and make room for them."""
    longest = 0.085 * max(map(len, names))  # inches, of 10 points
    if longest * len(names) <= _WIDTH - 1.2:
        return
    axis.tick_params("x", rotation=45)
    for text in axis.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")
    if axis.get_subplotspec().is_first_col():
        width, height = axis.figure.get_size_inches()
        axis.figure.set_size_inches(width, height + 0.7 * longest)


def _scores(axis: Axes, methods: Mapping[str, Mapping[float, float]], label: str) -> None:
    for number, values in enumerate(methods.values()):
        axis.plot(list(values), list(values.values()), marker=MARKERS[number % len(MARKERS)], markersize=4)
    places = list(next(iter(methods.values())))
    if any(isinstance(place, str) for place in places):
        _fit_names(axis, list(map(str, places)))
    axis.set_ylim(-0.05, 1.05)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
