"""Running means of a training loop's metrics."""

from collections.abc import Mapping

import torch
from torch import Tensor

from driving_sim.engine.ranks.distributed import Ranks


class Meter:
    """Means since the last reading; they stay on the device until then, so adding never waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count scalar tensors; a name need not come every time."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, ranks: Ranks) -> dict[str, float]:
        """The means over steps and ranks, which all have to call; and begin anew."""
        if not self._sums:
            return {}
        sums = ranks.sum(torch.stack(list(self._sums.values()))).tolist()
        means = {
            name: total / (count * ranks.size)
            for (name, count), total in zip(self._counts.items(), sums, strict=True)
        }
        self._sums, self._counts = {}, {}
        return means
