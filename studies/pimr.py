"""PIMR: how well a method keeps its accuracy over the mask ratios, SBAM paper, section 4, Eq. 5 and 6.

We had the paper's description of PIMR, not its equations, when this was written. The definition here is therefore our
reading, kept in this one place: min-max normalisation of a method's accuracies over the mask ratios, with the method's
own extremes (PIMR) or those of all methods that are compared (Global PIMR).
"""

from __future__ import annotations

from collections.abc import Mapping

Accuracies = Mapping[float, float]  # mask ratio -> accuracy, in percent


def pimr(accuracies: Accuracies) -> dict[float, float]:
    """PIMR of one method at each mask ratio: (A(r) - min A) / (max A - min A), over its own mask ratios.

    0 at its worst mask ratio, 1 at its best. A method whose accuracies are all equal does not depend on the mask ratio
    at all: PIMR is 1 everywhere, because every ratio is its best.

    Raises:
        ValueError: no accuracy at all.
    """
    return _normalized(accuracies, _extremes([accuracies]))


def global_pimr(methods: Mapping[str, Accuracies]) -> dict[str, dict[float, float]]:
    """Global PIMR of several methods: as `pimr`, with the smallest and largest accuracy of all of them together.

    1 everywhere for all, if all accuracies of all methods are equal.

    Raises:
        ValueError: no accuracy at all.
    """
    extremes = _extremes(list(methods.values()))
    return {name: _normalized(accuracies, extremes) for name, accuracies in methods.items()}


def common(methods: Mapping[str, Accuracies]) -> tuple[dict[str, dict[float, float]], list[float]]:
    """The methods at the mask ratios that all of them have, for a fair comparison; and the ratios left out.

    Raises:
        ValueError: they have none in common.
    """
    ratios = dict.fromkeys(ratio for accuracies in methods.values() for ratio in accuracies)
    shared = [ratio for ratio in ratios if all(ratio in accuracies for accuracies in methods.values())]
    if not shared:
        raise ValueError(f"PIMR: {', '.join(methods)} have no mask ratio in common; compare fewer of them")
    kept = {name: {ratio: accuracies[ratio] for ratio in shared} for name, accuracies in methods.items()}
    return kept, [ratio for ratio in ratios if ratio not in shared]


def mean(values: Mapping[float, float]) -> float:
    """One number for a method: the mean over its mask ratios."""
    return sum(values.values()) / len(values)


def _extremes(methods: list[Accuracies]) -> tuple[float, float]:
    values = [value for accuracies in methods for value in accuracies.values()]
    if not values:
        raise ValueError("PIMR needs at least one mask ratio with an accuracy")
    return min(values), max(values)


def _normalized(accuracies: Accuracies, extremes: tuple[float, float]) -> dict[float, float]:
    low, high = extremes
    if low == high:
        return dict.fromkeys(sorted(accuracies), 1.0)
    return {ratio: (accuracies[ratio] - low) / (high - low) for ratio in sorted(accuracies)}
