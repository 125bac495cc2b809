"""Running means and extremes that stay on the device until they are read."""

from __future__ import annotations

import torch

from util.distributed import world


class Averages:
    """Running means and extremes that stay on the device until they are read.

    `add` never makes the host wait; `read` sums over all processes and waits once.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._sums: dict[str, torch.Tensor] = {}
        self._extremes: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1.0) -> None:
        """Count `total`, a sum of `count` values, into the mean `name`."""
        pair = torch.stack([self._scalar(total), self._scalar(count)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_range(self, name: str, values: torch.Tensor) -> None:
        """Count `values` (any shape) into the mean `name` and the extremes `name`_min and `name`_max."""
        values = values.detach().float()
        self.add(name, values.sum(), float(values.numel()))
        low, high = torch.aminmax(values)
        extremes = torch.stack([-low, high]).double()
        known = self._extremes.get(name)
        self._extremes[name] = extremes if known is None else torch.maximum(known, extremes)

    def merge(self, other: Averages) -> None:
        """Count everything that `other` has counted."""
        for name, pair in other._sums.items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        for name, pair in other._extremes.items():
            self._extremes[name] = torch.maximum(self._extremes[name], pair) if name in self._extremes else pair

    @staticmethod
    def merged(*parts: Averages) -> Averages:
        """Merge `parts` into one that has counted everything that they have."""
        whole = Averages(parts[0].device)
        for part in parts:
            whole.merge(part)
        return whole

    def read(self) -> dict[str, float]:
        """Return the means and extremes over all processes."""
        if not self._sums:
            return {}
        sums = world.all_reduce(torch.stack(list(self._sums.values()))).tolist()
        nothing = float("nan")
        result = {
            name: total / count if count else nothing for name, (total, count) in zip(self._sums, sums, strict=True)
        }
        if self._extremes:
            extremes = world.all_reduce(torch.stack(list(self._extremes.values())), "max").tolist()
            for name, (low, high) in zip(self._extremes, extremes, strict=True):
                result |= {f"{name}_min": -low, f"{name}_max": high}
        return result

    def state(self) -> dict[str, dict[str, list[float]]]:
        """Return what was counted in all processes, as plain numbers. All processes call it together."""
        parts = {"sums": (self._sums, "sum"), "extremes": (self._extremes, "max")}
        found: dict[str, dict[str, list[float]]] = {}
        for part, (values, op) in parts.items():
            stacked = torch.stack(list(values.values())) if values else torch.zeros(0, 2, device=self.device)
            found[part] = dict(zip(values, world.all_reduce(stacked.double(), op).tolist(), strict=True))
        return found

    def load(self, state: dict[str, dict[str, list[float]]]) -> None:
        """Count what `state` holds, once among all processes."""
        for name, pair in state.get("sums", {}).items():
            values = torch.tensor(pair if world.is_main() else [0.0, 0.0], dtype=torch.float64, device=self.device)
            self._sums[name] = self._sums[name] + values if name in self._sums else values
        for name, pair in state.get("extremes", {}).items():
            self._extremes[name] = torch.tensor(pair, dtype=torch.float64, device=self.device)

    def _scalar(self, value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().to(self.device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.device)
