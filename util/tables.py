"""Tables of results: CSV with a row for each run, and means over seeds with confidence intervals."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Mean of `count` values and half the width of its 95% confidence interval (Student's t); NaN for one value."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        interval = "" if math.isnan(self.half_width) else f" ± {self.half_width:.2f}"
        return f"{self.mean:.2f}{interval}"


def summarize(values: list[float]) -> Summary:
    """Mean and 95% confidence interval of independent values."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return Summary(mean, math.nan, count)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Summary(mean, float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count), count)


def write_csv(path: Path, rows: list[Row]) -> None:
    """All rows, with every column that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: str | Path) -> list[Row]:
    """Rows of a CSV file, numbers as numbers, empty cells left out. ValueError: no such file, or no row."""
    try:
        with open(path, newline="") as file:
            rows = [{k: _value(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not rows:
        raise ValueError(f"{path}: holds no result")
    return rows


def group(rows: list[Row], keys: list[str], metric: str) -> dict[tuple, Summary]:
    """`metric` summarized over all rows that agree in `keys`. ValueError: a column that no row has."""
    for name in (*keys, metric):
        if not any(name in row for row in rows):
            columns = ", ".join(dict.fromkeys(column for row in rows for column in row))
            raise ValueError(f"the table has no column {name!r}; it has {columns}")
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if metric in row:
            groups.setdefault(tuple(row.get(key) for key in keys), []).append(float(row[metric]))
    return {key: summarize(values) for key, values in groups.items()}


def markdown(rows: list[Row], keys: list[str], metrics: list[str]) -> str:
    """A Markdown table: a line for each value of `keys`, mean ± half the 95% interval of each metric, and n."""
    found = {metric: group(rows, keys, metric) for metric in metrics}
    lines = ["| " + " | ".join([*keys, *metrics, "n"]) + " |", "|" + "---|" * (len(keys) + len(metrics) + 1)]
    for key in dict.fromkeys(key for groups in found.values() for key in groups):
        cells = [str(found[metric].get(key, "")) for metric in metrics]
        count = max(groups[key].count for groups in found.values() if key in groups)
        lines.append("| " + " | ".join([*map(str, key), *cells, str(count)]) + " |")
    return "\n".join(lines) + "\n"


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
