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
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error})") from error
    if not rows:
        raise ValueError(f"{path}: holds no result")
    return rows


def where(rows: list[Row], conditions: list[str]) -> list[Row]:
    """The rows that match every `NAME=VALUE`. ValueError: not of this form, or no row does."""
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition}: write NAME=VALUE, such as checkpoint=last")
        _check_column(rows, name)
        kept = [row for row in rows if row.get(name) == _value(value)]
        if not kept:
            found = ", ".join(map(str, dict.fromkeys(row[name] for row in rows if name in row)))
            raise ValueError(f"--where {condition}: no row has it; {name} is {found}")
        rows = kept
    return rows


def group(rows: list[Row], keys: list[str], metric: str) -> dict[tuple, Summary]:
    """`metric` summarized over the seeds of all rows that agree in `keys`.

    Raises:
        ValueError: a column that no row has; or rows that agree in `keys` and differ in more than the seed and what
            was measured.
    """
    for name in (*keys, metric):
        _check_column(rows, name)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if metric in row:
            groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    for found in groups.values():
        _check_only_seeds_differ(found, keys, metric, columns)
    return {key: summarize([_number(row, metric) for row in found]) for key, found in groups.items()}


def _check_only_seeds_differ(rows: list[Row], keys: list[str], metric: str, columns: list[str]) -> None:
    """A sweep's settings are the columns up to `checkpoint`. In other tables, rows of one seed show what differs."""
    settings = columns[: columns.index("checkpoint") + 1] if "checkpoint" in columns else []
    if len({row.get("seed") for row in rows}) < len(rows):
        settings = columns
    for name in settings:
        values = list(dict.fromkeys(row.get(name) for row in rows))
        if name not in (*keys, "seed", metric) and len(values) > 1:
            point = " ".join(f"{key}={rows[0].get(key)}" for key in keys)
            raise ValueError(
                f"the table has results with {name} {' and '.join(map(str, values[:3]))} at {point}, "
                f"and only seeds are averaged; choose one with --where {name}={values[-1]}"
            )


def _check_column(rows: list[Row], name: str) -> None:
    if not any(name in row for row in rows):
        columns = ", ".join(dict.fromkeys(column for row in rows for column in row))
        raise ValueError(f"the table has no column {name!r}; it has {columns}")


def _number(row: Row, name: str) -> float:
    if not isinstance(row[name], (int, float)):
        raise ValueError(f"the column {name!r} holds {row[name]!r}, which is no number; name another one")
    return float(row[name])


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
