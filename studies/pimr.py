"""PIMR: how well a method keeps its accuracy over the mask ratios (SBAM paper, section 4.1, Eq. 5 and 6).

All tables here have a row for each mask ratio, a column for each method, and accuracies in percent. The paper averages
over no ratios and compares two methods; the mean, the comparison of any number of methods at the ratios that they
share, and the value 1 where all accuracies are equal are additions of this project.
"""

from __future__ import annotations

import pandas as pd


def pimr(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Return (A - min A) / (max A - min A), with the extremes of each method's own accuracies (Eq. 5).

    0 at a method's worst mask ratio, 1 at its best; 1 everywhere if all its accuracies are equal, because then every
    ratio is its best.
    """
    return _normalize(accuracies, accuracies.min(), accuracies.max())


def global_pimr(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Return the same as `pimr`, with the extremes over all methods together (Eq. 6)."""
    return _normalize(accuracies, accuracies.min(axis=None), accuracies.max(axis=None))


def shared(accuracies: pd.DataFrame) -> tuple[pd.DataFrame, list]:
    """Return the accuracies at the mask ratios that all methods have, and the ratios that are left out.

    Raises:
        ValueError: the methods have none in common.
    """
    kept = accuracies.dropna()
    if kept.empty:
        names = ", ".join(map(str, accuracies.columns))
        raise ValueError(f"PIMR: {names} have no mask ratio in common; compare fewer of them")
    return kept, accuracies.index.difference(kept.index, sort=False).tolist()


def _normalize(accuracies: pd.DataFrame, low: pd.Series | float, high: pd.Series | float) -> pd.DataFrame:
    return ((accuracies - low) / (high - low)).fillna(1.0)  # 0 / 0 where all are equal
