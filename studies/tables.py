"""Tables of results: read, select, and average over seeds with confidence intervals."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype
from scipy import stats

_LAST = ("checkpoint", "epoch")  # the last setting among the columns of a sweep's tables


def read_csv(path: str | Path) -> pd.DataFrame:
    """Read a CSV file with a row for each result. ValueError: it cannot be read, or holds no result."""
    try:
        # Only an empty cell or nan is missing: the text None is a value of a grid.
        table = pd.read_csv(
            path, keep_default_na=False, na_values=["", "nan"], float_precision="round_trip", index_col=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error})") from error
    if table.empty:
        raise ValueError(f"{path}: holds no result")
    return table.astype(dict.fromkeys(table.select_dtypes("bool"), str))  # true and false are names, not numbers


def where(table: pd.DataFrame, conditions: list[str]) -> pd.DataFrame:
    """Return the rows that match every `NAME=VALUE`; no VALUE means an empty cell. ValueError: one matches no row."""
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition}: write NAME=VALUE, such as checkpoint=last")
        _check_column(table, name)
        number = pd.to_numeric(pd.Series([value]), errors="coerce")[0]
        equal = (table[name].astype(str) == value) | (pd.to_numeric(table[name], errors="coerce") == number)
        equal = equal if value else table[name].isna()
        if not equal.any():
            found = ", ".join(map(str, table[name].dropna().unique()))
            raise ValueError(f"--where {condition}: no row has it; {name} is {found}")
        table = table[equal]
    return table


def joined(table: pd.DataFrame, columns: list[str]) -> tuple[pd.DataFrame, str]:
    """Return the table with one column in place of several, whose cells are theirs after one another; and its name.

    `random` and `cell=2` become `random cell=2`, an empty cell adds nothing. One column stays as it is.

    Raises:
        ValueError: a column is missing.
    """
    for name in columns:
        _check_column(table, name)
    if len(columns) == 1:
        return table, columns[0]
    cells = table[columns].astype("object").where(table[columns].notna(), "").astype(str)
    table = table.drop(columns=[name for name in columns if name not in _LAST])
    table.insert(0, ", ".join(columns), cells.agg(" ".join, axis=1).str.split().str.join(" "))
    return table, ", ".join(columns)


def summarize(table: pd.DataFrame, keys: list[str], metric: str) -> pd.DataFrame:
    """Average `metric` over the seeds of all rows that agree in `keys`.

    Returns:
        Columns `mean`, `half_width` (half the 95% confidence interval, Student's t; NaN for one value) and `count`,
        with `keys` as the index.

    Raises:
        ValueError: a column is missing, the metric is not numeric, or rows that agree in `keys` differ in more than
            the seed and what was measured.
    """
    for name in keys:
        _check_column(table, name)
    _check_numbers(table, metric)
    groups = table.dropna(subset=[metric]).groupby(keys, sort=False, dropna=False)
    for _, rows in groups:
        _check_only_seeds_differ(rows, keys, metric)
    found = groups[metric].agg(["mean", "sem", "count"])
    found["half_width"] = found["sem"] * stats.t.ppf(0.975, found["count"] - 1)
    return found[["mean", "half_width", "count"]]


def differences(table: pd.DataFrame, name: str, value: str, metrics: list[str]) -> pd.DataFrame:
    """Subtract from each result that of the row which differs in `name` alone, where it is `value`.

    Pairs of one seed share initial weights and the order of the data, so their differences spread less than the
    results do.

    Args:
        table: results; the settings are the columns up to `checkpoint` or `epoch`, or without it all but the metrics.
        name: the column that is compared.
        value: its value, as text, in the rows that the others are compared with.
        metrics: columns of numbers.

    Returns:
        A row for each result that has such a partner: the settings, and the differences in place of the metrics.

    Raises:
        ValueError: a column or the value is missing, rows agree in all settings, or no row has a partner.
    """
    _check_column(table, name)
    for metric in metrics:
        _check_numbers(table, metric)
    base = where(table, [f"{name}={value}"])
    settings = [column for column in _settings(table) or table.columns if column not in metrics]
    twice = table.duplicated(settings)
    if twice.any():
        row = " ".join(f"{column}={table[column][twice].iloc[0]}" for column in settings)
        raise ValueError(f"the table has two results with {row}; nothing says which to compare")
    others = [column for column in settings if column != name]
    pairs = table.drop(base.index).merge(base[[*others, *metrics]], on=others, suffixes=("", "_base"))
    if pairs.empty:
        raise ValueError(f"no result differs from one with {name}={value} in {name} alone")
    return pairs[settings].join(pairs[metrics] - pairs[[f"{metric}_base" for metric in metrics]].to_numpy())


def _check_only_seeds_differ(rows: pd.DataFrame, keys: list[str], metric: str) -> None:
    """Raise ValueError unless rows differ in seeds only."""
    settings = _settings(rows)
    if len(rows) > (rows["seed"].nunique(dropna=False) if "seed" in rows else 1):
        settings = list(rows.columns)
    for name in settings:
        values = rows[name].unique()
        if name not in (*keys, "seed", metric) and len(values) > 1:
            point = " ".join(f"{key}={rows[key].iloc[0]}" for key in keys)
            raise ValueError(
                f"the table has results with {name} {' and '.join(map(str, values[:3]))} at {point}, "
                f"and only seeds are averaged; choose one with --where {name}={values[-1]}"
            )


def _settings(table: pd.DataFrame) -> list[str]:
    """Return a sweep's settings: the columns up to `checkpoint` or `epoch`; none in a table that has neither."""
    last = next((table.columns.get_loc(name) for name in _LAST if name in table), -1)
    return list(table.columns[: last + 1])


def _check_column(table: pd.DataFrame, name: str) -> None:
    columns = table.dropna(axis="columns", how="all").columns
    if name not in columns:
        raise ValueError(f"the table has no column {name!r}; it has {', '.join(map(str, columns))}")


def _check_numbers(table: pd.DataFrame, metric: str) -> None:
    _check_column(table, metric)
    if not is_numeric_dtype(table[metric]):
        value = next(cell for cell in table[metric] if not isinstance(cell, (int, float)))
        raise ValueError(f"the column {metric!r} holds {value!r}, which is no number; name another one")


def markdown(table: pd.DataFrame, keys: list[str], metrics: list[str]) -> str:
    """Format a Markdown table: mean ± half the 95% interval of each metric for each value of `keys`, and n."""
    found = {metric: summarize(table, keys, metric) for metric in metrics}
    cells = pd.DataFrame({metric: summaries.apply(_cell, axis=1) for metric, summaries in found.items()}).fillna("")
    cells["n"] = pd.DataFrame({metric: summaries["count"] for metric, summaries in found.items()}).max(axis=1)
    rows = cells.astype({"n": int}).reset_index().astype(str)
    lines = [list(rows.columns), ["---"] * len(rows.columns), *rows.values.tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(summary: pd.Series) -> str:
    interval = "" if pd.isna(summary["half_width"]) else f" ± {summary['half_width']:.2f}"
    return f"{summary['mean']:.2f}{interval}"
